"""A merge in one pass: each weight is read, checked, merged, scaled and written before the next one."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..planning import MergePlan, check_finite, check_heads, differs, note_changed
from ..utils import fast_products
from .depth import scale_by_depth
from .jobs import Job, run_jobs
from .output import ModelWriter
from .updates import WeightReport, updated
from .weights import UnitMerger, Worker, merge_units, norms_of, report_unchanged


# Norm of an update up to which the expert's weight has a norm that float32 holds, if the base's has one.
_SAFE = 1e18


@dataclass(frozen=True)
class OnePass:
    """A merge of all weights into the output, whose scales are known before.

    Attributes:
        plan: the plan. What no expert changes is noted in it at the end, unless the weights were checked before.
        writer: writes the weights.
        alpha: scale of the updates.
        by_kind: other scales of some kinds of weights.
        worker: where methods compute.
        thresholds: see `merge_weights`.
        checked: whether the weights were read and checked before.
    """

    plan: MergePlan
    writer: ModelWriter
    alpha: float
    by_kind: Mapping[str, float]
    worker: Worker
    thresholds: Mapping[str, Sequence[Any]]
    checked: bool
    _rooms: list[Tensor] = field(default_factory=list)

    def run(
        self, statistics: Mapping[str, Any], progress: Callable[[Iterable], Iterable] = iter
    ) -> dict[str, WeightReport]:
        """Merge and write; return the report of every merged weight, and of every weight that no expert changes.

        Raises:
            HfEsmError: if a weight is not finite or too large for float16, or an expert equals the base in every
                merged weight.
        """
        plan = self.plan
        changed: dict[str, set[str]] = {task: set() for task in plan.experts}
        merger = UnitMerger(plan, statistics, self.thresholds, self.worker)
        names = [name for (name,) in merge_units(plan, statistics)]
        reports = {name: report_unchanged(plan, name) for name in names if name in plan.unchanged}
        merged = self._in_groups([name for name in names if name not in plan.unchanged])
        if not self.checked:
            check_heads(plan)
        with fast_products(min(method.tolerance for method in plan.methods)):
            jobs = [self._job(merger, name) for name in merged]
            for name, weight, report in run_jobs(jobs, self.worker.max_memory, progress):
                self.writer.write(name, weight)
                reports[name] = report
                for task, norm in report.update_norms.items():
                    changed[task].update([name] if norm else [])
        for name in [name for name in self.writer.names if name not in set(merged)]:
            self.writer.write(name, weight := plan.base.tensor(name))
            if not self.checked and name in plan.heads.shared:
                check_finite(weight, plan.base, name)
                for task, expert in plan.experts.items():
                    changed[task].update([name] if expert.changes(name) and differs(expert, name, weight) else [])
        if not self.checked:
            note_changed(plan, changed)
        return reports

    def _in_groups(self, names: list[str]) -> list[str]:
        """Return weights in their order, but those that are written together one after the other."""
        places: dict[str, int] = {}
        for place, name in enumerate(names):
            places.setdefault(self.writer.first_of(name), place)
        return sorted(names, key=lambda name: places[self.writer.first_of(name)])

    def _job(self, merger: UnitMerger, name: str) -> Job:
        """Return the job that reads a weight, and makes the weight that is written and its report."""
        base, experts = self.plan.base, self.plan.experts

        def read() -> tuple[Tensor, list[Tensor], Tensor]:
            weight = base.tensor(name)
            room = self._room(len(experts), weight.numel())
            outs = [part[: weight.numel()].view(weight.shape) for part in room]
            return weight, [expert.update(name, weight, out) for expert, out in zip(experts.values(), outs)], room

        return replace(merger.job([name]), read=read, compute=partial(self._merge, merger, name))

    def _room(self, experts: int, elements: int) -> Tensor:
        """Return room for the updates of a weight, if there is any that of a merged weight: new memory costs more than
        all that is done in it.
        """
        with contextlib.suppress(IndexError):
            if (room := self._rooms.pop()).shape[1] >= elements:
                return room
        return torch.empty(experts, elements)

    def _merge(
        self, merger: UnitMerger, name: str, inputs: tuple[Tensor, list[Tensor], Tensor]
    ) -> tuple[str, Tensor, WeightReport]:
        """Return the name of a weight, the weight in the dtype that is written, and its report."""
        *read, room = inputs
        weight, report = self._weight(merger, name, *read)
        self._rooms.append(room)
        return name, weight, report

    def _weight(
        self, merger: UnitMerger, name: str, weight: Tensor, updates: list[Tensor]
    ) -> tuple[Tensor, WeightReport]:
        matrices, device = merger.matrices([name], [updates])
        norms = norms_of(matrices)
        if not self.checked:
            self._check(name, weight, norms)
            if not any(norms.values()):
                return weight, report_unchanged(self.plan, name)
        ((update, report),) = merger.merge_matrices([name], matrices, device, norms).values()
        scale_by_depth({name: report}, self.plan, merger.depths)
        # The updates are not needed any more. What is written in float32 is written later than their room is taken.
        room = None if self.writer.dtype_of(name) == torch.float32 else updates[0]
        weight = updated(weight, update, report.scale(self.alpha, self.by_kind), room)
        return self.writer.rounded(name, weight), report

    def _check(self, name: str, weight: Tensor, norms: Mapping[str, float]) -> None:
        """Check that a weight of the base is finite, and those of the experts, as far as the updates' norms do not
        tell.
        """
        check_finite(weight, self.plan.base, name)
        for task, norm in norms.items():
            if not norm < _SAFE:  # NaN, too
                differs(self.plan.experts[task], name, weight)
