"""Pass one of a merge: every weight of all experts is merged, one at a time, into scratch files."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Optional, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from ..architecture import (
    block_depths,
    depth_of,
    from_matrices,
    is_routable,
    layer_type,
    matrix_names,
    to_matrices,
)
from ..calibration import ActivationStatistics
from ..checkpoints import ShardedWriter
from ..linalg import norm
from ..methods import Merged, MergeMethod, Stack, WholeUpdates, buffer_stack, mean_update, merge_embedding
from ..planning import MergePlan, merge_bytes
from ..utils import algebra_device, fast_products, roomy
from .jobs import Job, run_jobs
from .journal import Journal, checksum
from .spans import rank_of, span_of
from .updates import WeightReport


Item = TypeVar("Item")


# Elements of a weight below which several weights are merged in parallel.
SMALL = 4_000_000


@dataclass(frozen=True)
class Worker:
    """One process's share of the work, and where it computes.

    Attributes:
        rank: index of the process.
        size: number of processes.
        device: where methods compute, as far as the device's memory goes; None is the CPU.
        max_memory: bytes that the weights being read and merged may take; see `planning.merge_bytes`.
    """

    rank: int = 0
    size: int = 1
    device: Optional[torch.device] = None
    max_memory: Optional[int] = None

    @classmethod
    def of(cls, accelerator: Accelerator, max_memory: Optional[int] = None) -> "Worker":
        """Return the worker of this process."""
        return cls(accelerator.process_index, accelerator.num_processes, algebra_device(accelerator), max_memory)

    def share(self, items: list[Item]) -> list[Item]:
        """Return this process's share of the items."""
        return items[self.rank :: self.size]

    @property
    def one_by_one(self) -> bool:
        """Whether jobs never run in parallel: a GPU does one thing at a time, in its own memory."""
        return self.device is not None and self.device.type != "cpu"


def whole_updates(
    plan: MergePlan,
    statistics: Mapping[str, Optional[ActivationStatistics]],
    learn_mask: Callable[[], Any],
    progress: Callable[[Iterable], Iterable],
    in_factors: bool = False,
) -> WholeUpdates:
    """Return the updates of all experts of a merge, as `MergeMethod.prepare` reads them."""
    names = [name for name in plan.heads.shared if name in plan.base.trained]

    def read(task: str) -> Iterator[Tensor]:
        return (plan.experts[task].update(name, plan.base.tensor(name)) for name in names)

    def stacks() -> Iterator[Stack]:
        merger = (FactorMerger if in_factors else UnitMerger)(plan, statistics, {}, Worker())
        return (stack for name in names if name not in plan.unchanged for stack in merger.stacks_of(name))

    return WholeUpdates(tuple(plan.experts), read, stacks, learn_mask, progress)


def merge_weights(
    plan: MergePlan,
    statistics: Mapping[str, Optional[ActivationStatistics]],
    scratch: Path,
    *,
    worker: Worker = Worker(),
    thresholds: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    resumable: bool = False,
    in_factors: bool = False,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, WeightReport]:
    """Merge this process's share of the weights, one at a time, into a scratch file.

    Args:
        thresholds: by the methods' `repr`, as `MergeMethod.prepare` returned them.
        in_factors: merge inside the span of the experts' factors, which all experts and methods must allow; what is
            written of a matrix is `K [s, d_in]` (see `spans.Span`), and no weight of the base is read.
        resumable: keep a journal of the merged weights in `scratch`, and skip those that it lists.

    Returns the report of every weight of the share, and of every weight that no expert changes.
    """
    units = merge_units(plan, statistics)
    unchanged = [unit for unit in units if plan.unchanged.issuperset(unit)]
    share = worker.share([unit for unit in units if not plan.unchanged.issuperset(unit)])
    merger = (FactorMerger if in_factors else UnitMerger)(plan, statistics, thresholds, worker)
    shapes = {name: torch.empty(merger.shape(name), device="meta") for unit in share for name in unit}
    journal = Journal(scratch / f"updates-{worker.rank}.journal")
    reports = journal.read() if resumable else {}
    jobs = [merger.job(unit) for unit in share if unit[0] not in reports]
    with (
        ShardedWriter(scratch, shapes, max_shard_size=2**62, stem=journal.path.stem, written=reports) as writer,
        fast_products(min(method.tolerance for method in plan.methods)),
    ):
        for merged in run_jobs(jobs, worker.max_memory, progress):
            for name, (update, _) in merged.items():
                writer.write(name, update)
            new = {name: report for name, (_, report) in merged.items()}
            reports |= new
            if resumable:
                writer.sync()  # the journal names only weights that are on the disk
                journal.append(new, {name: checksum(update) for name, (update, _) in merged.items()})
    return reports | {name: report_unchanged(plan, name) for unit in unchanged for name in unit}


