"""Isotropic merging (*No Task Left Behind*, arXiv 2502.04959): merged updates whose singular values are all equal."""

from dataclasses import dataclass, field
from typing import ClassVar, Optional

import torch
from torch import Tensor

from ..linalg import polar_factor, truncated_svd
from .stack import Merged, MergeMethod, Stack, mean_update


RANK = {
    "help": "what means and shares of directions are over: numerical, the directions that the sum of the updates has; "
    "published, all min(d), so that updates of low rank, as those of LoRA experts, nearly vanish",
    "choices": ("numerical", "published"),
}


def merge_isotropic(updates: list[Tensor], rank: str = "numerical", num_outputs: Optional[int] = None) -> Tensor:
    """Iso-C of one matrix: the sum of `T` updates `[d_out, d_in]`, with each singular value set to the mean of all.

    Args:
        rank: what the mean is over, `"numerical"` or `"published"`; see `RANK`.
        num_outputs: see `Stack`.

    Returns the merged update, float64. Directions in which the sum is numerically zero stay zero.
    """
    left, values, right = truncated_svd(torch.stack(updates).double().sum(0), min(updates[0].shape))
    return (left @ right) * (values.sum() / _counted(values, updates[0], num_outputs, rank))


def merge_isotropic_with_tasks(
    updates: list[Tensor], common_space_fraction: float, rank: str = "numerical", num_outputs: Optional[int] = None
) -> Tensor:
    """Iso-CTS of one matrix: leading singular triplets of the sum, and of each update outside their column space.

    All triplets are orthogonalised together and get one singular value, the mean of all.

    Args:
        updates: `T` updates `[d_out, d_in]`.
        common_space_fraction: share of the directions that is taken from the sum. The number of the remaining
            directions is rounded to the nearest multiple of `T` that fits.
        rank: what the share and the mean are over, `"numerical"` or `"published"`; see `RANK`.
        num_outputs: see `Stack`.

    Returns the merged update, float64.
    """
    tasks = len(updates)
    left, values, right = truncated_svd(torch.stack(updates).double().sum(0), min(updates[0].shape))
    side = _counted(values, updates[0], num_outputs, rank)
    per_task = round((side - int(common_space_fraction * side)) / tasks)
    while per_task * tasks > side:
        per_task -= 1
    shared = side - per_task * tasks
    triplets = [(left[:, :shared], values[:shared], right[:shared])]
    basis = triplets[0][0]
    outside = [update.double() - basis @ (basis.T @ update.double()) for update in updates]
    scale = max(float(update.norm()) for update in updates)
    triplets += [truncated_svd(rest, per_task) for rest in outside if per_task and float(rest.norm()) > 1e-6 * scale]
    values = torch.cat([s for _, s, _ in triplets])
    if not len(values):
        return torch.zeros_like(updates[0], dtype=torch.float64)
    left, _ = polar_factor(torch.cat([u for u, _, _ in triplets], dim=1))
    right, _ = polar_factor(torch.cat([vh for _, _, vh in triplets]))
    return (left @ right) * (values.sum() / side)


def _counted(values: Tensor, matrix: Tensor, num_outputs: Optional[int], rank: str) -> int:
    """Return the number of directions of a matrix: of its nonzero singular values, at least 1, or of all."""
    rows, columns = matrix.shape
    return max(len(values), 1) if rank == "numerical" else min(num_outputs or rows, columns)


@dataclass
class IsoC(MergeMethod):
    """Iso-C: every matrix by the sum of the updates with equal singular values, everything else averaged.

    `rank="published"` is the published form; on updates of full rank both are the same.
    """

    name: ClassVar[str] = "iso-c"
    papers: ClassVar[tuple[str, ...]] = ("2502.04959",)
    decomposes: ClassVar[bool] = True
    default_alpha: ClassVar[float] = 1.5  # the middle of what is good on validation rows of eight text tasks
    keeps_span: ClassVar[bool] = True

    rank: str = field(default="numerical", metadata=RANK)

    def merge(self, stack: Stack) -> Merged:
        if not stack.is_matrix:
            return mean_update(stack, scaled=True)
        return Merged(merge_isotropic(stack.weighted, self.rank, stack.num_outputs).float(), self.name)


@dataclass
class IsoCTS(MergeMethod):
    """Iso-CTS: Iso-C with directions of each single task in addition to the common ones; everything else averaged.

    `rank="published"` is the published form; on updates of full rank both are the same.
    """

    name: ClassVar[str] = "iso-cts"
    papers: ClassVar[tuple[str, ...]] = ("2502.04959",)
    decomposes: ClassVar[bool] = True
    default_alpha: ClassVar[float] = 2.0  # as above; the papers tune it
    keeps_span: ClassVar[bool] = True

    common_space_fraction: float = field(
        default=0.8,
        metadata={
            "help": "share of the directions that all tasks have in common; published: 0.8",
            "least": 0,
            "most": 1,
            "search": (0.2, 1.0, "linear"),
        },
    )
    rank: str = field(default="numerical", metadata=RANK)

    def merge(self, stack: Stack) -> Merged:
        if not stack.is_matrix:
            return mean_update(stack, scaled=True)
        merged = merge_isotropic_with_tasks(stack.weighted, self.common_space_fraction, self.rank, stack.num_outputs)
        return Merged(merged.float(), self.name)
