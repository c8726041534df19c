"""Padding of callers that pad without an attention mask."""

import logging
from functools import cache
from typing import Any, Optional

from torch import Tensor
from transformers import PretrainedConfig


logger = logging.getLogger(__name__)


def mask_of_padding(config: PretrainedConfig, ids: Any) -> Optional[Tensor]:
    """Mask of the real tokens of a batch without a mask, `[B, n]` bool; None if no token is known to be padding.

    Padding tokens at the ends of a sample are padding, unless they also end texts: then there is a warning, once. A
    decoder behind an encoder may start with the padding token.

    Args:
        config: of the model that reads the tokens.
        ids: tokens `[B, n]`, if the model reads any.
    """
    text = config.get_text_config()
    pad, ends = getattr(text, "pad_token_id", None), getattr(text, "eos_token_id", None)
    if pad is None or config.is_encoder_decoder or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2:
        return None
    padding = ids == pad
    outer = padding.cumprod(1).bool() | padding.flip(1).cumprod(1).flip(1).bool()
    outer &= ~outer.all(1, keepdim=True)
    if not bool(outer.any()):
        return None
    if pad in (ends if isinstance(ends, list) else [ends]):
        if len(ids) > 1:
            _warn_once()
        return None
    return ~outer


@cache
def _warn_once() -> None:
    logger.warning(
        "A batch without an attention mask has samples that begin or end with the padding token, which also ends "
        "texts. The router reads it as text, so that routes depend on the padding. Pass attention_mask."
    )
