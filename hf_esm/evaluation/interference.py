"""How much the experts of a merge are in each other's way, layer by layer, before any method has been chosen."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from ..architecture import is_routable, to_matrices
from ..calibration import ActivationStatistics
from ..errors import HfEsmError
from ..linalg import essential_subspace, truncated_svd
from ..methods import InputStatistics
from ..planning import MergePlan


def singular_task_interference(deltas: list[Tensor]) -> float:
    """STI of one matrix (*Task Singular Vectors*, arXiv 2412.00081): `‖(UᵀU − I) Σ (VᵀV − I)‖₁`, the sum of absolute
    entries, of the leading `⌊min(d)/T⌋` singular triplets of `T` updates `[d_out, d_in]`, stacked. 0 if the tasks'
    singular vectors are orthogonal.
    """
    rank = max(min(deltas[0].shape) // len(deltas), 1)
    triplets = [truncated_svd(delta, rank) for delta in deltas if delta.any()]
    if not triplets:
        return 0.0
    left = torch.cat([u for u, _, _ in triplets], dim=1)
    right = torch.cat([vh for _, _, vh in triplets])
    values = torch.cat([s for _, s, _ in triplets])
    eye = torch.eye(len(values), dtype=torch.float64)
    return float((((left.T @ left - eye) * values) @ (right @ right.T - eye)).abs().sum())


def subspace_overlap(bases: list[Tensor]) -> Tensor:
    """`‖E_sᵀ E_t‖²_F / min(r_s, r_t)` of every two tasks: the share of one's subspace that lies in the other's.

    Args:
        bases: per task, orthonormal columns `[d_out, r_t]`.

    Returns `[T, T]` float64 in [0, 1]; two random subspaces overlap by `r / d_out`.
    """
    found = torch.zeros(len(bases), len(bases), dtype=torch.float64)
    for s, one in enumerate(bases):
        for t, other in enumerate(bases):
            smaller = min(one.shape[1], other.shape[1])
            found[s, t] = (one.T @ other).square().sum() / smaller if smaller else 0.0
    return found


def energy_kept(delta: Tensor, inputs: InputStatistics, ranks: list[int]) -> tuple[list[float], list[float]]:
    """Share of the output shift `X Δᵀ` that is kept by the leading essential directions, and by the leading left
    singular vectors of `Δ`, at each rank. Both are 1 for a shift of zero.
    """
    shift = inputs.factor.double() @ delta.double().T
    total = shift.square().sum()
    if total == 0:
        return [1.0] * len(ranks), [1.0] * len(ranks)
    essential = essential_subspace(inputs.factor, delta, max(ranks)).directions
    singular, _, _ = truncated_svd(delta, max(ranks))
    kept = []
    for directions in (essential, singular):
        energies = (shift @ directions).square().sum(0).cumsum(0) / total
        kept.append([float(energies[min(rank, len(energies)) - 1]) if len(energies) else 0.0 for rank in ranks])
    return kept[0], kept[1]


@dataclass
class LayerInterference:
    """Of one linear map.

    Attributes:
        name: the weight's name in the base model.
        sti: singular task interference.
        overlap: `[T, T]`, of the tasks' subspaces of rank `⌊min(d)/T⌋`: essential ones, or, without statistics, of
            left singular vectors.
        ranks: where the energies are given.
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
    """Of a whole merge.

    Attributes:
        tasks: in the order of the overlaps.
        layers: of every linear map that is merged, those of a mixture's experts left out.
    """

    tasks: list[str]
    layers: list[LayerInterference]

    @property
    def sti(self) -> float:
        """Mean over layers; 0 where there are none."""
        return sum(layer.sti for layer in self.layers) / max(len(self.layers), 1)

    @property
    def overlap(self) -> list[list[float]]:
        """`[T, T]`, mean over layers; of zeros where there are none."""
        if not self.layers:
            return torch.zeros(len(self.tasks), len(self.tasks)).tolist()
        return torch.tensor([layer.overlap for layer in self.layers]).mean(0).tolist()

    def energy(self) -> dict[str, list[tuple[float, float]]]:
        """Mean over layers and tasks of the energy kept, as pairs of rank (as a share of `min(d)`) and energy, of
        `"essential"` and of `"singular"` directions. Empty without statistics.
        """
        found: dict[str, list[tuple[float, float]]] = {}
        for kind in ("essential", "singular"):
            rows = [values for layer in self.layers for values in getattr(layer, f"{kind}_energy").values()]
            if rows:
                found[kind] = list(zip(SHARES, torch.tensor(rows).mean(0).tolist(), strict=True))
        return found

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
        """What `as_dict` gave."""
        return cls(stored["tasks"], [LayerInterference(**layer) for layer in stored["layers"]])


# Ranks at which energies are given, as shares of a matrix's smaller side.
SHARES = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


def measure_interference(
    plan: MergePlan,
    statistics: Mapping[str, Optional[ActivationStatistics]],
    progress: Callable[[Iterable], Iterable] = iter,
) -> Interference:
    """Interference between the experts of a merge.

    Args:
        plan: `MergeResult.plan` of any merge of them.
        statistics: by task, as `calibrate` gave them or `ActivationStatistics.load` reads them from `statistics_dir`;
            None where there are none.

    Memory: one weight of every expert at a time.
    """
    if unknown := statistics.keys() - plan.experts.keys():
        there = ", ".join(plan.experts)
        raise HfEsmError(f"There are statistics of {sorted(unknown)[0]!r}, which is no expert; there are {there}.")
    statistics = {task: statistics.get(task) for task in plan.experts}
    layers = []
    names = [name for name in plan.heads.shared if is_routable(name, plan.base.linear.get(name))]
    for name in progress(names):
        linear, weight = plan.base.linear[name], plan.base.tensor(name)
        deltas = [to_matrices(expert.update(name, weight), linear)[0] for expert in plan.experts.values()]
        known = [found[name] if found is not None and name in found else None for found in statistics.values()]
        calibrated = len(known) == len(deltas) and all(inputs is not None for inputs in known)
        side = min(deltas[0].shape)
        rank, ranks = max(side // len(deltas), 1), [max(round(share * side), 1) for share in SHARES]
        essential, singular = {}, {}
        if calibrated:
            bases = [essential_subspace(i.factor, d, rank).directions for d, i in zip(deltas, known, strict=True)]
            for task, delta, inputs in zip(plan.experts, deltas, known, strict=True):
                essential[task], singular[task] = energy_kept(delta, inputs, ranks)
        else:
            bases = [truncated_svd(delta, rank)[0] for delta in deltas]
        sti, overlap = singular_task_interference(deltas), subspace_overlap(bases).tolist()
        layers.append(LayerInterference(plan.base.names[name], sti, overlap, ranks, essential, singular))
    return Interference(list(plan.experts), layers)
