"""RegMean (*Dataless Knowledge Fusion by Merging Weights of Language Models*, arXiv 2212.09849)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import HfEsmError
from ..linalg import significant
from .stack import InputStatistics, Merged, MergeMethod, Stack, mean_update


def merge_by_regression(
    deltas: list[Tensor], statistics: list[InputStatistics], off_diagonal: float = 1.0, ridge: float = 0.0
) -> Tensor:
    """The update nearest to every expert's on that expert's own inputs: `(Σ Δ_t G_t) (Σ G_t)⁺`.

    `G_t` is the Gram matrix of the inputs divided by its trace, so that no task counts for more because it has more
    tokens. Along inputs that no sample has, the update is zero.

    Args:
        deltas: `T` updates `[d_out, d_in]`.
        statistics: of each expert's inputs.
        off_diagonal: factor on the off-diagonal entries of the Gram matrices.
        ridge: added to their diagonals, in units of their mean diagonal.

    Returns the merged update `[d_out, d_in]`, float64.
    """
    width = deltas[0].shape[1]
    weighted = torch.zeros_like(deltas[0], dtype=torch.float64)
    total = weighted.new_zeros(width, width)
    for delta, inputs in zip(deltas, statistics, strict=True):
        factor = inputs.factor.double()
        trace = factor.square().sum()
        if trace == 0:  # nothing is known of this expert's inputs
            continue
        gram = factor.T @ factor / trace
        diagonal = gram.diagonal().clone()
        gram *= off_diagonal
        gram.diagonal().copy_(diagonal + ridge / width)
        weighted += delta.double() @ gram
        total += gram
    values, vectors = torch.linalg.eigh(total)
    kept = significant(values)
    vectors = vectors[:, kept]
    return (weighted @ (vectors / values[kept])) @ vectors.T


@dataclass
class RegMean(MergeMethod):
    """RegMean: every linear map by least squares on the experts' inputs, everything else averaged."""

    name: ClassVar[str] = "regmean"
    needs_statistics: ClassVar[bool] = True

    off_diagonal: float = field(
        default=0.9, metadata={"help": "factor on the off-diagonal entries of the Gram matrices; published: 0.9"}
    )
    ridge: float = field(default=0.0, metadata={"help": "added to the Gram matrices, in units of their mean diagonal"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.off_diagonal <= 1:
            raise HfEsmError(f"regmean: off_diagonal must be between 0 and 1, not {self.off_diagonal}.")
        if self.ridge < 0:
            raise HfEsmError(f"regmean: ridge must be 0 or more, not {self.ridge}.")

    def merge(self, stack: Stack) -> Merged:
        if not stack.is_calibrated:
            return mean_update(stack, scaled=True)
        merged = merge_by_regression(stack.deltas, stack.statistics, self.off_diagonal, self.ridge)
        return Merged(merged.float(), self.name)