def report_unchanged(plan: MergePlan, name: str) -> WeightReport:
    """Return the report of a weight that no expert changes."""
    known = {"kind": plan.weight_kinds.get(name, ""), "update_norms": dict.fromkeys(plan.experts, 0.0)}
    return WeightReport(plan.base.names[name], "unchanged", 0.0, scaled=False, **known)


def merge_units(plan: MergePlan, statistics: Mapping[str, Optional[ActivationStatistics]]) -> list[list[str]]:
    """Return the weights to merge: singly, or several as one unit if the method stacks maps that read one tensor.

    A stack consists of three or more maps of one module that share their statistics in every expert (q, k and v of an
    attention module; not the two maps of a gated MLP) and are merged alike. Large units come first, so that processes
    finish together.
    """
    shared = [name for name in plan.heads.shared if plan.base.dtype(name).is_floating_point]
    groups: dict[Any, list[str]] = defaultdict(list)
    known = all(s is not None for s in statistics.values())
    for name in shared:
        linear, rule = plan.base.linear.get(name), plan.rule_of(name)
        stacking = known and rule.method.stacks_shared_inputs
        if stacking and linear is not None and not linear.slices and all(name in s for s in statistics.values()):
            parent = linear.module.rpartition(".")[0]
            groups[(parent, repr(rule), *(s.keys_of[name] for s in statistics.values()))].append(name)
        else:
            groups[name].append(name)
    units = [unit for group in groups.values() for unit in ([group] if len(group) > 2 else [[name] for name in group])]
    return sorted(units, key=lambda unit: -_elements(plan, unit))


def _elements(plan: MergePlan, unit: list[str]) -> int:
    return sum(math.prod(plan.base.shape(name)) for name in unit)


