"""RegMean (*Dataless Knowledge Fusion by Merging Weights of Language Models*, arXiv 2212.09849)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Optional

import torch
from torch import Tensor

from ..linalg import significant
from .stack import InputStatistics, Merged, MergeMethod, Stack, mean_update


def merge_by_regression(
    updates: list[Tensor],
    statistics: list[InputStatistics],
    off_diagonal: float = 1.0,
    ridge: float = 0.0,
    weights: Optional[Sequence[float]] = None,
) -> Tensor:
    """Return the least-squares fit to the experts' updates on their inputs: `(Σ w_t Δ_t G_t) (Σ |w_t| G_t)⁺`.

    `G_t` is the Gram matrix of the inputs divided by its trace, so that a task with more tokens does not count for
    more. Along inputs that occur in no sample, the merged update is zero.

    Args:
        updates: `T` updates `[d_out, d_in]`.
        statistics: of each expert's inputs.
        off_diagonal: factor on the off-diagonal entries of the Gram matrices.
        ridge: added to their diagonals, in units of their mean diagonal.
        weights: of the tasks; 1 by default. With a negative weight, the negated update is fitted.

    Returns the merged update `[d_out, d_in]`, float64.
    """
    width = updates[0].shape[1]
    weighted = torch.zeros_like(updates[0], dtype=torch.float64)
    total = weighted.new_zeros(width, width)
    for update, inputs, weight in zip(updates, statistics, weights or [1.0] * len(updates), strict=True):
        factor = inputs.factor.double()
        trace = factor.square().sum()
        if trace == 0:  # all inputs of this expert are zero
            continue
        gram = factor.T @ factor / trace
        diagonal = gram.diagonal().clone()
        gram *= off_diagonal
        gram.diagonal().copy_(diagonal + ridge / width)
        weighted += weight * (update.double() @ gram)
        total += abs(weight) * gram
    values, vectors = torch.linalg.eigh(total)
    nonzero = significant(values)
    vectors = vectors[:, nonzero]
    return (weighted @ (vectors / values[nonzero])) @ vectors.T


@dataclass
class RegMean(MergeMethod):
    """RegMean: every linear map by least squares on the experts' inputs, everything else averaged."""

    name: ClassVar[str] = "regmean"
    papers: ClassVar[tuple[str, ...]] = ("2212.09849",)
    decomposes: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = True
    keeps_span: ClassVar[bool] = True

    off_diagonal: float = field(
        default=0.9,
        metadata={
            "help": "factor on the off-diagonal entries of the Gram matrices; published: 0.9",
            "least": 0,
            "most": 1,
        },
    )
    ridge: float = field(
        default=0.0, metadata={"help": "added to the Gram matrices, in units of their mean diagonal", "least": 0}
    )

    def merge(self, stack: Stack) -> Merged:
        if not stack.is_calibrated:
            return mean_update(stack, scaled=True)
        merged = merge_by_regression(stack.updates, stack.statistics, self.off_diagonal, self.ridge, stack.weights)
        return Merged(merged.float(), self.name)
