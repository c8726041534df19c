"""Interference between the experts of a merge, layer by layer, before any method is chosen."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from ..architecture import is_routable, to_matrices
from ..calibration import ActivationStatistics
from ..linalg import essential_subspace, truncated_svd
from ..methods import InputStatistics
from ..planning import MergePlan
from ..utils import check_known


def singular_task_interference(updates: list[Tensor]) -> float:
    """Singular task interference (STI) of one linear map: `‖(UᵀU − I) Σ (VᵀV − I)‖₁`, the sum of absolute entries.

    `U`, `Σ` and `V` hold the leading `⌊min(d)/T⌋` singular triplets of every update, side by side (*Task Singular
    Vectors*, arXiv 2412.00081). 0 if the singular vectors of the tasks are orthogonal.

    Args:
        updates: `T` updates `[d_out, d_in]`.
    """
    rank = max(min(updates[0].shape) // len(updates), 1)
    triplets = [truncated_svd(update, rank) for update in updates if update.any()]
    if not triplets:
        return 0.0
    left = torch.cat([u for u, _, _ in triplets], dim=1)
    right = torch.cat([vh for _, _, vh in triplets])
    values = torch.cat([s for _, s, _ in triplets])
    eye = torch.eye(len(values), dtype=torch.float64)
    return float((((left.T @ left - eye) * values) @ (right @ right.T - eye)).abs().sum())


def subspace_overlap(bases: list[Tensor]) -> Tensor:
    """Overlap of every two subspaces, `‖E_sᵀ E_t‖²_F / min(r_s, r_t)`: the share of one that lies in the other.

    Args:
        bases: per task, orthonormal columns `[d_out, r_t]`.

    Returns:
        `[T, T]` float64 in [0, 1]. Two random subspaces of rank `r` overlap by about `r / d_out`.
    """
    overlap = torch.zeros(len(bases), len(bases), dtype=torch.float64)
    for s, first in enumerate(bases):
        for t, second in enumerate(bases):
            smaller = min(first.shape[1], second.shape[1])
            overlap[s, t] = (first.T @ second).square().sum() / smaller if smaller else 0.0
    return overlap


def energy_kept(update: Tensor, inputs: InputStatistics, ranks: list[int]) -> tuple[list[float], list[float]]:
    """Share of the energy of the output shift `X Δᵀ` that the leading directions carry, at each rank.

    Args:
        update: `Δ`, `[d_out, d_in]`.
        inputs: statistics of the inputs `X`.
        ranks: numbers of directions.

    Returns:
        Shares of the essential directions, and of the left singular vectors of `Δ`. All are 1 for a shift of zero.
    """
    shift = inputs.factor.double() @ update.double().T
    total = shift.square().sum()
    if total == 0:
        return [1.0] * len(ranks), [1.0] * len(ranks)
    essential = essential_subspace(inputs.factor, update, max(ranks)).directions
    singular, _, _ = truncated_svd(update, max(ranks))
    shares = []
    for directions in (essential, singular):
        energies = (shift @ directions).square().sum(0).cumsum(0) / total
        shares.append([float(energies[min(rank, len(energies)) - 1]) if len(energies) else 0.0 for rank in ranks])
    return shares[0], shares[1]


@dataclass
class LayerInterference:
    """Interference in one linear map.

    Attributes:
        name: name of the weight in the base model.
        sti: singular task interference.
        overlap: `[T, T]`, overlap of the tasks' subspaces of rank `⌊min(d)/T⌋`: essential subspaces, or, without
            statistics, left singular ones.
        ranks: ranks of the energies.
        essential_energy, singular_energy: per task, the share of the output shift that is kept at each rank; empty
            without statistics.
    """

    name: str
    sti: float
    overlap: list[list[float]]
    ranks: list[int]
    essential_energy: dict[str, list[float]]
    singular_energy: dict[str, list[float]]


@dataclass
class Interference:
    """Interference between the experts of a merge.

    Attributes:
        tasks: tasks in the order of the overlaps.
        layers: interference in every merged linear map, without those of a mixture's experts.
    """

    tasks: list[str]
    layers: list[LayerInterference]

    @property
    def sti(self) -> float:
        """Mean over layers; 0 without layers."""
        return sum(layer.sti for layer in self.layers) / max(len(self.layers), 1)

    @property
    def overlap(self) -> list[list[float]]:
        """`[T, T]`, mean over layers; zeros without layers."""
        if not self.layers:
            return torch.zeros(len(self.tasks), len(self.tasks)).tolist()
        return torch.tensor([layer.overlap for layer in self.layers]).mean(0).tolist()

    def energy(self) -> dict[str, list[tuple[float, float]]]:
        """Energy kept by `"essential"` and by `"singular"` directions, mean over layers and tasks.

        Pairs of a rank, as a share of `min(d)`, and the energy at that rank. Empty without statistics.
        """
        energies: dict[str, list[tuple[float, float]]] = {}
        for kind in ("essential", "singular"):
            rows = [values for layer in self.layers for values in getattr(layer, f"{kind}_energy").values()]
            if rows:
                energies[kind] = list(zip(SHARES, torch.tensor(rows).mean(0).tolist(), strict=True))
        return energies

    def as_dict(self) -> dict[str, Any]:
        return {
            "sti": self.sti,
            "overlap": self.overlap,
            "energy": self.energy(),
            "tasks": self.tasks,
            "layers": [asdict(layer) for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Interference":
        """Interference from what `as_dict` returned."""
        return cls(stored["tasks"], [LayerInterference(**layer) for layer in stored["layers"]])

    def __repr__(self) -> str:
        return f"Interference({', '.join(self.tasks)}; STI {self.sti:.3g} over {len(self.layers)} linear maps)"


# Ranks of the energies, as shares of a matrix's smaller side.
SHARES = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


def measure_interference(
    plan: MergePlan,
    statistics: Mapping[str, Optional[ActivationStatistics]],
    progress: Callable[[Iterable], Iterable] = iter,
) -> Interference:
    """Measure the interference between the experts of a merge.

    Needs memory for one weight of every expert at a time.

    Args:
        plan: `MergeResult.plan` of any merge of the experts.
        statistics: by task, what `calibrate` returned or `ActivationStatistics.load` reads from `statistics_dir`; None
            for experts without.
        progress: wraps the iteration over the linear maps, such as `tqdm`.

    Raises:
        HfEsmError: if `statistics` names a task that is not in the plan.
    """
    check_known(statistics, plan.experts, "expert", "`statistics`")
    names = [name for name in plan.heads.shared if is_routable(name, plan.base.linear.get(name))]
    layers = [_layer_interference(plan, name, statistics) for name in progress(names)]
    return Interference(list(plan.experts), layers)


def _layer_interference(
    plan: MergePlan, name: str, statistics: Mapping[str, Optional[ActivationStatistics]]
) -> LayerInterference:
    linear, weight = plan.base.linear[name], plan.base.tensor(name)
    updates = {task: to_matrices(e.update(name, weight), linear)[0] for task, e in plan.experts.items()}
    inputs = {task: statistics[task][name] for task in updates if _has_inputs(statistics.get(task), name)}
    side = min(next(iter(updates.values())).shape)
    rank, ranks = max(side // len(updates), 1), [max(round(share * side), 1) for share in SHARES]
    essential, singular = {}, {}
    if len(inputs) == len(updates):
        bases = [essential_subspace(inputs[t].factor, update, rank).directions for t, update in updates.items()]
        for task, update in updates.items():
            essential[task], singular[task] = energy_kept(update, inputs[task], ranks)
    else:
        bases = [truncated_svd(update, rank)[0] for update in updates.values()]
    sti, overlap = singular_task_interference(list(updates.values())), subspace_overlap(bases).tolist()
    return LayerInterference(plan.base.names[name], sti, overlap, ranks, essential, singular)


def _has_inputs(statistics: Optional[ActivationStatistics], name: str) -> bool:
    return statistics is not None and name in statistics
