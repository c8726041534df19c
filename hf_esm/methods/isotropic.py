"""Isotropic merging (*No Task Left Behind*, arXiv 2502.04959): merged updates whose singular values are all equal."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import HfEsmError
from ..linalg import polar_factor, truncated_svd
from .stack import Merged, MergeMethod, Stack, mean_update


def merge_isotropic(deltas: list[Tensor]) -> Tensor:
    """Iso-C of one matrix: the sum of `T` updates `[d_out, d_in]`, each of its singular values set to their mean.

    Returns the merged update, float64. Directions in which the sum is numerically zero stay zero.
    """
    polar, mean = polar_factor(torch.stack(deltas).double().sum(0))
    return polar * mean


def merge_isotropic_with_tasks(deltas: list[Tensor], common_space_fraction: float) -> Tensor:
    """Iso-CTS of one matrix: the leading triplets of the sum, and of each task's update outside their column space,
    whitened together, with one singular value: the mean of all.

    Args:
        deltas: `T` updates `[d_out, d_in]`.
        common_space_fraction: share of the `min(d)` directions that the sum gives; what is left is brought to the
            nearest multiple of `T`.

    Returns the merged update, float64.
    """
    side, tasks = min(deltas[0].shape), len(deltas)
    own = round((side - int(common_space_fraction * side)) / tasks)
    while own * tasks > side:
        own -= 1
    common = truncated_svd(torch.stack(deltas).double().sum(0), side - own * tasks)
    basis = common[0]
    outside = [delta.double() - basis @ (basis.T @ delta.double()) for delta in deltas]
    scale = max(float(delta.norm()) for delta in deltas)
    triplets = [common] + [truncated_svd(d, own) for d in outside if own and float(d.norm()) > 1e-6 * scale]
    values = torch.cat([s for _, s, _ in triplets])
    if not len(values):
        return torch.zeros_like(deltas[0], dtype=torch.float64)
    left, _ = polar_factor(torch.cat([u for u, _, _ in triplets], dim=1))
    right, _ = polar_factor(torch.cat([vh for _, _, vh in triplets]))
    return (left @ right) * (values.sum() / side)


@dataclass
class IsoC(MergeMethod):
    """Iso-C: every matrix by the sum of the updates made isotropic, everything else averaged."""

    name: ClassVar[str] = "iso-c"
    default_alpha: ClassVar[float] = 1.5  # the middle of what is good on validation rows of eight text tasks

    def merge(self, stack: Stack) -> Merged:
        if not stack.is_matrix:
            return mean_update(stack, scaled=True)
        return Merged(merge_isotropic(stack.deltas).float(), self.name)


@dataclass
class IsoCTS(MergeMethod):
    """Iso-CTS: Iso-C with directions of each task's own beside the common ones; everything else averaged."""

    name: ClassVar[str] = "iso-cts"
    default_alpha: ClassVar[float] = 2.0  # as above; the papers tune it

    common_space_fraction: float = field(
        default=0.8, metadata={"help": "share of the directions that all tasks have in common; published: 0.8"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.common_space_fraction <= 1:
            raise HfEsmError(
                f"iso-cts: common_space_fraction must be between 0 and 1, not {self.common_space_fraction}."
            )

    def merge(self, stack: Stack) -> Merged:
        if not stack.is_matrix:
            return mean_update(stack, scaled=True)
        merged = merge_isotropic_with_tasks(stack.deltas, self.common_space_fraction)
        return Merged(merged.float(), self.name)
