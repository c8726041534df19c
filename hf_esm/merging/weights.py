"""Pass one of a merge: every weight of all experts merged, one at a time, into scratch files."""

import json
import math
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from ..architecture import from_matrices, is_routable, layer_type, matrix_names, to_matrices
from ..calibration import ActivationStatistics
from ..checkpoints import ShardedWriter
from ..errors import HfEsmError
from ..linalg import norm
from ..methods import MergeMethod, Stack, WholeUpdates, mean_update
from ..planning import MergePlan, merge_bytes
from ..utils import fast_products, roomy
from .updates import WeightReport


# Elements of a weight below which several are merged side by side.
_SMALL = 4_000_000


def whole_updates(
    plan: MergePlan, learn_mask: Callable[[], Any], progress: Callable[[Iterable], Iterable]
) -> WholeUpdates:
    """Return the updates of all experts of a merge, as `MergeMethod.prepare` reads them."""
    names = [name for name in plan.heads.shared if name in plan.base.trained]

    def read(task: str) -> Iterator[Tensor]:
        return (plan.experts[task].update(name, plan.base.tensor(name)) for name in names)

    return WholeUpdates(tuple(plan.experts), read, learn_mask, progress)


def merge_weights(
    plan: MergePlan,
    statistics: dict[str, Optional[ActivationStatistics]],
    scratch: Path,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[Iterable], Iterable] = iter,
    max_memory: Optional[int] = None,
    resumable: bool = False,
    device: Optional[torch.device] = None,
    thresholds: Sequence[float] = (),
) -> dict[str, WeightReport]:
    """Pass one: merge this process's share of the weights, one at a time, into a scratch file.

    Args:
        max_memory: bytes that the weights being read and merged side by side may take; see `planning.merge_bytes`.
        thresholds: what `MergeMethod.prepare` returned.
        device: where the methods compute, as far as its memory goes; the CPU by default.
        resumable: keep a journal beside the scratch file, and leave out what it says was merged before.
    """
    everything = merge_units(plan, statistics)
    units = [unit for unit in everything if not plan.unchanged.issuperset(unit)][rank::world_size]
    shapes = {name: torch.empty(plan.base.shape(name), device="meta") for unit in units for name in unit}
    journal = scratch / f"updates-{rank}.journal"
    reports = _read_journal(journal) if resumable else {}
    units = [unit for unit in units if unit[0] not in reports]
    with (
        ShardedWriter(scratch, shapes, max_shard_size=2**62, stem=f"updates-{rank}", written=reports) as writer,
        fast_products(plan.method.tolerance),
    ):
        read = partial(_read_unit, plan=plan)
        merge = partial(_merge_unit, plan=plan, statistics=statistics, thresholds=thresholds, device=device)
        sizes = partial(_elements, plan)
        one_by_one = device is not None and device.type != "cpu"  # a GPU does one thing at a time, in its own memory
        for merged in _side_by_side(units, sizes, read, merge, progress, len(plan.experts), max_memory, one_by_one):
            for name, (update, report) in merged.items():
                writer.write(name, update)
                reports[name] = report
            if resumable:
                writer.sync()  # the journal speaks of nothing that is not on the disk
                with journal.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({name: asdict(report) for name, (_, report) in merged.items()}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
    zeros = dict.fromkeys(plan.experts, 0.0)
    for unit in everything:
        for name in unit if plan.unchanged.issuperset(unit) else ():
            reports[name] = WeightReport(plan.base.names[name], "unchanged", 0.0, scaled=False, update_norms=zeros)
    return reports


def _read_journal(path: Path) -> dict[str, WeightReport]:
    """Reports of the weights that an interrupted pass has merged; half a line at the end does not count, and is cut
    off. Without the file of the weights themselves, nothing has been merged.
    """
    if not path.is_file() or not path.with_suffix(".safetensors").is_file():
        path.unlink(missing_ok=True)
        return {}
    reports: dict[str, WeightReport] = {}
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    if lines != whole:
        os.truncate(path, sum(map(len, whole)))
    try:
        for line in whole:
            reports |= {name: WeightReport(**report) for name, report in json.loads(line).items()}
    except (ValueError, TypeError, AttributeError):
        raise HfEsmError(f"{path} is damaged. Remove {path.parent} to start again.") from None
    return reports


def _side_by_side(
    units: list[list[str]],
    elements: Callable,
    read: Callable,
    merge: Callable,
    progress: Callable,
    tasks: int,
    max_memory: Optional[int],
    one_by_one: bool = False,
) -> Iterator[dict]:
    """`merge(unit, read(unit))` of every unit, in order: large weights one at a time with all threads, while the next
    one is being read; small ones in parallel, unless `one_by_one`. As many at once as `max_memory` holds.

    An eigenproblem of a few hundred rows leaves all but one thread idle; several of them at once do not.
    """
    threads = torch.get_num_threads()
    room = max_memory or math.inf
    waiting: deque[tuple[Future, int]] = deque()
    ahead: Optional[Future] = None
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for unit, following in zip(progress(units), [*units[1:], None]):
                needed = merge_bytes(elements(unit), tasks)
                while waiting and needed + sum(size for _, size in waiting) > room:
                    yield waiting.popleft()[0].result()
                if elements(unit) > _SMALL or threads == 1 or one_by_one:
                    found = ahead.result() if ahead else read(unit)
                    fits = following and needed + 4 * tasks * elements(following) <= room
                    fits = fits and (elements(following) > _SMALL or one_by_one)
                    ahead = pool.submit(read, following) if fits else None
                    merged = merge(unit, found)
                    del found  # not to be held while others are merged
                    yield merged
                    del merged
                    continue
                waiting.append((pool.submit(lambda unit: merge(unit, read(unit)), unit), needed))
                if len(waiting) > threads:
                    yield waiting.popleft()[0].result()
            yield from (future.result() for future, _ in waiting)
    finally:
        torch.set_num_threads(threads)


def merge_units(plan: MergePlan, statistics: dict[str, Optional[ActivationStatistics]]) -> list[list[str]]:
    """The weights to merge, singly, or several where the method stacks maps that read the same tensor.

    Such a stack are three or more maps that hang on one module and have the same statistics in every expert (q, k and
    v of an attention module; not the two of a gated MLP); large weights come first, so that processes finish together.
    """
    shared = [name for name in plan.heads.shared if plan.base.dtype(name).is_floating_point]
    groups: dict[Any, list[str]] = defaultdict(list)
    stacking = plan.method.stacks_shared_inputs and all(s is not None for s in statistics.values())
    for name in shared:
        linear = plan.base.linear.get(name)
        if stacking and linear is not None and not linear.slices and all(name in s for s in statistics.values()):
            parent = linear.module.rpartition(".")[0]
            groups[(parent, *(s.keys_of[name] for s in statistics.values()))].append(name)
        else:
            groups[name].append(name)
    units = [unit for group in groups.values() for unit in ([group] if len(group) > 2 else [[name] for name in group])]
    return sorted(units, key=lambda unit: -_elements(plan, unit))


def _elements(plan: MergePlan, unit: list[str]) -> int:
    return sum(math.prod(plan.base.shape(name)) for name in unit)


def _read_unit(unit: list[str], plan: MergePlan) -> list[list[Tensor]]:
    """The updates of one weight, or of several by one another, by name and expert."""
    weights = {name: plan.base.tensor(name) for name in unit}
    return [[expert.update(name, weight) for expert in plan.experts.values()] for name, weight in weights.items()]


def _merge_unit(
    unit: list[str],
    updates: list[list[Tensor]],
    plan: MergePlan,
    statistics: dict[str, Optional[ActivationStatistics]],
    thresholds: Sequence[float],
    device: Optional[torch.device],
) -> dict[str, tuple[Tensor, WeightReport]]:
    """One weight of every expert merged, with its report; several names where they are stacked along the output."""
    linear = plan.base.linear.get(unit[0])
    device = roomy(device, merge_bytes(_elements(plan, unit), len(plan.experts)))
    heights = [found[0].shape[1 if linear.transposed else 0] for found in updates] if len(unit) > 1 else []
    matrices: dict[str, list[Tensor]] = {}
    for task, *found in zip(plan.experts, *updates, strict=True):
        parts = [to_matrices(update.to(device), linear) for update in found]
        matrices[task] = [torch.cat([part for (part,) in parts])] if len(unit) > 1 else parts[0]
    names = matrix_names(unit[0], linear) if linear else unit[:1]
    # Running means and variances are averages already: beyond those of the experts, a variance may be negative.
    merge = plan.method.merge if unit[0] in plan.base.trained else partial(mean_update, scaled=False)
    merged = [
        merge(
            Stack(
                name=plan.base.names[unit[0]],
                part=part,
                layer_type=layer_type(unit[0]),
                deltas=deltas,
                is_linear=linear is not None,
                routable=is_routable(unit[0], linear),
                statistics=[
                    found[name].to(device) if found and name in found else None for found in statistics.values()
                ],
                thresholds=list(thresholds),
            )
        )
        for part, (name, *deltas) in enumerate(zip(names, *matrices.values(), strict=True))
    ]
    energies = [part.info["energy_kept"] for part in merged if "energy_kept" in part.info]
    energy = [sum(found) / len(energies) for found in zip(*energies, strict=True)]
    report = WeightReport(
        name="",
        how=" and ".join(sorted({part.how for part in merged})),
        norm=_norm([part.delta for part in merged]),
        scaled=merged[0].scaled,
        update_norms={task: _norm(parts) for task, parts in matrices.items()},
        energy_kept=dict(zip(plan.experts, energy, strict=True)) if energy else {},
    )
    whole = [[part] for part in merged[0].delta.split(heights)] if heights else [[part.delta for part in merged]]
    return {
        name: (from_matrices(parts, linear).cpu(), replace(report, name=plan.base.names[name]))
        for name, parts in zip(unit, whole, strict=True)
    }


def _norm(parts: list[Tensor]) -> float:
    """Frobenius norm of several tensors together."""
    return math.hypot(*(float(norm(part)) for part in parts))


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
