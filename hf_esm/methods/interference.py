"""Methods that take interference between tasks off the updates: WUDI (arXiv 2503.08099) and CAT (2505.06977)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional

import torch
from torch import Tensor

from ..linalg import RELATIVE_CUTOFF, largest_eigenpairs, significant
from .stack import InputStatistics, Merged, MergeMethod, Stack, mean_update, weighted_sum


def merge_without_interference(
    updates: list[Tensor],
    weights: Optional[Sequence[float]] = None,
    *,
    ridge: float = 0.0,
    steps: Optional[int] = None,
    learning_rate: float = 1e-5,
) -> Tensor:
    """WUDI of one matrix: minimise `Σ_t ‖(Δ − Δ_t) Δ_tᵀ‖² / ‖Δ_t‖²` over `Δ`, beginning at the sum of the updates.

    The rows of an update are taken for its inputs. The problem is linear: with `A = Σ_t Δ_tᵀ Δ_t / ‖Δ_t‖²`, half the
    gradient is `Δ A − Σ_t Δ_t Δ_tᵀ Δ_t / ‖Δ_t‖²`, one product whatever `T` is, and where it is zero, `Δ` is a
    minimiser. The exact solution is the one that is nearest to the sum.

    Args:
        updates: `T` updates `[d_out, d_in]`. One that is zero has no part in the problem.
        weights: of the tasks; 1 by default. A term counts by the magnitude of its weight; with a negative one, the
            negated update is fitted.
        ridge: of the exact solution: `ridge · T / d_in · ‖Δ − Σ_t w_t Δ_t‖²` is added to what is minimised.
        steps: of Adam, as published; None for the exact solution.
        learning_rate: of Adam.

    Returns the merged update `[d_out, d_in]`, float64; float32 by Adam.
    """
    weights = list(weights or [1.0] * len(updates))
    dtype = torch.float64 if steps is None else torch.float32
    total = sum(w * update.to(dtype) for w, update in zip(weights, updates, strict=True))
    width = updates[0].shape[1]
    moments, target = total.new_zeros(width, width), torch.zeros_like(total)
    for update, weight in zip(updates, weights, strict=True):
        update = update.to(dtype)
        size = update.square().sum()
        if size == 0:
            continue
        moment = update.T @ update / size
        moments += abs(weight) * moment
        target += weight * (update @ moment)
    if steps is not None:
        return _adam(lambda merged: 2 * (merged @ moments - target), total, steps, learning_rate)
    values, vectors = torch.linalg.eigh(moments)
    nonzero = significant(values)
    values, vectors = values[nonzero] + ridge * len(updates) / width, vectors[:, nonzero]
    away = (target - total @ moments) @ vectors
    return total + (away / values) @ vectors.T


def _adam(gradient: Any, start: Tensor, steps: int, learning_rate: float) -> Tensor:
    """Return where Adam ends, with its usual moments, from a start."""
    merged = start.clone()
    optimizer = torch.optim.Adam([merged], lr=learning_rate)
    for _ in range(steps):
        merged.grad = gradient(merged)
        optimizer.step()
    return merged


@dataclass
class WUDI(MergeMethod):
    """WUDI: every linear map by the update that disturbs no expert's along its rows; everything else averaged."""

    name: ClassVar[str] = "wudi"
    papers: ClassVar[tuple[str, ...]] = ("2503.08099",)
    decomposes: ClassVar[bool] = True

    solver: str = field(
        default="exact",
        metadata={
            "help": "exact, the minimiser that is nearest to the sum of the updates; adam, as published: `steps` of "
            "Adam from the sum, which end far from the minimum",
            "choices": ("exact", "adam"),
        },
    )
    ridge: float = field(
        default=0.1,
        metadata={
            "help": "pull of the exact solution towards the sum of the updates",
            "least": 0,
            "search": (1e-3, 10.0, "log"),
        },
    )
    steps: int = field(default=300, metadata={"help": "of Adam; published: 300", "least": 0})
    learning_rate: float = field(default=1e-5, metadata={"help": "of Adam; published: 1e-5 and 2e-5", "above": 0})

    @property
    def keeps_span(self) -> bool:
        """Whether coordinates are merged as the updates are: not by Adam, whose steps go by entries."""
        return self.solver == "exact"

    def merge(self, stack: Stack) -> Merged:
        if not stack.is_matrix:
            return mean_update(stack, scaled=True)
        steps = self.steps if self.solver == "adam" else None
        merged = merge_without_interference(
            stack.updates, stack.weights, ridge=self.ridge, steps=steps, learning_rate=self.learning_rate
        )
        return Merged(merged.float(), self.name)


