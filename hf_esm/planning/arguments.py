"""Checks of the caller's arguments, made before any file is opened."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from ..checkpoints import CALIBRATION_FOLDER, RECIPE_FILE, ModelSpec
from ..data import DataSpec
from ..errors import HfEsmError
from ..methods import MergeMethod
from ..utils import WORK_FOLDER, check_known, check_path, check_task_names, end_published, finite_number, recover
from .options import MergeOptions


_PLACES = ("path", "statistics", "samples")  # keys of data that name a file or a folder


@dataclass(frozen=True)
class MergeData:
    """The data of a merge, as the caller passes it to `merge_models`.

    Attributes:
        calibration: samples or statistics by task, or the folder of all statistics.
        validation: labelled rows by task.
        score_fn: function of a model, or one by task.
        processor: tokenizer or processor for models that have none in their folders.
    """

    calibration: Optional[Mapping[str, Any] | str | os.PathLike] = None
    validation: Optional[Mapping[str, DataSpec]] = None
    score_fn: Optional[Callable[[Any], float] | Mapping[str, Callable[[Any], float]]] = None
    processor: Any = None

    @property
    def is_labelled(self) -> bool:
        """Whether there are labelled rows, or functions that score models."""
        return self.validation is not None or self.score_fn is not None

    def calibration_of(self, task: str) -> Any:
        """Return the samples or statistics of one task as the caller passed them; None if there are none."""
        if isinstance(self.calibration, (str, os.PathLike)):
            return Path(self.calibration).expanduser() / f"{task}.safetensors"
        return (self.calibration or {}).get(task)


def name_experts(experts: Any) -> dict[str, ModelSpec]:
    """Return the experts by task name.

    Args:
        experts: a mapping from task names to models, a list of pairs of both, or a list of folders and ids, whose last
            part names the task.

    Raises:
        HfEsmError: if there is none, if a name is taken twice, in another case too, or if it cannot be a task's name.
    """
    if not isinstance(experts, Mapping):
        if isinstance(experts, (str, os.PathLike)) or not isinstance(experts, Iterable):
            wrong = repr(experts) if isinstance(experts, str) else f"a {type(experts).__name__}"
            raise HfEsmError(f"`experts` must be models by task name, or a list of folders and ids, not {wrong}.")
        pairs = [_named(expert) for expert in experts]
        names = [name for name, _ in pairs]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise HfEsmError(f"Two experts are named {sorted(repeated)[0]!r}. Give each task a name of its own.")
        experts = dict(pairs)
    check_task_names(experts)
    if not experts:
        raise HfEsmError("A merge takes one expert or more; `experts` has none.")
    return dict(experts)


def task_weights(
    experts: Mapping[str, ModelSpec], weights: Optional[Mapping[str, Any]]
) -> tuple[dict[str, ModelSpec], Optional[dict[str, float]]]:
    """Return the experts without the key `weight` of their mappings, and the weights of all tasks.

    Args:
        experts: by task name; a mapping such as `{"path": …, "weight": 0.5}` may hold the weight of its task.
        weights: by task name; 1 for a task that is not named. Texts that are numbers are read as such.

    Returns None as weights if all are 1.

    Raises:
        HfEsmError: on a weight of an unknown task, one that is not a finite number, or two of one task.
    """
    weights = dict(weights or {})
    check_known(weights, experts, "expert", "`weights`")
    specs = dict(experts)
    for task, spec in experts.items():
        if isinstance(spec, Mapping) and "weight" in spec:
            if task in weights:
                raise HfEsmError(f"Expert {task!r} has a `weight` of its own and one in `weights`. Leave one out.")
            weights[task] = spec["weight"]
            specs[task] = {key: value for key, value in spec.items() if key != "weight"}
    numbers = {task: finite_number(weights.get(task, 1), f"`weights` of {task!r}") for task in experts}
    return specs, numbers if any(number != 1 for number in numbers.values()) else None


def _named(expert: Any) -> tuple[str, Any]:
    """Return an entry of a list of experts with the name of its task."""
    if isinstance(expert, (tuple, list)) and len(expert) == 2:
        return tuple(expert)
    path = expert.get("path") if isinstance(expert, Mapping) else expert
    if not isinstance(path, (str, os.PathLike)):
        raise HfEsmError(
            f"`experts`: a list takes folders and ids. Pass a {type(expert).__name__} by task name, as "
            "{'task': model}."
        )
    return Path(path).name.partition("@")[0], expert


def check_arguments(
    options: MergeOptions,
    method: MergeMethod,
    experts: Mapping[str, ModelSpec],
    data: MergeData,
    writes: bool = True,
) -> None:
    """Raise an error for arguments that cannot be right, whatever the files hold.

    Args:
        method: the method that the caller named.
        writes: whether the output is to be written now, so that none may be in its way.

    Raises:
        HfEsmError: on data of a wrong kind or of unknown tasks, on a search of `alpha` without data, and on folders
            that cannot be made, or whose replacement would remove something else.
    """
    _check_kinds(data)
    for name in ("calibration", "validation", "score_fn"):
        if isinstance(by_task := getattr(data, name), Mapping):
            check_known(by_task, experts, "expert", f"`{name}`")
    if options.tokenizer is not None and data.processor is not None:
        raise HfEsmError("`tokenizer` and `processor` both say what the merged model reads. Leave one out.")
    if options.searches_alpha or (method.chooses and data.is_labelled):
        _check_search(options, method, experts, data)
    for name in ("output_dir", "statistics_dir", "cache_dir", "resume_dir"):
        _check_folder(options, name)
    if options.output_dir:
        _check_output(options, data, writes)


def _check_kinds(data: MergeData) -> None:
    """Raise an error for data of a wrong type."""
    if isinstance(data.processor, (str, os.PathLike)):
        raise HfEsmError(
            f"`processor` must be a loaded one, not {data.processor!r}. Pass AutoProcessor.from_pretrained(…)."
        )
    for function in data.score_fn.values() if isinstance(data.score_fn, Mapping) else (data.score_fn,):
        if function is not None and not callable(function):
            raise HfEsmError(f"`score_fn` must be a function of a model, or one per task, not {function!r}.")
    for name in ("calibration", "validation"):
        passed = getattr(data, name)
        is_folder = name == "calibration" and isinstance(passed, (str, os.PathLike))
        if passed is not None and not is_folder and not isinstance(passed, Mapping):
            raise HfEsmError(f"`{name}` must be data by task, as {{'task': …}}, not a {type(passed).__name__}.")
        for task, rows in passed.items() if isinstance(passed, Mapping) else [("all tasks", passed)]:
            for place in (rows, *(rows.get(key) for key in _PLACES if isinstance(rows, Mapping))):
                check_path(place, f"`{name}` of {task!r}")


def _check_search(
    options: MergeOptions, method: MergeMethod, experts: Mapping[str, ModelSpec], data: MergeData
) -> None:
    """Raise an error if alpha cannot be searched."""
    if options.alpha == "auto" and not method.tunable:
        raise HfEsmError(f"The method {method.name!r} has no alpha to choose. Leave `alpha` out.")
    if not data.is_labelled:
        if data.calibration is None and not method.needs_statistics:
            raise HfEsmError(
                "`alpha='auto'` needs unlabelled samples (`calibration`) or labelled rows (`validation`) per task, or "
                "a function that scores models (`score_fn`). Or pass a number as `alpha`."
            )
        return
    name = "validation" if data.score_fn is None else "score_fn"
    scored = getattr(data, name)
    if isinstance(scored, Mapping) and (lacking := sorted(experts.keys() - scored.keys())):
        raise HfEsmError(
            f"`{name}` has nothing for {lacking[0]!r}. Add it, or leave `{name}` out, so that agreement with the "
            "experts chooses."
        )


def _check_folder(options: MergeOptions, name: str) -> None:
    """Raise an error if the folder that an option names cannot be one, or is inside work that will be removed."""
    folder = getattr(options, name)
    if folder is None:
        return
    check_path(folder, f"`{name}`")
    path = Path(folder).expanduser().resolve()
    above = path.parents if name == "output_dir" else (path, *path.parents)
    if files := [parent for parent in above if parent.exists() and not parent.is_dir()]:
        raise HfEsmError(f"`{name}` {folder}: {files[0]} is a file. Choose another folder.")
    work = options.resume_dir and (Path(options.resume_dir).expanduser() / WORK_FOLDER).resolve()
    if work and name != "resume_dir" and path.is_relative_to(work):
        raise HfEsmError(
            f"`{name}` {folder} is inside the work in progress of `resume_dir`, which will be removed. Choose another "
            "folder."
        )


def _check_output(options: MergeOptions, data: MergeData, writes: bool) -> None:
    """Raise an error if the output folder cannot be made, or if its replacement would remove something else."""
    output = Path(options.output_dir).expanduser()
    resolved = output.resolve()
    if Path.cwd().is_relative_to(resolved):
        raise HfEsmError(f"`output_dir` {output} is the current folder, or contains it. Choose another folder.")
    if writes:
        if options.resume_dir:
            end_published(options.resume_dir, output)
        check_replaceable(output, options.overwrite, "output_dir")
    places: dict[str, Any] = {f"`{n}`": getattr(options, n) for n in ("statistics_dir", "cache_dir", "resume_dir")}
    for name in ("calibration", "validation"):
        passed = getattr(data, name)
        by_task = passed if isinstance(passed, Mapping) else {"all": passed}
        places |= {f"{name} of '{task}'": rows for task, rows in by_task.items()}
    for name, place in list(places.items()):
        if isinstance(place, Mapping):
            places |= {f"{key} of {name}": place[key] for key in _PLACES[1:] if key in place}
    for name, place in places.items():
        path = place.get("path") if isinstance(place, Mapping) else place
        inside = Path(path).expanduser().resolve() if isinstance(path, (str, os.PathLike)) else None
        if inside and inside.is_relative_to(resolved) and not inside.is_relative_to(resolved / CALIBRATION_FOLDER):
            raise HfEsmError(
                f"{name} ({path}) is inside `output_dir` {output}, which will be replaced. Choose another "
                "`output_dir`."
            )


def check_replaceable(output: Path, overwrite: bool, name: str = "folder") -> None:
    """Raise an error if something exists at `output`, unless a merge wrote it and it is to be overwritten, and can be.

    Args:
        name: of the argument that names the folder, for the error.
    """
    name = f"`{name}`" if name != "folder" else name
    recover(output)
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise HfEsmError(f"{output} exists. Choose another {name}, or pass `overwrite=True`.")
    if output.is_symlink():
        raise HfEsmError(f"{output} is a link, so it is not overwritten. Name the folder that it leads to.")
    if not output.is_dir() or (any(output.iterdir()) and not (output / RECIPE_FILE).is_file()):
        raise HfEsmError(f"{output} was not written by a merge, so it is not overwritten. Choose another {name}.")
    for folder in (output, output.parent):
        if not os.access(folder, os.W_OK):
            raise HfEsmError(
                f"{output} cannot be overwritten: there is no permission to write to {folder}. Choose another {name}."
            )
