"""What the caller of a merge gave: checked early, found, read and encoded."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch
from transformers import ImageProcessingMixin

from ..architecture import matrix_names, width_of, without_labels
from ..calibration.statistics import FILE_NAME, ActivationStatistics
from ..checkpoints import ModelSource
from ..data.rows import PROXIES_FOLDER, is_samples_file, read_rows
from ..data.samples import Sample, encode, load_processor
from ..errors import HfEsmError
from ..methods import MergeMethod
from ..metrics.labels import LabelledSamples, load_labelled
from ..metrics.metric import resolve_metric
from ..utils.resume import FOLDER as WORK
from .options import RECIPE_FILE, MergeOptions
from .plan import MergePlan


_PROCESSOR_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py")
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
        work = options.resume_dir and (Path(options.resume_dir).expanduser() / WORK).resolve()
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
        if place and place.is_relative_to(whole) and not place.is_relative_to(whole / PROXIES_FOLDER):
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


def find_processors(sources: dict[str, ModelSource], given: Any, trust_remote_code: bool = False) -> dict[str, Any]:
    """The tokenizer or processor of each expert, and under `"base"` the one that the merged model gets. It is read
    once where the same files stand beside several models.
    """
    read: dict[Any, Any] = {}
    beside = {}
    for name, source in sources.items():
        key = None if given else _processor_files(source)
        if key not in read:
            read[key] = given or first_processor([source], trust_remote_code)
        beside[name] = read[key]
    first = next((processor for processor in beside.values() if processor is not None), None)
    return {name: first if processor is None else processor for name, processor in beside.items()}


def _processor_files(source: ModelSource) -> Any:
    """The same for folders with the same of what a processor may be made from; labels make no difference. Where there
    are folders in the folder, it is like no other.
    """
    paths = sorted(source.folder.iterdir()) if source.folder else []
    if not paths or any(path.is_dir() for path in paths):
        return source.title
    found = {path.name: path.read_bytes() for path in paths if path.suffix in _PROCESSOR_SUFFIXES}
    config = without_labels(json.loads(found.pop("config.json", "{}")))
    return repr(config), *((name, hashlib.sha256(content).digest()) for name, content in found.items())


def first_processor(sources: list[ModelSource], trust_remote_code: bool = False) -> Any:
    """The first tokenizer or processor that stands beside one of the models; None if there is none."""
    for source in sources:
        folder = source.folder or Path(getattr(source.model, "name_or_path", "") or ".no-folder")
        processor = load_processor(folder, trust_remote_code) if folder.is_dir() else None
        if processor is not None:
            return processor
    return None


def gather_statistics(
    plan: MergePlan, sources: dict, calibration: Any, processors: dict, method: MergeMethod, options: MergeOptions
) -> tuple[dict[str, Optional[ActivationStatistics]], dict[str, list[Sample]]]:
    """Statistics that exist, and the encoded proxies of the tasks that have none yet."""
    statistics: dict[str, Optional[ActivationStatistics]] = dict.fromkeys(plan.experts)
    samples: dict[str, list] = {}
    learns = method.needs_samples
    if not method.needs_statistics and not learns:
        return statistics, samples
    if isinstance(calibration, (str, os.PathLike)):
        folder = Path(calibration).expanduser()
        calibration = {task: folder / f"{task}.safetensors" for task in plan.experts}
    for task, expert in plan.experts.items():
        given = (calibration or {}).get(task)
        if learns and (given is None or isinstance(given, ActivationStatistics) or _is_statistics_file(given)):
            raise HfEsmError(
                f"{expert.title}: {method.name} learns from the samples themselves. Give unlabelled inputs of the "
                "task as its calibration, not statistics."
            )
        if given is None:
            beside = sources[task].folder and sources[task].folder / FILE_NAME
            if not beside or not beside.is_file():
                raise HfEsmError(
                    f"{expert.title}: no calibration samples, and no {FILE_NAME} beside its weights. Give about "
                    f"{options.num_samples or 32} unlabelled inputs of the task, or choose a method that needs none "
                    "('tsv-m')."
                )
            statistics[task] = ActivationStatistics.load(beside)
        elif isinstance(given, ActivationStatistics):
            statistics[task] = given
        elif _is_statistics_file(given):
            statistics[task] = ActivationStatistics.load(Path(given).expanduser())
        else:
            title = f"calibration of '{task}'"
            rows = read_rows(given, title, options)
            samples[task] = encode(rows, processors[task], expert.config, title, options)
        if statistics[task] is not None:
            statistics[task].check_fits(calibrated_widths(plan), task)
    if getattr(method, "router", None) == "discriminant":
        for task, found in statistics.items():
            if found is not None and not found.pooled:
                raise HfEsmError(
                    f"The statistics of '{task}' do not hold what the base's blocks read, which makes the router. "
                    "Calibrate again with the base (`hf-esm calibrate --base`), or give samples."
                )
    return statistics, samples


def _is_statistics_file(given: Any) -> bool:
    if not isinstance(given, (str, os.PathLike)):
        return False
    path = Path(given).expanduser()
    return not is_samples_file(path) if path.suffix == ".safetensors" else (path / FILE_NAME).is_file()


def read_validation(
    plan: MergePlan, validation: Any, processors: dict, options: MergeOptions
) -> dict[str, LabelledSamples]:
    everything, metric = replace(options, num_samples=0), resolve_metric(options.metric)
    return {
        task: load_labelled(
            rows, processors[task], plan.experts[task].config, f"validation of '{task}'", everything, metric
        )
        for task, rows in (validation or {}).items()
    }


def taken_of_others(
    statistics: Mapping[str, Optional[ActivationStatistics]], sources: Mapping[str, ModelSource]
) -> list[str]:
    """Which statistics say that they were taken of another of these models than the task's."""

    def place(name: Any) -> str:
        return str(Path(name).resolve()) if name and Path(name).exists() else str(name or "")

    named = {task: place(source.repo_id or source.folder) for task, source in sources.items()}
    taken = {task: place(known.provenance.model) for task, known in statistics.items() if known}
    others = {task: {name for other, name in named.items() if other != task and name} for task in taken}
    return [
        f"'{task}': its statistics were taken of {of}, which is another of these models."
        for task, of in taken.items()
        if of != named[task] and of in others[task]
    ]


