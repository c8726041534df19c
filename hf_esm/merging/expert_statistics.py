"""What the experts of a merge read: samples, and statistics that are passed, stored with the weights, or collected."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Optional

from accelerate import Accelerator

from ..calibration import ActivationStatistics, Reading, calibrate_checkpoint, pool_inputs
from ..checkpoints import STATISTICS_FILE, ModelSource
from ..data import Sample, encode, is_samples_file, read_rows
from ..errors import HfEsmError
from ..metrics import LabelledSamples
from ..planning import MergeData, MergeOptions, MergePlan, calibrated_widths
from ..utils import atomic_file, together


@dataclass(frozen=True)
class Inputs:
    """What a merge reads besides weights. All mappings are by task.

    Attributes:
        processors: tokenizer or processor of each expert; that of the merged model has the key `"base"`.
        statistics: activation statistics, or None where there are none (yet).
        samples: encoded samples of the experts that have no statistics, and of all experts if the method learns.
        labelled: encoded validation rows with their labels, if alpha is searched on them.
    """

    processors: Mapping[str, Any]
    statistics: Mapping[str, Optional[ActivationStatistics]]
    samples: Mapping[str, list[Sample]]
    labelled: Mapping[str, LabelledSamples] = field(default_factory=dict)


def gather_statistics(
    plan: MergePlan,
    sources: Mapping[str, ModelSource],
    data: MergeData,
    processors: Mapping[str, Any],
    options: MergeOptions,
) -> tuple[dict[str, Optional[ActivationStatistics]], dict[str, list[Sample]]]:
    """Return the statistics that exist, and the encoded samples of the tasks that have no statistics yet.

    Raises:
        HfEsmError: if a task has neither, or if its statistics do not fit the plan.
    """
    statistics: dict[str, Optional[ActivationStatistics]] = dict.fromkeys(plan.experts)
    samples: dict[str, list[Sample]] = {}
    if not plan.method.needs_statistics and not plan.method.needs_samples:
        return statistics, samples
    for task, expert in plan.experts.items():
        calibration = data.calibration_of(task)
        if plan.method.needs_samples:
            _check_samples(plan, task, calibration)
        statistics[task] = _existing_statistics(plan, sources[task], task, calibration, options)
        if statistics[task] is not None:
            statistics[task].check_fits(calibrated_widths(plan), task)
            continue
        title = f"calibration of '{task}'"
        rows = read_rows(calibration, title, options)
        samples[task] = encode(rows, processors[task], expert.config, title, options)
    if plan.method.needs_features:
        _check_features(statistics)
    return statistics, samples


def _check_samples(plan: MergePlan, task: str, calibration: Any) -> None:
    """Raise an error unless the calibration of a task is samples."""
    if calibration is None or isinstance(calibration, ActivationStatistics) or _is_statistics_file(calibration):
        raise HfEsmError(
            f"{plan.experts[task].title}: {plan.method.name} learns from the samples themselves. Pass unlabelled "
            "inputs of the task as its `calibration`, not statistics."
        )


def _existing_statistics(
    plan: MergePlan, source: ModelSource, task: str, calibration: Any, options: MergeOptions
) -> Optional[ActivationStatistics]:
    """Return the statistics that a task has, and None if its calibration is samples."""
    if isinstance(calibration, ActivationStatistics):
        return calibration
    if calibration is not None:
        is_file = _is_statistics_file(calibration)
        return ActivationStatistics.load(Path(calibration).expanduser()) if is_file else None
    stored = source.folder / STATISTICS_FILE if source.folder else None
    if stored is None or not stored.is_file():
        raise HfEsmError(
            f"{plan.experts[task].title} has no `calibration`, and its folder has no {STATISTICS_FILE}. Pass about "
            f"{options.num_samples or 32} unlabelled inputs of the task, or choose a method that needs none, such as "
            "`method='tsv-m'`."
        )
    return ActivationStatistics.load(stored)


def _check_features(statistics: Mapping[str, Optional[ActivationStatistics]]) -> None:
    """Raise an error if a router cannot be made from statistics that exist already."""
    for task, existing in statistics.items():
        if existing is not None and not existing.pooled:
            raise HfEsmError(
                f"The statistics of '{task}' lack the features of the base that the router is made from. Calibrate "
                "again with the base (`hf-esm calibrate --base`), or pass samples."
            )


def _is_statistics_file(calibration: Any) -> bool:
    if not isinstance(calibration, (str, PathLike)):
        return False
    path = Path(calibration).expanduser()
    return not is_samples_file(path) if path.suffix == ".safetensors" else (path / STATISTICS_FILE).is_file()


def swapped_statistics(
    statistics: Mapping[str, Optional[ActivationStatistics]], sources: Mapping[str, ModelSource]
) -> list[str]:
    """Return a warning for each task whose statistics say that they were collected on another model of the merge."""

    def place(name: Any) -> str:
        return str(Path(name).resolve()) if name and Path(name).exists() else str(name or "")

    places = {name: place(source.repo_id or source.folder) for name, source in sources.items()}
    warnings = []
    for task, existing in statistics.items():
        origin = place(existing.provenance.model) if existing else ""
        elsewhere = {where for name, where in places.items() if name != task and where}
        if origin != places[task] and origin in elsewhere:
            warnings.append(f"'{task}': its statistics were collected on {origin}, another model of this merge.")
    return warnings


def missing_statistics(plan: MergePlan, statistics: Mapping[str, Optional[ActivationStatistics]]) -> list[str]:
    """Return a warning for each task that has no statistics for some linear maps."""
    matrices = calibrated_widths(plan)
    in_mixtures = [name for name in matrices if name not in plan.base.linear]
    warnings = []
    for task, collected in statistics.items():
        missing = [] if collected is None else [name for name in matrices if name not in collected]
        if unread := [name for name in missing if name in in_mixtures]:
            why = "no token of its samples reached them. More samples reach more"
            if len(unread) == len(in_mixtures):
                why = "this model does not report which tokens reach which expert"
            warnings.append(
                f"'{task}': no statistics for {len(unread)} of {len(in_mixtures)} matrices of mixtures' experts, "
                f"which are merged without statistics: {why}."
            )
        if maps := [name for name in missing if name in plan.base.linear]:
            warnings.append(
                f"'{task}': {len(maps)} linear maps have no statistics ({', '.join(maps[:3])}) and are merged without "
                "statistics."
            )
    return warnings


def calibrate_experts(
    plan: MergePlan,
    samples: Mapping[str, list[Sample]],
    options: MergeOptions,
    accelerator: Accelerator,
    scratch: Path,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, ActivationStatistics]:
    """Return the statistics of every expert that has samples. One model is in memory at a time.

    The statistics of an expert are a file before the next expert is loaded. Files that an interrupted merge left in
    `options.resume_dir` are used again. Statistics that are kept, or that make a router, include the features of the
    base.

    Args:
        scratch: folder for statistics that are not kept in `options.statistics_dir`.
    """
    paths = {task: scratch / f"statistics-{task}.safetensors" for task in samples}
    folder = Path(options.statistics_dir).expanduser() if options.statistics_dir else None
    saved = {task: folder / f"{task}.safetensors" for task in samples} if folder else {}
    if saved and not options.resume_dir:
        paths = saved
    done = {task for task, path in paths.items() if options.resume_dir and path.is_file()}
    waiting = {task: rows for task, rows in samples.items() if task not in done}
    with_base = bool(saved) or plan.method.needs_features
    pooled = pool_inputs(plan.base, waiting if with_base else {}, options, accelerator, scratch)
    readings: dict[Any, Reading] = {}
    for task, rows in progress(waiting.items()):
        collected = calibrate_checkpoint(plan.experts[task], rows, options, accelerator, scratch, task, readings)
        collected.pooled = pooled.get(task, {})
        with together(accelerator):
            if accelerator.is_main_process:
                collected.save(paths[task], compact=folder is not None)
        del collected
    if saved and options.resume_dir:
        with together(accelerator):
            for task, path in paths.items() if accelerator.is_main_process else ():
                with atomic_file(saved[task]) as partial:
                    shutil.copy2(path, partial)
        paths = saved
    return {task: ActivationStatistics.load(path) for task, path in paths.items()}
