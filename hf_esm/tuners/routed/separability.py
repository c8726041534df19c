"""Whether the samples of a batch can be told apart in a model's layers."""

import inspect
from typing import Optional

from torch import nn
from transformers import PreTrainedModel

from ...architecture import towers
from ...errors import HfEsmError


# Models whose layers read `[tokens, samples, features]`.
_TOKENS_FIRST = ("fsmt", "led", "longformer", "xlnet")


def nested_models(model: nn.Module) -> dict[str, PreTrainedModel]:
    """A Transformers model and all models nested in it, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}


def inseparable(model: nn.Module) -> Optional[str]:
    """Why the samples of a batch cannot be told apart in a model's layers; None if they can.

    One expert for a whole batch works in every model.
    """
    for module in nested_models(model).values():
        if type(module).__name__.endswith("ForMultipleChoice"):
            return f"A {type(module).__name__} reads several texts for each sample"
        parts = {} if towers(module) else module.config.sub_configs
        reads_text = "input_ids" in inspect.signature(module.forward).parameters  # not so CLIP's image classifier
        if reads_text and "text_config" in parts and len(parts) > 1:
            return f"A {type(module).__name__} reads text with any number of other inputs"
        if module.config.model_type in _TOKENS_FIRST:
            return f"The layers of a {type(module).__name__} read tokens first, then samples"
    return None


def check_separable(model: nn.Module) -> None:
    """Refuse a router over a model whose samples cannot be told apart."""
    if reason := inseparable(model):
        raise HfEsmError(
            f"{reason}: its samples cannot be told apart, so that a router cannot find their tasks. Merge without "
            "experts (`method='esm'`), or take `router: oracle` and name one task per batch."
        )
