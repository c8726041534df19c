"""What is measured for `pictures="all"` alone: spectra of merged updates, compressed experts by rank, where a router
could decide, and merges of fewer tasks.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..architecture import is_routable, to_matrices
from ..calibration import ActivationStatistics
from ..linalg import essential_subspace
from ..merging import MergedUpdates
from ..planning import MergePlan
from .interference import SHARES
from .summary import Row


RANKS = (1, 4, 16, 64, 256)  # of compressed experts


@dataclass
class RoutesByBlock:
    """How many rows a router would send to their task, if it decided after so many blocks.

    Attributes:
        shares: by tower (`""` in a model without towers) and task, the share of the task's rows, by the number of
            blocks that run before the decision.
        decides_after: by tower, the number of blocks that run before the model's own decision; empty if the model
            decides in every layer.
        rows: number of rows by task.
    """

    shares: dict[str, dict[str, list[float]]]
    decides_after: dict[str, int]
    rows: dict[str, int]

    def errors(self, tower: str) -> list[float]:
        """Return 1.96 standard errors of the mean over tasks, by the number of blocks."""
        by_task = self.shares[tower]
        variances = zip(*([p * (1 - p) / self.rows[t] for p in shares] for t, shares in by_task.items()), strict=True)
        return [1.96 * sum(of_block) ** 0.5 / len(by_task) for of_block in variances]


@dataclass
class Figures:
    """What `pictures="all"` measures besides the rows.

    Attributes:
        experts: score of each task's expert.
        higher_is_better: False for errors, such as perplexity.
        spectra: by label of a static method and name of a linear map, the share of the energy of the merged update's
            output shift at each of `SHARES`; empty without statistics.
        ranks: by rank, the row of experts compressed to it (TSV-C).
        blocks: by label of a method whose router decides, where it could.
        counts: by label of a static method and number of tasks, the row of a merge of the first tasks.
    """

    experts: dict[str, float]
    higher_is_better: bool = True
    spectra: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    ranks: dict[int, Row] = field(default_factory=dict)
    blocks: dict[str, RoutesByBlock] = field(default_factory=dict)
    counts: dict[str, dict[int, Row]] = field(default_factory=dict)

    def share(self, task: str, score: float) -> float:
        """Return a score as a share of the expert's; for errors, the expert's as a share of the score."""
        return score / self.experts[task] if self.higher_is_better else self.experts[task] / score

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as plain data."""
        return {
            "spectra": self.spectra,
            "ranks": {rank: _numbers(row) for rank, row in self.ranks.items()},
            "blocks": {label: asdict(found) for label, found in self.blocks.items()},
            "counts": {label: {n: _numbers(row) for n, row in rows.items()} for label, rows in self.counts.items()},
        }


def _numbers(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in ("tasks", "task_intervals", "normalised", "interval", "alphas")}


def energy_by_rank(factor: Tensor, update: Tensor, ranks: list[int]) -> list[float]:
    """Share of the energy of the output shift `X Δᵀ` that its own leading directions carry, at each rank.

    Args:
        factor: `[m, d_in]`, any matrix with the Gram matrix of the inputs `X`.
        update: `Δ`, `[d_out, d_in]`.
        ranks: numbers of directions.

    Returns:
        Shares in [0, 1]. All are 1 for a shift of zero.
    """
    found = essential_subspace(factor, update, max(ranks))
    if not found.total or not len(found.squares):
        return [1.0] * len(ranks)
    shares = found.squares.cumsum(0) / found.total
    return [min(float(shares[min(rank, len(shares)) - 1]), 1.0) for rank in ranks]


def measure_spectra(
    plan: MergePlan, statistics: Mapping[str, ActivationStatistics], updates: MergedUpdates
) -> dict[str, list[float]]:
    """Return `energy_by_rank` of every merged linear map on the inputs of all tasks, at `SHARES` of its smaller side,
    by the weight's name in the base.
    """
    spectra = {}
    for name in plan.heads.shared:
        linear = plan.base.linear.get(name)
        update = updates.update(name) if is_routable(name, linear) else None
        if update is None or not all(name in known for known in statistics.values()):
            continue
        (matrix,) = to_matrices(update, linear)
        factor = torch.cat([known[name].factor for known in statistics.values()])
        ranks = [max(round(share * min(matrix.shape)), 1) for share in SHARES]
        spectra[plan.base.names[name]] = energy_by_rank(factor, matrix, ranks)
    return spectra
