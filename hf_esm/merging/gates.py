"""What gates multiply: the essential components of every expert's update, or whole updates. How gates are folded."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..architecture import to_matrices
from ..calibration import ActivationStatistics
from ..checkpoints import rank_settings, write_adapter
from ..linalg import essential_subspace
from ..planning import MergePlan, merge_bytes
from ..tuners.essential import EssentialComponentsConfig
from ..utils import atomic_file, gather, roomy, together
from .jobs import Job, run_jobs
from .weights import SMALL, Worker


# Of the decompositions. Gates are trained, so that directions need not be exact.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class ComponentFactors:
    """The essential components of all experts' updates of one linear map, with a gate each.

    Attributes:
        directions: `E [d_out, r]`, float32; those of one task are orthonormal.
        coordinates: `C [r, d_in]`, float32: each direction's share of its own expert's update.
        ranks: number of components of each task, in order. They sum to `r`.
    """

    directions: Tensor
    coordinates: Tensor
    ranks: tuple[int, ...]

    def zero_gates(self) -> Tensor:
        """Return gates `[r]` that change nothing."""
        return self.directions.new_zeros(len(self.coordinates))

    def update(self, gates: Tensor) -> Tensor:
        """Return `E diag(gates) C`, `[d_out, d_in]` float32, from gates `[r]`."""
        return (self.directions * gates.to(self.directions)) @ self.coordinates


@dataclass(frozen=True)
class UpdateFactors:
    """The whole updates of all `T` experts of one linear map, with a coefficient each (Expert Merging, ICLR 2026).

    Attributes:
        updates: `[T, d_out, d_in]`, float32.
    """

    updates: Tensor

    def zero_gates(self) -> Tensor:
        """Return coefficients `[T]` that change nothing."""
        return self.updates.new_zeros(len(self.updates))

    def update(self, gates: Tensor) -> Tensor:
        """Return `Σ_t gates_t Δ_t`, `[d_out, d_in]` float32, from coefficients `[T]`."""
        return torch.tensordot(gates.to(self.updates), self.updates, dims=1)


Factors = ComponentFactors | UpdateFactors


def fold(weight: Tensor, factors: Factors, gates: Tensor, transposed: bool = False) -> Tensor:
    """Return a weight with its gates folded in, float32: `W + E diag(gates) C`, or `W + Σ_t gates_t Δ_t`.

    Args:
        weight: as the model stores it: `[d_out, d_in]`, or `[d_in, d_out]` if `transposed` (`Conv1D`).
    """
    update = factors.update(gates).to(weight.device)
    return weight.float() + (update.T if transposed else update)


@dataclass(frozen=True)
class RefinedWeights:
    """The weights of a refined model.

    Attributes:
        plan: the plan of the merge.
        merged: returns the merged model's weight by canonical name.
        factors: what gates multiply, by canonical name.
        gates: by the same names.
        folded: whether the gates of essential components are in the weights. Otherwise they are an adapter on them.
    """

    plan: MergePlan
    merged: Callable[[str], Tensor]
    factors: Mapping[str, Factors]
    gates: Mapping[str, Tensor]
    folded: bool = True

    def weight(self, name: str) -> Tensor:
        """Return a weight, float32 where gates are folded in."""
        weight, factors = self.merged(name), self.factors.get(name)
        if factors is None or (isinstance(factors, ComponentFactors) and not self.folded):
            return weight
        linear = self.plan.base.linear.get(name)
        return fold(weight, factors, self.gates[name], transposed=linear is not None and linear.transposed)

    def save_adapter(self, folder: Path) -> None:
        """Write the gates of essential components as a PEFT adapter, in a folder that does not exist yet."""
        components = {name: part for name, part in self.factors.items() if isinstance(part, ComponentFactors)}
        write_gates(folder, self.plan, components, self.gates)


def gated_maps(
    plan: MergePlan, statistics: Mapping[str, Optional[ActivationStatistics]], components: int
) -> list[str]:
    """Return the linear maps that get gates, by canonical name, the largest first.

    None of them is an embedding or one of the stacked maps of a mixture's experts, and each is changed by an expert.
    Components need the statistics of every expert.
    """
    maps = []
    for name in plan.heads.shared:
        linear = plan.base.linear.get(name)
        known = not components or all(read is not None and name in read for read in statistics.values())
        if linear is not None and not linear.slices and known and name not in plan.unchanged:
            maps.append(name)
    return sorted(maps, key=lambda name: -prod(plan.base.shape(name)))


def build_gates(
    plan: MergePlan,
    statistics: Mapping[str, Optional[ActivationStatistics]],
    components: int,
    folder: Path,
    accelerator: Accelerator,
    *,
    max_memory: Optional[int] = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Factors]:
    """Return what the gates of each linear map multiply, by canonical name.

    With `components`, every process decomposes its share of the maps and writes it to a file that all read; a file of
    an interrupted run is used again. An expert whose update has a low rank, such as a LoRA adapter, has at most that
    many components. A map whose outputs no expert changes has no gates.

    Args:
        statistics: of every expert, by task.
        components: components per map and task; 0 for whole updates, which take as much memory as all experts.
        folder: for the files.
        max_memory: bytes that decompositions may take; see `planning.merge_bytes`.
    """
    names = gated_maps(plan, statistics, components)
    if not components:
        return {name: UpdateFactors(torch.stack(_updates(plan, name))) for name in progress(names)}
    worker = Worker.of(accelerator, max_memory)
    path = folder / f"gates-{worker.rank}-of-{worker.size}.safetensors"
    with together(accelerator):
        if not path.is_file():
            jobs = [_job(plan, statistics, name, components, worker) for name in worker.share(names)]
            tensors = {}
            for decomposed in run_jobs(jobs, max_memory, progress):
                tensors |= decomposed
            with atomic_file(path) as partial_path:
                save_file(tensors, partial_path)
    paths = gather(accelerator, str(path))
    found = {name: factors for part in paths for name, factors in _read_factors(part).items()}
    return {name: found[name] for name in names if name in found}


def _updates(plan: MergePlan, name: str) -> list[Tensor]:
    """Read the updates of all experts of one linear map, each `[d_out, d_in]` float32."""
    weight, linear = plan.base.tensor(name), plan.base.linear[name]
    return [to_matrices(expert.update(name, weight), linear)[0] for expert in plan.experts.values()]


def _job(
    plan: MergePlan,
    statistics: Mapping[str, Optional[ActivationStatistics]],
    name: str,
    components: int,
    worker: Worker,
) -> Job:
    """Return the job that decomposes the updates of one map."""
    elements, experts = prod(plan.base.shape(name)), len(plan.experts)
    device = roomy(worker.device, merge_bytes(elements, experts))

    def decompose(updates: list[Tensor]) -> dict[str, Tensor]:
        factors = [statistics[task][name].factor for task in plan.experts]
        return _decomposed(name, [u.to(device) for u in updates], [f.to(device) for f in factors], components)

    return Job(
        read=partial(_updates, plan, name),
        compute=decompose,
        input_bytes=4 * experts * elements,
        total_bytes=merge_bytes(elements, experts),
        alone=elements > SMALL or worker.one_by_one,
    )


def _decomposed(name: str, updates: list[Tensor], factors: list[Tensor], components: int) -> dict[str, Tensor]:
    """Return the tensors of one map for the file, on the CPU; none if no expert changes the map's outputs."""
    directions, coordinates = [], []
    for update, factor in zip(updates, factors, strict=True):
        basis = essential_subspace(factor, update, components, tolerance=TOLERANCE).directions
        directions.append(basis.float())
        coordinates.append((basis.T @ update.to(basis.dtype)).float())
    ranks = torch.tensor([len(rows) for rows in coordinates])
    if not ranks.any():
        return {}
    tensors = {"E": torch.cat(directions, dim=1), "C": torch.cat(coordinates), "ranks": ranks}
    return {f"{name}/{part}": tensor.cpu().contiguous() for part, tensor in tensors.items()}