def differing_processors(processors: dict[str, Any], tasks: Iterable[str]) -> list[str]:
    """What the experts' tokenizers and image processors do otherwise than the one that the merged model gets."""
    found = []
    for task in tasks:
        own, merged = processors.get(task), processors.get("base")
        if own is None or merged is None or own is merged:
            continue
        numbered, base = (getattr(p, "tokenizer", p) for p in (own, merged))
        if hasattr(numbered, "get_vocab") and hasattr(base, "get_vocab"):
            places = base.get_vocab()
            words = {place: word for word, place in places.items()}
            moved = [w for w, i in numbered.get_vocab().items() if places.get(w, i) != i or words.get(i, w) != w]
            if moved:
                found.append(
                    f"'{task}': its tokenizer numbers {len(moved)} tokens otherwise than the base's, such as "
                    f"{moved[0]!r}: embeddings of unlike tokens are merged, and the merged model reads as the base."
                )
        ours, theirs = (getattr(p, "image_processor", p) for p in (merged, own))
        if not isinstance(ours, ImageProcessingMixin):
            continue
        names = [name for name in _PICTURE_SETTINGS if getattr(ours, name, None) != getattr(theirs, name, None)]
        if names:
            found.append(f"'{task}': its pictures are prepared otherwise than the base's ({', '.join(names)}).")
    return found


# Settings of image processors of which a difference makes other inputs.
_PICTURE_SETTINGS = (
    "image_mean",
    "image_std",
    "size",
    "crop_size",
    "resample",
    "rescale_factor",
    "do_resize",
    "do_center_crop",
    "do_normalize",
    "do_rescale",
)


def check_statistics(
    plan: MergePlan, statistics: dict[str, Optional[ActivationStatistics]], warn: Callable[[str], None]
) -> None:
    """Name the linear maps that have no statistics."""
    matrices = calibrated_widths(plan)
    of_mixtures = [name for name in matrices if name not in plan.base.linear]
    for task, found in statistics.items():
        lacking = [] if found is None else [name for name in matrices if name not in found]
        unread = [name for name in lacking if name in of_mixtures]
        if unread:
            why = "its samples' tokens did not come to them; more samples reach more"
            if len(unread) == len(of_mixtures):
                why = "this model does not say which tokens come to which expert"
            warn(
                f"'{task}': no statistics for {len(unread)} of {len(of_mixtures)} matrices of mixtures' experts, "
                f"which are merged without any: {why}."
            )
        if lacking := [name for name in lacking if name in plan.base.linear]:
            some = ", ".join(lacking[:3])
            warn(f"'{task}': {len(lacking)} linear maps have no statistics ({some}) and are merged without any.")


def calibrated_widths(plan: MergePlan) -> dict[str, int]:
    """The linear maps that are merged with statistics, each of a mixture by itself, and how many inputs each has."""
    return {
        matrix: width_of(plan.base.shape(name), linear)
        for name, linear in plan.base.linear.items()
        if name in plan.heads.shared
        for matrix in matrix_names(name, linear)
    }
