"""Checks of a plan against the disks and memory of this machine, and against the weights."""

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Optional

import torch

from ..checkpoints import Checkpoint, DerivedCheckpoint
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
    """Raise an error if the output would replace one of the models, or if a disk is too small.

    Args:
        output: folder of the merged model.
        statistics_bytes: size of the statistics that will be collected.
        statistics_dir: folder that statistics are kept in.
        resume_dir: folder of work in progress.
    """
    for model in (plan.base, *plan.experts.values()):
        folder = getattr(model, "folder", None) or model.source
        if folder and Path(folder).resolve().is_relative_to(output.resolve()):
            raise HfEsmError(
                f"{model.title} is inside `output_dir` {output}, which would be replaced. Choose another."
            )
    scratch = Path(resume_dir).expanduser() if resume_dir else output
    statistics = Path(statistics_dir).expanduser() if statistics_dir else scratch
    sizes = [(output, plan.output_bytes), (scratch, plan.scratch_bytes), (statistics, statistics_bytes)]
    if resume_dir:  # work that is on the disk already needs no more room; statistics are there twice for a while
        sizes += [(scratch, -Work(resume_dir, {}).nbytes), (scratch, statistics_bytes if statistics_dir else 0)]
    needed: dict[int, float] = defaultdict(float)
    folders = {}
    for folder, size in sizes:
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        disk = existing.stat().st_dev
        needed[disk] += size
        folders.setdefault(disk, (folder, existing))
    for disk, (folder, existing) in folders.items():
        free = shutil.disk_usage(existing).free
        if needed[disk] > free:
            raise HfEsmError(
                f"{folder}: merging needs {readable(needed[disk])} on this disk and {readable(free)} are free. Make "
                "room there."
            )


def check_memory(plan: MergePlan, max_memory: Optional[str | int | float]) -> None:
    """Raise an error if the largest weight, or the memory that a method learns with, exceeds `max_memory`."""
    if max_memory is None:
        return
    needed = {
        f"the largest weight of {len(plan.experts)} experts": plan.memory_bytes,
        f"learning by {plan.method.name}": plan.learning_bytes,
        "refining (`refine`)": plan.refining_bytes,
    }
    for consumer, size in needed.items():
        if size > bytes_of(max_memory, "max_memory"):
            raise HfEsmError(f"`max_memory` {max_memory}: {consumer} needs {readable(size)}. Give at least that.")


def check_values(plan: MergePlan, progress: Callable[[Iterable], Iterable] = iter) -> None:
    """Read every weight once that will be merged or kept by a task, and note in the plan which no expert changes.

    Raises:
        HfEsmError: if a weight is not finite, or an expert equals the base in every merged weight.
    """
    changed: dict[str, set[str]] = {task: set() for task in plan.experts}
    for name in progress(plan.heads.shared):
        weight = plan.base.tensor(name)
        check_finite(weight, plan.base, name)
        for task, expert in plan.experts.items():
            if expert.changes(name) and differs(expert, name, weight):
                changed[task].add(name)
    note_changed(plan, changed)
    check_heads(plan)


def differs(expert: Checkpoint, name: str, weight: torch.Tensor) -> bool:
    """Return whether an expert's weight differs from that of the base.

    Raises:
        HfEsmError: if the expert's weight is not finite.
    """
    if isinstance(expert.stored, DerivedCheckpoint):
        update = expert.update(name, weight)
        check_finite(update, expert, name)
        return bool(update.any())
    tuned = expert.tensor(name)
    if torch.equal(tuned, weight):
        return False
    check_finite(tuned, expert, name)
    return True


def check_factors(plan: MergePlan, progress: Callable[[Iterable], Iterable] = iter) -> None:
    """Read the factors of every update once, of experts that are LoRA adapters, and the weights that tasks keep; note
    in the plan which weights no expert changes.

    Raises:
        HfEsmError: as `check_values` does.
    """
    changed: dict[str, set[str]] = {task: set() for task in plan.experts}
    for name in progress(plan.heads.shared):
        for task, expert in plan.experts.items():
            a, b = expert.factors(name) or (None, None)
            if a is not None:
                check_finite(a, expert, name)
                check_finite(b, expert, name)
                if a.any() and b.any():
                    changed[task].add(name)
    note_changed(plan, changed)
    check_heads(plan)


def note_changed(plan: MergePlan, changed: Mapping[str, set[str]]) -> None:
    """Note in the plan which weights no expert changes; raise an error if an expert changes none.

    Args:
        changed: by task, names of the weights that the expert changes.
    """
    for task, names in changed.items():
        if not names and not (plan.vocabulary and task in plan.vocabulary.givers()):
            raise HfEsmError(f"{plan.experts[task].title} equals the base in every merged weight. Leave it out.")
    plan.unchanged = frozenset(plan.heads.shared) - frozenset.union(*map(frozenset, changed.values()))


def check_heads(plan: MergePlan) -> None:
    """Raise an error if a weight that a task keeps is not finite."""
    for task, names in plan.heads.by_task.items():
        for name in names:
            check_finite(plan.experts[task].tensor(name), plan.experts[task], name)


def check_finite(tensor: torch.Tensor, checkpoint: Checkpoint, name: str) -> None:
    """Raise an error unless a weight, or its update, is finite, and so is its norm in float32, if it is trained: every
    method takes products of weights. Buffers may hold the least number there is, as masks do.
    """
    if not tensor.is_floating_point() or _norm(tensor).isfinite():
        return
    weight = f"{checkpoint.title}: weight '{checkpoint.names[name]}' holds"
    # A sum is finite only if all its terms are, and costs less than a look at every term.
    if not tensor.sum(dtype=torch.float64).isfinite():
        raise HfEsmError(f"{weight} NaN or infinite values. Save or download the model again.")
    if name in checkpoint.trained:
        raise HfEsmError(
            f"{weight} numbers up to {float(tensor.abs().max()):.3g}, whose squares float32 does not hold; they "
            "cannot be weights. Save or download the model again."
        )


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor.float() if tensor.dtype is torch.float64 else tensor, dtype=torch.float32)
