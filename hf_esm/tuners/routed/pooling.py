"""The rows of each sample in a layer's input, and their mean over real tokens."""

from typing import Any, Optional

import torch
from torch import Tensor

from ...errors import HfEsmError
from ..base import recorded
from .frames import Frame, SoundMask


def sample_rows(x: Tensor, batch: int) -> Optional[Tensor]:
    """A layer's input as `[B, rows, d]`; None if it does not come from samples (relative positions)."""
    if x.dim() < 2 or not batch or x.shape[0] % batch:
        return None
    return x if x.dim() == 3 and x.shape[0] == batch else x.reshape(batch, -1, x.shape[-1])


def pool(rows: Tensor, frame: Frame, x: Tensor, module: str) -> Tensor:
    """The mean over each sample's real tokens, `[B, d]` float32; over those of the prompt, if the frame has one.

    Args:
        rows: the layer's input as `[B, n, d]`.
        frame: of the forward pass.
        x: the layer's input, before it became `rows`.
        module: name of the layer.

    Raises:
        HfEsmError: if the mask has another length than the layer's input, or a sample has no real token.
    """
    from_encoder = frame.encoder_states is not None and x is frame.encoder_states
    real = _real_tokens(frame.encoder_mask if from_encoder else frame.mask, rows, frame.past, module)
    if frame.prompt is not None and frame.prompt.shape == rows.shape[:2]:
        prompt = frame.prompt.to(rows.device) if real is None else frame.prompt.to(rows.device) & real
        real = torch.where(prompt.any(1, keepdim=True), prompt, torch.ones_like(prompt) if real is None else real)
    rows = rows.float()
    if real is None:
        return rows.mean(1)
    count = real.sum(1, keepdim=True)
    if not recorded() and not bool(count.all()):
        raise HfEsmError(f"{module}: a sample has no real token. Leave empty inputs out, or check the attention mask.")
    return torch.einsum("bnd,bn->bd", rows, real.float()) / count


def _real_tokens(mask: Any, rows: Tensor, past: int, module: str) -> Optional[Tensor]:
    """Mask of real tokens `[B, n]` bool, from any kind of mask that models use; None where all tokens are real."""
    if isinstance(mask, SoundMask):
        mask = mask.frames(rows.shape[1])
    if isinstance(mask, dict):  # one mask for each kind of attention
        mask = mask.get("full_attention", next(iter(mask.values())))
    if not isinstance(mask, Tensor):
        return None
    length = rows.shape[1]
    if mask.dim() == 4:  # causal and sliding windows let every real token see itself: the diagonal
        mask = mask[:, 0].diagonal(offset=past, dim1=-2, dim2=-1)
        mask = mask if mask.dtype == torch.bool else mask >= 0
    mask = mask.bool()
    if mask.dim() == 2 and mask.shape[1] > length and past:
        mask = mask[:, past : past + length]
    if mask.shape == rows.shape[:2]:
        return mask.to(rows.device)  # the model may be on several devices
    if length == 1 or bool(mask.all()):  # a pooled input, or a batch without padding
        return None
    raise HfEsmError(
        f"{module}: the attention mask has {tuple(mask.shape)} positions and the layer reads {tuple(rows.shape[:2])}, "
        "so that padding cannot be told from tokens. Run samples of one length together, without a mask."
    )