def conflicting_directions(
    updates: list[Tensor], statistics: list[InputStatistics], count: int, trade_off: float
) -> list[Tensor]:
    """Return, per task `k`, the directions of the outputs in which the other updates move its outputs most.

    They are the leading eigenvectors, of positive eigenvalues, of `Σ_{i≠k} Δ_i (G_k − λ G_i) Δ_iᵀ`, where `G_t` is the
    mean of `x xᵀ` over the inputs `x` of task `t`: what the updates of the others do to the inputs of this task, less
    what they do to their own.

    Args:
        updates: `T` updates `[d_out, d_in]`.
        statistics: of each expert's inputs.
        count: number of directions per task at most.
        trade_off: `λ`.

    Returns `T` bases `[d_out, k]` with orthonormal columns, float64.
    """
    updates = [update.double() for update in updates]
    factors = [inputs.factor.double() / max(inputs.count, 1) ** 0.5 for inputs in statistics]
    own = [update @ factor.T for update, factor in zip(updates, factors, strict=True)]
    kept = [image @ image.T for image in own]
    bases = []
    for place, factor in enumerate(factors):
        conflict, size = updates[0].new_zeros(len(updates[0]), len(updates[0])), 0.0
        for other, update in enumerate(updates):
            if other != place:
                image = update @ factor.T
                conflict += image @ image.T - trade_off * kept[other]
                size += float(image.square().sum() + trade_off * kept[other].trace())
        values, vectors = largest_eigenpairs(conflict, min(count, len(conflict)))
        bases.append(vectors[:, values > RELATIVE_CUTOFF**2 * size])
    return bases


def without_conflicts(updates: list[Tensor], bases: list[Tensor]) -> list[Tensor]:
    """Return the updates without the directions of the other tasks, one task after the other, float64."""
    trimmed = []
    for place, update in enumerate(updates):
        update = update.double()
        for other, basis in enumerate(bases):
            if other != place:
                update = update - basis @ (basis.T @ update)
        trimmed.append(update)
    return trimmed


def without_conflicting_entries(updates: list[Tensor], count: int) -> list[Tensor]:
    """Return vectors without the `count` entries, per other task `k`, that have the largest `Σ_{i≠k} Δ_i²`."""
    masks = torch.ones_like(torch.stack(updates))
    for place in range(len(updates)):
        others = [other for other in range(len(updates)) if other != place]
        squares = sum((updates[other].double().square() for other in others), torch.zeros_like(updates[0]).double())
        largest = squares.topk(min(count, len(squares))).indices
        for other in others:
            masks[other, largest] = 0
    return [mask * update for mask, update in zip(masks, updates, strict=True)]


@dataclass
class CAT(MergeMethod):
    """CAT Merging: the sum of the updates without what conflicts with the other tasks, per kind of weight.

    Of a linear map with statistics, every update loses the directions in which it moves the outputs of the other tasks
    most; of a norm's scale or shift, or a bias, the entries that are largest in the updates of all but one task. Other
    parameters are summed. A task of weight 0 has no part.

    Deviations from the paper: Gram matrices are means over a task's tokens, so that a task with longer texts does not
    count for more. The scales of norms, whose inputs are in no statistics, are masked by the rule of shifts. What is
    removed per task depends on no other removal, as in the paper, but the projections follow each other in the order
    of the tasks. What is left of an update keeps its size; a port of the authors' code brings it back to the norm of
    the whole update. The defaults are not the paper's, but the best of a few on validation rows of language tasks.
    """

    name: ClassVar[str] = "cat"
    papers: ClassVar[tuple[str, ...]] = ("2505.06977",)
    decomposes: ClassVar[bool] = True
    default_alpha: ClassVar[float] = 0.3
    needs_statistics: ClassVar[bool] = True
    keeps_span: ClassVar[bool] = True

    removed: int = field(
        default=3,
        metadata={
            "help": "directions, or entries of vectors, that each task takes out of the other updates",
            "least": 0,
            "search": (1, 64, "log"),
        },
    )
    trade_off: float = field(
        default=1.0,
        metadata={
            "help": "weight of what an update does to its own task, against what it does to another",
            "least": 0,
            "search": (0.0, 5.0, "linear"),
        },
    )

    def merge(self, stack: Stack) -> Merged:
        parts = [place for place, weight in enumerate(stack.weights) if weight]
        updates = [stack.weighted[place] for place in parts]
        if stack.is_matrix and stack.is_calibrated and updates:
            statistics = [stack.statistics[place] for place in parts]
            bases = conflicting_directions(updates, statistics, self.removed, self.trade_off)
            return Merged(torch.stack(without_conflicts(updates, bases)).sum(0).float(), self.name)
        if stack.updates[0].dim() == 1 and updates:
            return Merged(torch.stack(without_conflicting_entries(updates, self.removed)).sum(0), self.name)
        return Merged(weighted_sum(stack), "sum")
