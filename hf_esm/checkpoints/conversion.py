"""Live weights as the tensors that `save_pretrained` would store, and back."""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, apply_converters, revert_weight_conversion

from .base import Checkpoint


@dataclass
class OutputGroup:
    """Weights that go to disk together: usually one, more where the layout on disk joins or splits them.

    Attributes:
        names: canonical names of the live weights.
        stored: what is written for them, by name on disk, on the meta device.
    """

    names: list[str]
    stored: dict[str, Tensor]


def write_plan(checkpoint: Checkpoint, dtype: Optional[torch.dtype] = None) -> list[OutputGroup]:
    """How the weights of `checkpoint` stand on disk when `save_pretrained` writes its model, in reading order.

    `dtype` is asked of every floating-point weight; by default each keeps its own.
    """
    model = checkpoint.skeleton
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # never loaded from disk
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [entry for entry in conversions if not isinstance(entry, PrefixChange)]
    backwards = [entry.reverse_transform() for entry in conversions[::-1] if isinstance(entry, WeightConverter)]
    groups: dict[str, list[str]] = {}
    for name, live in checkpoint.names.items():
        groups.setdefault(apply_converters(live, backwards)[0], []).append(name)
    plan = []
    for names in groups.values():
        tensors = {
            name: torch.empty(checkpoint.shape(name), dtype=output_dtype(checkpoint.dtype(name), dtype), device="meta")
            for name in names
        }
        plan.append(OutputGroup(names, to_stored(checkpoint, tensors)))
    return plan


def output_dtype(own: torch.dtype, asked: Optional[torch.dtype]) -> torch.dtype:
    """The dtype that a weight is written in."""
    return asked if asked is not None and own.is_floating_point else own


def to_stored(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one group, by canonical name, as they stand on disk."""
    live = {checkpoint.names[name]: tensor for name, tensor in tensors.items()}
    return revert_weight_conversion(checkpoint.skeleton, live)
