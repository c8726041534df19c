"""Task Singular Vectors (arXiv 2412.00081)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import HfEsmError
from ..linalg import polar_factor, truncated_svd
from .stack import Merged, MergeMethod, Stack, mean_update


TOLERANCE = (
    "share of what the leading directions hold that they may miss: above 0, for example 0.001, they are found by "
    "randomised iteration, which is much faster in wide layers, and from 0.001 on in the precision that the hardware "
    "multiplies fastest; 0: exactly"
)


def check_tolerance(method: MergeMethod) -> None:
    """Refuse a `tolerance` that is no share."""
    if not 0 <= method.tolerance < 1:
        raise HfEsmError(f"{method.name}: tolerance must be at least 0 and below 1, not {method.tolerance}.")


def merge_singular_vectors(deltas: list[Tensor], keep_scale: bool = False, tolerance: float = 0.0) -> Tensor:
    """TSV-M of one matrix: the leading `⌊min(d)/T⌋` triplets of each update, whitened across tasks, and added up.

    Args:
        deltas: `T` updates `[d_out, d_in]`.
        keep_scale: multiply each polar factor by the mean of its stack's singular values, as ESM's published
            RoBERTa code does.
        tolerance: see `linalg.truncated_svd`.

    Returns the merged update, float64. Tasks whose update is zero contribute nothing.
    """
    rank = max(min(deltas[0].shape) // len(deltas), 1)
    triplets = [truncated_svd(delta, rank, tolerance) for delta in deltas if delta.any()]
    if not triplets:
        return torch.zeros_like(deltas[0], dtype=torch.float64)
    left = torch.cat([u for u, _, _ in triplets], dim=1)
    values = torch.cat([s for _, s, _ in triplets])
    right = torch.cat([vh for _, _, vh in triplets])
    (left, left_mean), (right, right_mean) = polar_factor(left), polar_factor(right)  # square: too steep for float32
    merged = (left * values) @ right
    return merged * left_mean * right_mean if keep_scale else merged


@dataclass
class TSVM(MergeMethod):
    """TSV-M: every matrix by its whitened task singular vectors, everything else averaged."""

    name: ClassVar[str] = "tsv-m"

    tolerance: float = field(default=0.0, metadata={"help": TOLERANCE})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tolerance(self)

    def merge(self, stack: Stack) -> Merged:
        if not stack.is_matrix:
            return mean_update(stack, scaled=True)
        return Merged(merge_singular_vectors(stack.deltas, tolerance=self.tolerance).float(), self.name)


@dataclass
class TSVC(MergeMethod):
    """TSV-C: every expert compressed to the leading singular triplets of its updates, to stand beside the base.

    The outcome is a model with routed experts and no router: whoever loads it says which task is meant. Linear maps
    are the base's; everything else is averaged.
    """

    name: ClassVar[str] = "tsv-c"
    tunable: ClassVar[bool] = False
    router: ClassVar[str] = "static"
    directions: ClassVar[str] = "residual"

    rank: int = field(default=0, metadata={"help": "triplets kept per expert and linear map; 0: min(d) / T"})
    tolerance: float = field(default=0.0, metadata={"help": TOLERANCE})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0:
            raise HfEsmError(f"tsv-c: rank must be 0 or more, not {self.rank}.")
        check_tolerance(self)

    def merge(self, stack: Stack) -> Merged:
        if not stack.routable:
            return mean_update(stack, scaled=True)
        return Merged(torch.zeros_like(stack.deltas[0]), "base")

    def expert_rank(self, shape: torch.Size, tasks: int) -> int:
        """Rank of one expert of a map `[d_out, d_in]`."""
        return min(self.rank or max(min(shape) // tasks, 1), *shape)
