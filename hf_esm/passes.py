"""The two passes of a merge: every weight merged once, and its scaled update put on the base as often as wanted."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import safe_open
from torch import Tensor

from .checkpoints import Checkpoint, ShardedWriter
from .errors import HfEsmError
from .methods import MergeMethod, Stack
from .planning import MergePlan
from .statistics import ActivationStatistics
from .weights import from_matrices, layer_type, to_matrices


@dataclass
class WeightReport:
    """What became of one weight.

    Attributes:
        name: its name in the base model.
        how: the rule that merged it (`"esm"`, `"tsv-m"`, `"mean"`, `"sum"`).
        norm: Frobenius norm of the merged update, before α and the scale between layers.
        scaled: whether α multiplies it.
        layer_scale: its scale between layers of one type; 1 where the method has none.
        update_norms: Frobenius norm of each expert's update, by task.
        energy_kept: share of each expert's output shift that its kept directions carry, by task (ESM).
    """

    name: str
    how: str
    norm: float
    scaled: bool
    layer_scale: float = 1.0
    update_norms: dict[str, float] = field(default_factory=dict)
    energy_kept: dict[str, float] = field(default_factory=dict)


class MergedUpdates:
    """Pass one's outcome: the unscaled merged updates on disk, and their reports."""

    def __init__(self, base: Checkpoint, reports: dict[str, WeightReport], files: list[Path]):
        self.base, self.reports = base, reports
        self._owner = {}
        for path in files:
            file = safe_open(path, "pt")
            self._owner.update(dict.fromkeys(file.keys(), file))

    def weight(self, name: str, alpha: float) -> Tensor:
        """`W0 + α β Δ_M` in float32; the base's own weight, as stored, where nothing was merged."""
        weight = self.base.tensor(name)
        report = self.reports.get(name)
        if report is None:
            return weight
        scale = alpha * report.layer_scale if report.scaled else report.layer_scale
        return torch.add(weight.float(), self._owner[name].get_tensor(name), alpha=scale)


def merge_weights(
    plan: MergePlan,
    statistics: dict[str, Optional[ActivationStatistics]],
    scratch: Path,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, WeightReport]:
    """Pass one: merge this process's share of the weights, one at a time, into a scratch file."""
    units = merge_units(plan, statistics)[rank::world_size]
    shapes = {name: torch.empty(plan.base.shape(name), device="meta") for unit in units for name in unit}
    reports: dict[str, WeightReport] = {}
    with ShardedWriter(scratch, shapes, max_shard_size=2**62, stem=f"updates-{rank}") as writer:
        for unit in progress(units):
            for name, merged in _merge_unit(unit, plan, statistics, reports).items():
                writer.write(name, merged)
    return reports


def merge_units(plan: MergePlan, statistics: dict[str, Optional[ActivationStatistics]]) -> list[list[str]]:
    """The weights to merge, singly, or several where the method stacks maps that read the same tensor.

    Such a stack are maps that hang on one module and have the same statistics in every expert (q, k and v of an
    attention module); large weights come first, so that processes finish together.
    """
    shared = [name for name in plan.heads.shared if plan.base.dtype(name).is_floating_point]
    groups: dict[Any, list[str]] = defaultdict(list)
    stacking = getattr(plan.method, "stack_shared_inputs", False) and all(s is not None for s in statistics.values())
    for name in shared:
        linear = plan.base.linear.get(name)
        if stacking and linear is not None and not linear.slices and all(name in s for s in statistics.values()):
            parent = linear.module.rpartition(".")[0]
            groups[(parent, *(s.keys_of[name] for s in statistics.values()))].append(name)
        else:
            groups[name].append(name)
    return sorted(groups.values(), key=lambda unit: -sum(torch.Size(plan.base.shape(n)).numel() for n in unit))


def _merge_unit(
    unit: list[str],
    plan: MergePlan,
    statistics: dict[str, Optional[ActivationStatistics]],
    reports: dict[str, WeightReport],
) -> dict[str, Tensor]:
    linear = plan.base.linear.get(unit[0])
    updates = {task: [] for task in plan.experts}  # per task, per matrix of the weight
    heights = []
    for name in unit:
        weight = plan.base.tensor(name)
        heights.append(to_matrices(weight, linear)[0].shape[0] if weight.dim() else 1)
        for task, expert in plan.experts.items():
            update = expert.update(name, weight)
            if not update.isfinite().all():
                raise HfEsmError(f"{expert.title}: weight '{expert.names[name]}' holds NaN or infinite values.")
            updates[task].append(to_matrices(update, linear))
    if len(unit) > 1:  # stacked along the output
        updates = {task: [[torch.cat([parts[0] for parts in found])]] for task, found in updates.items()}
    entries = [
        s[unit[0]] if s is not None and linear is not None and not linear.slices and unit[0] in s else None
        for s in statistics.values()
    ]
    merged = []
    for matrices in zip(*(found[0] for found in updates.values()), strict=True):
        stack = Stack(plan.base.names[unit[0]], layer_type(unit[0]), list(matrices), linear is not None, entries)
        merged.append(plan.method.merge(stack))
    norm = torch.stack([part.delta.double().square().sum() for part in merged]).sum().sqrt()
    energy = merged[0].info.get("energy_kept")
    for name in unit:
        reports[name] = WeightReport(
            plan.base.names[name],
            merged[0].how,
            float(norm),
            merged[0].scaled,
            update_norms={
                task: float(torch.stack([m.double().square().sum() for m in found[0]]).sum().sqrt())
                for task, found in updates.items()
            },
            energy_kept=dict(zip(plan.experts, energy, strict=True)) if energy else {},
        )
    if len(unit) > 1:
        parts = merged[0].delta.split(heights)
        return {name: from_matrices([part], linear) for name, part in zip(unit, parts, strict=True)}
    return {unit[0]: from_matrices([part.delta for part in merged], linear)}


def scale_layers(reports: dict[str, WeightReport], method: MergeMethod, matrices: set[str]) -> None:
    """Set each report's scale between layers, `(‖Δ_M‖ / mean ‖Δ_M‖)^exponent` over the matrices of one type."""
    if not method.layer_exponent:
        return
    types: dict[str, list[str]] = defaultdict(list)
    for name in reports:
        if name in matrices:
            types[layer_type(name)].append(name)
    for names in types.values():
        mean = sum(reports[name].norm for name in names) / len(names)
        for name in names:
            reports[name].layer_scale = (reports[name].norm / mean) ** method.layer_exponent if mean > 0 else 1.0


def report_records(reports: dict[str, WeightReport]) -> list[dict[str, Any]]:
    """The reports as plain data."""
    return [asdict(report) for report in reports.values()]
