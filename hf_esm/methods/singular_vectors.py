"""Task Singular Vectors (arXiv 2412.00081): TSV-M, which merges matrices, and TSV-C, which compresses experts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Optional

import torch
from torch import Tensor

from ..linalg import polar_factor, truncated_svd
from .stack import Merged, MergeMethod, Stack, mean_update


TOLERANCE = {
    "help": (
        "share of the leading directions' energy that may be missed: above 0, for example 0.001, directions are found "
        "by randomised iteration, which is much faster in wide layers, and from 0.001 on in the precision that the "
        "hardware multiplies fastest; 0: exactly"
    ),
    "least": 0,
    "below": 1,
}


def merge_singular_vectors(
    updates: list[Tensor],
    keep_scale: bool = False,
    tolerance: float = 0.0,
    weights: Optional[Sequence[float]] = None,
    num_outputs: Optional[int] = None,
) -> Tensor:
    """TSV-M of one matrix: the leading `⌊min(d)/T⌋` triplets of each update, orthogonalised across tasks, and summed.

    Args:
        updates: `T` updates `[d_out, d_in]`.
        keep_scale: multiply each polar factor by the mean of its stack's singular values, as ESM's published RoBERTa
            code does.
        tolerance: see `linalg.truncated_svd`.
        weights: of the tasks, which multiply the singular values of their triplets; 1 by default.
        num_outputs: see `Stack`.

    Returns the merged update, float64. Tasks whose update is zero contribute nothing.
    """
    rows, columns = updates[0].shape
    rank = max(min(num_outputs or rows, columns) // len(updates), 1)
    weighted = zip(updates, weights or [1.0] * len(updates), strict=True)
    triplets = [(*truncated_svd(update, rank, tolerance), weight) for update, weight in weighted if update.any()]
    if not triplets:
        return torch.zeros_like(updates[0], dtype=torch.float64)
    left = torch.cat([u for u, *_ in triplets], dim=1)
    values = torch.cat([s * weight for _, s, _, weight in triplets])
    right = torch.cat([vh for _, _, vh, _ in triplets])
    (left, left_mean), (right, right_mean) = polar_factor(left), polar_factor(right)  # square: too steep for float32
    merged = (left * values) @ right
    return merged * left_mean * right_mean if keep_scale else merged


@dataclass
class TSVM(MergeMethod):
    """TSV-M: every matrix by its orthogonalised task singular vectors, everything else averaged.

    A tolerance of 0 is the published form. Embeddings that were trained are merged by token counts, not by TSV-M.
    """

    name: ClassVar[str] = "tsv-m"
    papers: ClassVar[tuple[str, ...]] = ("2412.00081",)
    decomposes: ClassVar[bool] = True
    keeps_span: ClassVar[bool] = True

    tolerance: float = field(default=0.001, metadata=TOLERANCE)

    def merge(self, stack: Stack) -> Merged:
        if not stack.is_matrix:
            return mean_update(stack, scaled=True)
        merged = merge_singular_vectors(
            stack.updates, tolerance=self.tolerance, weights=stack.weights, num_outputs=stack.num_outputs
        )
        return Merged(merged.float(), self.name)


@dataclass
class TSVC(MergeMethod):
    """TSV-C: every expert compressed to the leading singular triplets of its updates, as an adapter of the base.

    The outcome is a model with routed experts and without a router: the caller names the task. Linear maps are the
    base's. Each task keeps its own biases, norms and convolutions, and its compressed embeddings, beside its head,
    where `load_task_model` finds them. A routed model has one body for all tasks, in which these are averaged.
    """

    name: ClassVar[str] = "tsv-c"
    papers: ClassVar[tuple[str, ...]] = ("2412.00081",)
    decomposes: ClassVar[bool] = True
    tunable: ClassVar[bool] = False
    router: ClassVar[str] = "static"
    keeps_bodies: ClassVar[bool] = True

    rank: int = field(
        default=0, metadata={"help": "triplets kept per expert and linear map; 0: min(d) / T", "least": 0}
    )
    tolerance: float = field(default=0.0, metadata=TOLERANCE)

    def merge(self, stack: Stack) -> Merged:
        if not stack.routable:
            return mean_update(stack, scaled=True)
        return Merged(torch.zeros_like(stack.updates[0]), "base")

    def expert_rank(self, shape: torch.Size, tasks: int) -> int:
        """Return the rank of one expert of a map `[d_out, d_in]`."""
        return min(self.rank or max(min(shape) // tasks, 1), *shape)