class UnitMerger:
    """Merges units: single weights of all experts, or several that are stacked along the output dimension."""

    def __init__(
        self,
        plan: MergePlan,
        statistics: Mapping[str, Optional[ActivationStatistics]],
        thresholds: Mapping[str, Sequence[Any]],
        worker: Worker,
    ):
        self.plan, self.statistics, self.thresholds, self.worker = plan, statistics, thresholds, worker
        self.depths = block_depths(plan.base.skeleton)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight's merged update, as it is written."""
        return self.plan.base.shape(name)

    def elements(self, unit: list[str]) -> int:
        """Return the number of elements of a unit's merged update, as it is written."""
        return sum(math.prod(self.shape(name)) for name in unit)

    def job(self, unit: list[str]) -> Job:
        """Return the job that reads and merges a unit, with the result of `merge`."""
        elements, experts = self.elements(unit), len(self.plan.experts)
        return Job(
            read=partial(self.read, unit),
            compute=partial(self.merge, unit),
            input_bytes=4 * experts * elements,
            total_bytes=merge_bytes(elements, experts),
            alone=elements > SMALL or self.worker.one_by_one,
        )

    def read(self, unit: list[str]) -> list[list[Tensor]]:
        """Return the updates of a unit, by weight and expert."""
        weights = {name: self.plan.base.tensor(name) for name in unit}
        return [
            [expert.update(name, weight) for expert in self.plan.experts.values()] for name, weight in weights.items()
        ]

    def merge(self, unit: list[str], updates: list[list[Tensor]]) -> dict[str, tuple[Tensor, WeightReport]]:
        """Return the merged update and the report of each weight of a unit, by name."""
        matrices, device = self.matrices(unit, updates)
        return self.merge_matrices(unit, matrices, device, norms_of(matrices))

    def merge_matrices(
        self,
        unit: list[str],
        matrices: Mapping[str, list[Tensor]],
        device: Optional[torch.device],
        norms: dict[str, float],
    ) -> dict[str, tuple[Tensor, WeightReport]]:
        """Return the same of matrices on their device (see `matrices`), with the norm of each expert's update."""
        base, linear = self.plan.base, self.plan.base.linear.get(unit[0])
        merged = [self._merge_stack(stack, unit[0]) for stack in self._stacks(unit, matrices, device)]
        report = replace(self._report(unit, merged, matrices), update_norms=norms)
        if len(unit) > 1:
            heights = [self.shape(name)[1 if linear.transposed else 0] for name in unit]
            parts = [[part] for part in merged[0].update.split(heights)]
        else:
            parts = [[part.update for part in merged]]
        return {
            name: (from_matrices(own_parts, linear).cpu(), replace(report, name=base.names[name]))
            for name, own_parts in zip(unit, parts, strict=True)
        }

    def matrices(
        self, unit: list[str], updates: list[list[Tensor]]
    ) -> tuple[dict[str, list[Tensor]], Optional[torch.device]]:
        """Return the matrices of a unit's updates by task, and the device that they are on."""
        linear = self.plan.base.linear.get(unit[0])
        device = roomy(self.worker.device, merge_bytes(self.elements(unit), len(self.plan.experts)))
        by_task = zip(self.plan.experts, zip(*updates, strict=True), strict=True)
        return {task: _matrices(weights, linear, device) for task, weights in by_task}, device

    def stacks_of(self, name: str) -> Iterator[Stack]:
        """Read one weight of all experts, as the stacks that it is merged as by itself."""
        return self._stacks([name], *self.matrices([name], self.read([name])))

    def _merge_stack(self, stack: Stack, name: str) -> Merged:
        """Merge one matrix or other parameter by the rule of its kind."""
        if name not in self.plan.base.trained:
            # Running means and variances are averages: beyond those of the experts, a variance may be negative.
            return mean_update(buffer_stack(stack), scaled=False)
        rule = self.plan.rule_of(name)
        counted = stack.is_embedding and rule.method.counts_embeddings and not rule.overridden
        return merge_embedding(stack) if counted else rule.method.merge(stack)

    def _stacks(
        self, unit: list[str], matrices: Mapping[str, list[Tensor]], device: Optional[torch.device]
    ) -> Iterator[Stack]:
        """Yield a stack for each matrix of a unit."""
        base, linear, rule = self.plan.base, self.plan.base.linear.get(unit[0]), self.plan.rule_of(unit[0])
        read_base = cache(lambda: _matrices([base.tensor(name).float() for name in unit], linear, device))
        names = matrix_names(unit[0], linear) if linear else unit[:1]
        for part, (name, *updates) in enumerate(zip(names, *matrices.values(), strict=True)):
            yield Stack(
                name=base.names[unit[0]],
                part=part,
                layer_type=layer_type(unit[0]),
                updates=updates,
                is_linear=linear is not None,
                is_embedding=unit[0] in base.embeddings,
                routable=is_routable(unit[0], linear),
                statistics=[
                    known[name].to(device) if linear and known and name in known else None
                    for known in self.statistics.values()
                ],
                counts=self._counts(unit[0], device),
                thresholds=list(self.thresholds.get(repr(rule.method), ())),
                weights=list(rule.weights),
                depth=depth_of(base.names[unit[0]], self.depths),
                read_base=lambda part=part: read_base()[part],
            )

    def _counts(self, name: str, device: Optional[torch.device]) -> list[Tensor]:
        """Return how often each expert's samples read each row of an embedding; empty unless all are known."""
        counted = []
        for expert, statistics in zip(self.plan.experts.values(), self.statistics.values(), strict=True):
            counts = statistics.token_counts.get(name) if statistics is not None else None
            if counts is None:
                return []
            counted.append(expert.counts_of_rows(name, counts).to(device))
        return counted

    def _report(self, unit: list[str], merged: list[Merged], matrices: Mapping[str, list[Tensor]]) -> WeightReport:
        """Return the report of a unit, still without a name and norms of updates."""
        name = unit[0]
        rule, trained = self.plan.rule_of(name), name in self.plan.base.trained  # α never scales a buffer
        energies = [part.info["energy_kept"] for part in merged if "energy_kept" in part.info]
        mean_energies = [sum(of_expert) / len(energies) for of_expert in zip(*energies, strict=True)]
        return WeightReport(
            name="",
            how=" and ".join(sorted({part.how for part in merged})),
            norm=_norm([part.update for part in merged]),
            scaled=merged[0].scaled,
            kind=self.plan.weight_kinds.get(name, ""),
            alpha=rule.alpha if trained else None,
            method_alpha=rule.method.default_alpha if rule.overridden else None,
            energy_kept=dict(zip(self.plan.experts, mean_energies, strict=True)) if energies else {},
            magnitudes=self._magnitudes(unit, merged, matrices) if self.plan.lines and trained else (),
        )

    def _magnitudes(
        self, unit: list[str], merged: list[Merged], matrices: Mapping[str, list[Tensor]]
    ) -> tuple[float, ...]:
        """Return the sums of the absolute entries of a unit's merged update, and of the sum of its updates, as equal
        shares of its weights.
        """
        weights = self.plan.rule_of(unit[0]).weights
        by_part = zip(*matrices.values(), strict=True)
        sums = [sum(w * update for w, update in zip(weights, part, strict=True)) for part in by_part]
        sides = [part.update for part in merged], sums
        norms = [math.fsum(float(self._whole(unit, part).abs().sum()) for part in side) for side in sides]
        return tuple(size / len(unit) for size in norms)

    def _whole(self, unit: list[str], matrix: Tensor) -> Tensor:
        """Return a unit's update from what is merged of it."""
        return matrix