def _read_factors(path: str) -> dict[str, ComponentFactors]:
    """Return the factors in one process's file, by canonical name."""
    with safe_open(path, "pt") as file:
        names = [key.removesuffix("/ranks") for key in file.keys() if key.endswith("/ranks")]
        return {
            name: ComponentFactors(
                file.get_tensor(f"{name}/E"),
                file.get_tensor(f"{name}/C"),
                tuple(file.get_tensor(f"{name}/ranks").tolist()),
            )
            for name in names
        }


def adapter_config(
    factors: Mapping[str, ComponentFactors], tasks: Iterable[str], **settings: Any
) -> EssentialComponentsConfig:
    """Return the configuration of the adapter of gates.

    Args:
        factors: by the full name of the module.
        tasks: tasks of the components, in order.
        settings: other fields of the configuration.
    """
    rank, pattern = rank_settings({module: len(part.coordinates) for module, part in factors.items()})
    return EssentialComponentsConfig(
        r=rank,
        rank_pattern=pattern,
        target_modules=list(factors),
        gates=True,
        tasks=list(tasks),
        task_ranks={f"^{m}": list(part.ranks) for m, part in factors.items() if len(set(part.ranks)) > 1},
        **settings,
    )


def write_gates(
    output: Path, plan: MergePlan, factors: Mapping[str, ComponentFactors], gates: Mapping[str, Tensor]
) -> None:
    """Write gates as a PEFT adapter over the merged model, in a folder that does not exist yet.

    Args:
        factors: by the canonical name of the weight, as `build_gates` returns them.
        gates: `[r]` by the same names.
    """
    modules = {name: plan.base.linear[name].module for name in factors}
    config = adapter_config({modules[n]: part for n, part in factors.items()}, plan.experts, inference_mode=True)
    tensors = {}
    for name, part in factors.items():
        values = {"E": part.directions, "C": part.coordinates, "gates": gates[name]}
        tensors |= {f"{modules[name]}.essential_components_{kind}": value for kind, value in values.items()}
    write_adapter(output, config, tensors, type(plan.base.skeleton))
