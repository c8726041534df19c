"""Checks of a plan against this machine and against the weights themselves."""

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any, Optional

import torch

from ..checkpoints import Checkpoint, LoraCheckpoint
from ..errors import HfEsmError
from ..utils import Work, bytes_of, readable
from .plan import MergePlan


def check_disk(
    plan: MergePlan,
    output: Path,
    statistics_bytes: int = 0,
    statistics_dir: Optional[str] = None,
    resume_dir: Optional[str] = None,
) -> None:
    """Raise if the output would replace one of the models, or a disk cannot hold what goes there."""
    for model in (plan.base, *plan.experts.values()):
        folder = getattr(model, "folder", None) or model.source
        if folder and Path(folder).resolve().is_relative_to(output.resolve()):
            raise HfEsmError(f"{model.title} stands in output_dir {output}, which would be replaced. Choose another.")
    scratch = Path(resume_dir).expanduser() if resume_dir else output
    kept = Path(statistics_dir).expanduser() if statistics_dir else scratch
    wanted = [(output, plan.output_bytes), (scratch, plan.scratch_bytes), (kept, statistics_bytes)]
    if resume_dir:
        work = Work(resume_dir, {})
        wanted += [(scratch, -work.nbytes), (scratch, statistics_bytes if statistics_dir else 0)]
    needed: dict[int, float] = defaultdict(float)
    places = {}
    for place, count in wanted:
        there = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.exists())
        disk = there.stat().st_dev
        needed[disk] += count
        places.setdefault(disk, (place, there))
    for disk, (place, there) in places.items():
        free = shutil.disk_usage(there).free
        if needed[disk] > free:
            raise HfEsmError(
                f"{place}: merging needs {readable(needed[disk])} on this disk and {readable(free)} are free. Make "
                "room there."
            )


def check_memory(plan: MergePlan, max_memory: Optional[str | int]) -> None:
    """Raise if the largest weight, or what a method learns with, does not fit in `max_memory`."""
    if max_memory is None:
        return
    wanted = {
        f"the largest weight of {len(plan.experts)} experts": plan.memory_bytes,
        f"learning by {plan.method.name}": plan.learning_bytes,
    }
    for what, count in wanted.items():
        if count > bytes_of(max_memory, "max_memory"):
            raise HfEsmError(f"max_memory {max_memory}: {what} needs {readable(count)}. Give at least that.")


def check_values(plan: MergePlan, progress: Any = iter) -> None:
    """Read every weight that will be merged or kept by a task once, raise if one is not finite or an expert equals the
    base, and note in the plan which ones no expert changes.
    """
    changed: dict[str, set[str]] = {task: set() for task in plan.experts}
    for name in progress(plan.heads.shared):
        weight = plan.base.tensor(name)
        _check_finite(weight, plan.base, name)
        for task, expert in plan.experts.items():
            if isinstance(expert, LoraCheckpoint):
                if not expert.changes(name):
                    continue
                update = expert.update(name, weight)
                _check_finite(update, expert, name)
                if update.any():
                    changed[task].add(name)
            elif not torch.equal(tuned := expert.tensor(name), weight):
                _check_finite(tuned, expert, name)
                changed[task].add(name)
    for task, names in changed.items():
        if not names:
            raise HfEsmError(f"{plan.experts[task].title} equals the base in every merged weight. Leave it out.")
    plan.unchanged = frozenset(plan.heads.shared) - frozenset.union(*map(frozenset, changed.values()))
    for task, names in plan.heads.by_task.items():
        for name in names:
            _check_finite(plan.experts[task].tensor(name), plan.experts[task], name)


def _check_finite(tensor: torch.Tensor, checkpoint: Checkpoint, name: str) -> None:
    # A sum is finite if all its terms are, and is the cheaper look at a sound weight.
    if tensor.is_floating_point() and not tensor.sum(dtype=torch.float64).isfinite():
        raise HfEsmError(
            f"{checkpoint.title}: weight '{checkpoint.names[name]}' holds NaN or infinite values. Save or "
            "download the model again."
        )