class FactorMerger(UnitMerger):
    """Merges matrices inside the span of the experts' factors: `Q K_t` are merged as the `K_t`."""

    def shape(self, name: str) -> tuple[int, ...]:
        linear, experts = self.plan.base.linear[name], self.plan.experts.values()
        rows, columns = to_matrices(torch.empty(self.plan.base.shape(name), device="meta"), linear)[0].shape
        size = min(rows, rank_of(experts, name))
        return (columns, size) if linear.transposed else (size, columns)

    def read(self, unit: list[str]) -> list[list[Tensor]]:
        experts, linear = self.plan.experts, self.plan.base.linear
        return [[from_matrices([core], linear[name]) for core in span_of(experts, name).cores] for name in unit]

    def _stacks(
        self, unit: list[str], matrices: Mapping[str, list[Tensor]], device: Optional[torch.device]
    ) -> Iterator[Stack]:
        base = self.plan.base
        rows = sum(base.shape(name)[1 if base.linear[name].transposed else 0] for name in unit)
        return (replace(stack, num_outputs=rows) for stack in super()._stacks(unit, matrices, device))

    def _whole(self, unit: list[str], matrix: Tensor) -> Tensor:
        bases = [span_of(self.plan.experts, name).basis.float() for name in unit]
        cores = matrix.split([basis.shape[1] for basis in bases])
        return torch.cat([basis @ core for basis, core in zip(bases, cores, strict=True)])


def _matrices(weights: Sequence[Tensor], linear: Any, device: Optional[torch.device]) -> list[Tensor]:
    """Return the matrices of one weight on a device, or one matrix of several weights, stacked along the output."""
    parts = [to_matrices(weight.to(device), linear) for weight in weights]
    return [torch.cat([part for (part,) in parts])] if len(weights) > 1 else parts[0]


def norms_of(matrices: Mapping[str, list[Tensor]]) -> dict[str, float]:
    """Return the Frobenius norm of each expert's update of a unit, by task."""
    return {task: _norm(parts) for task, parts in matrices.items()}


def _norm(parts: list[Tensor]) -> float:
    """Frobenius norm of several tensors together."""
    return math.hypot(*(float(norm(part)) for part in parts))


def scale_layers(reports: Mapping[str, WeightReport], matrices: Mapping[str, MergeMethod]) -> None:
    """Set the scale between layers of each report: `(‖Δ_M‖ / mean ‖Δ_M‖)^exponent` over the matrices of one type that
    one method merged.

    Args:
        matrices: the method of every matrix, by name.
    """
    types: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, method in matrices.items():
        if method.layer_exponent:
            types[layer_type(name), repr(method)].append(name)
    for names in types.values():
        mean, exponent = sum(reports[name].norm for name in names) / len(names), matrices[names[0]].layer_exponent
        for name in names:
            reports[name].layer_scale = (reports[name].norm / mean) ** exponent if mean > 0 else 1.0
