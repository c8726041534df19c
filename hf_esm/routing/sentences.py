"""A routed model inside Sentence Transformers."""

import copy
from typing import TYPE_CHECKING, Any

from ..checkpoints import read_modules
from ..errors import HfEsmError


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from .model import RoutedModel


def sentence_transformer(routed: "RoutedModel", **kwargs: Any) -> "SentenceTransformer":
    """See `RoutedModel.sentence_transformer`."""
    if read_modules(routed.folder, str(routed.folder)) is None:
        raise HfEsmError(f"{routed.folder} makes no embeddings: its experts are no models of Sentence Transformers.")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise HfEsmError("Embeddings need Sentence Transformers: pip install sentence-transformers") from None
    model = SentenceTransformer(str(routed.folder), **{"device": str(routed.device), **kwargs})
    body = copy.copy(routed.model)  # the library saves the body that it is given
    body.save_pretrained = _refuse_saving
    model[0].model = body
    return model.eval()


def _refuse_saving(*args: Any, **kwargs: Any) -> None:
    raise HfEsmError("Sentence Transformers cannot save routed experts. Call `RoutedModel.save_pretrained`.")
