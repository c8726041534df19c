"""The caller's arguments, checked before any file is opened."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

import torch

from ..checkpoints import CALIBRATION_FOLDER, RECIPE_FILE
from ..errors import HfEsmError
from ..methods import MergeMethod
from ..utils import WORK_FOLDER
from .options import MergeOptions


_LONGEST_NAME = 100  # of a task, which names files


TAKEN = ("base", "static", "none")  # what stands beside the tasks: the base, no expert, none of the tasks


def name_experts(experts: Any) -> dict[str, Any]:
    """Experts by task name, from a mapping, pairs, or a list of paths (named by their last part)."""
    if not isinstance(experts, Mapping):
        if isinstance(experts, (str, os.PathLike)) or not isinstance(experts, Iterable):
            given = repr(experts) if isinstance(experts, str) else type(experts).__name__
            raise HfEsmError(f"experts: give models by task name, or a list of folders and ids, not {given}.")
        pairs = [_named(expert) for expert in experts]
        names = [name for name, _ in pairs]
        if twice := {name for name in names if names.count(name) > 1}:
            raise HfEsmError(f"Two experts are named {sorted(twice)[0]!r}. Give each task a name of its own.")
        experts = dict(pairs)
    for name in experts:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name) or name in TAKEN:
            taken = ", ".join(TAKEN)
            quoted = "" if isinstance(name, str) else "; in YAML, put it in quotes"
            raise HfEsmError(f"Task name {name!r}: use letters, digits, '.', '_' and '-'{quoted} (taken are {taken}).")
        if len(name) > _LONGEST_NAME:
            raise HfEsmError(f"Task name {name[:20]!r}…: of {len(name)} letters; use {_LONGEST_NAME} at most.")
    if len(experts) < 2:
        raise HfEsmError(f"Merging takes at least two experts; got {list(experts) or 'none'}.")
    return dict(experts)


def _named(expert: Any) -> tuple[str, Any]:
    """An entry of a list of experts, with its task's name."""
    if isinstance(expert, (tuple, list)) and len(expert) == 2:
        return tuple(expert)
    path = expert.get("path") if isinstance(expert, Mapping) else expert
    if not isinstance(path, (str, os.PathLike)):
        raise HfEsmError(f"experts: a list takes folders and ids; give a {type(expert).__name__} by task name.")
    return Path(path).name.partition("@")[0], expert


def check_arguments(
    options: MergeOptions,
    method: MergeMethod,
    experts: dict,
    calibration: Any,
    validation: Any,
    score_fn: Any,
    processor: Any = None,
) -> None:
    """What can be said before any file is opened."""
    if isinstance(processor, (str, os.PathLike)):
        raise HfEsmError(f"processor takes a loaded one, not {processor!r}: AutoProcessor.from_pretrained(…).")
    for scored in score_fn.values() if isinstance(score_fn, Mapping) else (score_fn,):
        if scored is not None and not callable(scored):
            raise HfEsmError(f"score_fn must be a function of a model, or one per task, not {scored!r}.")
    for what, given in (("calibration", calibration), ("validation", validation)):
        folder = what == "calibration" and isinstance(given, (str, os.PathLike))
        if given is not None and not folder and not isinstance(given, Mapping):
            raise HfEsmError(f"{what} must name each task's own, as {{'task': …}}; got a {type(given).__name__}.")
    for what, given in (("calibration", calibration), ("validation", validation), ("score_fn", score_fn)):
        if isinstance(given, Mapping) and (unknown := given.keys() - experts.keys()):
            raise HfEsmError(
                f"{what} names {sorted(unknown)[0]!r}, which is no expert; there are {', '.join(experts)}."
            )
    if options.alpha == "auto":
        if not method.tunable:
            raise HfEsmError(f"Method {method.name!r} has no alpha to choose; leave alpha out.")
        if validation is None and score_fn is None:
            raise HfEsmError("alpha='auto' needs validation rows per task, or score_fn. Or give alpha a number.")
        scored = validation if score_fn is None else score_fn
        if isinstance(scored, Mapping) and (lacking := experts.keys() - scored.keys()):
            what = "validation rows" if score_fn is None else "score_fn"
            raise HfEsmError(f"alpha='auto': there are no {what} for {sorted(lacking)[0]!r}.")
    for what in ("output_dir", "statistics_dir", "resume_dir"):
        place = getattr(options, what)
        if place is None:
            continue
        if not isinstance(place, (str, os.PathLike)):
            raise HfEsmError(f"{what} must be a folder, not {place!r}.")
        whole = Path(place).expanduser().resolve()
        above = whole.parents if what == "output_dir" else (whole, *whole.parents)
        if blocked := [path for path in above if path.exists() and not path.is_dir()]:
            raise HfEsmError(f"{what} {place}: {blocked[0]} is a file. Choose another folder.")
        work = options.resume_dir and (Path(options.resume_dir).expanduser() / WORK_FOLDER).resolve()
        if work and what != "resume_dir" and whole.is_relative_to(work):
            raise HfEsmError(f"{what} {place} stands in the work of resume_dir, which goes away. Choose another.")
    if options.output_dir:
        _check_output(options, {"calibration": calibration, "validation": validation})


def _check_output(options: MergeOptions, data: dict[str, Any]) -> None:
    """Refuse an output folder that cannot be made, or whose replacement would take away something else."""
    output = Path(options.output_dir).expanduser()
    whole = output.resolve()
    if Path.cwd().is_relative_to(whole):
        raise HfEsmError(f"output_dir {output} is, or holds, the current folder. Choose another.")
    check_replaceable(output, options.overwrite, "output_dir")
    inside = {"statistics_dir": options.statistics_dir, "resume_dir": options.resume_dir}
    for what, given in data.items():
        by_task = given if isinstance(given, Mapping) else {"all": given}
        inside |= {f"{what} of '{task}'": spec for task, spec in by_task.items()}
    for what, given in inside.items():
        path = given.get("path") if isinstance(given, Mapping) else given
        place = Path(path).expanduser().resolve() if isinstance(path, (str, os.PathLike)) else None
        if place and place.is_relative_to(whole) and not place.is_relative_to(whole / CALIBRATION_FOLDER):
            raise HfEsmError(
                f"{what} ({path}) stands in output_dir {output}, which would be replaced. Choose another output_dir."
            )


def check_replaceable(output: Path, overwrite: bool, name: str = "folder") -> None:
    """Refuse to write where something stands, unless a merge wrote it and it is to be overwritten; `name` is what the
    caller calls the folder.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        flag = " (--overwrite)" if name == "output_dir" else ""
        raise HfEsmError(f"{output} exists. Choose another {name}, or pass overwrite=True{flag}.")
    if output.is_symlink():
        raise HfEsmError(f"{output} is a link, so it is not overwritten. Name the folder that it leads to.")
    if not output.is_dir() or (any(output.iterdir()) and not (output / RECIPE_FILE).is_file()):
        raise HfEsmError(f"{output} is not what a merge wrote, so it is not overwritten. Choose another {name}.")


def torch_dtype(name: Optional[str]) -> Optional[torch.dtype]:
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name), None)
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise HfEsmError(f"dtype must be a floating-point dtype of torch such as 'bfloat16', not {name!r}.")
    return dtype if name is not None else None
