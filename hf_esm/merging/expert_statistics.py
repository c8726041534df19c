"""Each expert's statistics: given, found beside its weights, or collected."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

from accelerate import Accelerator

from ..calibration import ActivationStatistics, Reading, calibrate_checkpoint, pool_inputs
from ..checkpoints import STATISTICS_FILE, ModelSource
from ..data import Sample, encode, is_samples_file, read_rows
from ..errors import HfEsmError
from ..methods import MergeMethod
from ..planning import MergeOptions, MergePlan, calibrated_widths
from ..utils import atomic_file, together


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
            beside = sources[task].folder and sources[task].folder / STATISTICS_FILE
            if not beside or not beside.is_file():
                raise HfEsmError(
                    f"{expert.title}: no calibration samples, and no {STATISTICS_FILE} beside its weights. Give about "
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
    if method.needs_features:
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
    return not is_samples_file(path) if path.suffix == ".safetensors" else (path / STATISTICS_FILE).is_file()


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


def calibrate_experts(
    plan: MergePlan,
    samples: dict[str, list[Sample]],
    options: MergeOptions,
    accelerator: Accelerator,
    scratch: Path,
    with_base: bool,
    progress: Callable[[Iterable], Iterable],
) -> dict[str, ActivationStatistics]:
    """The statistics of every expert that has samples, one model in memory at a time; each is a file when the next
    begins. Those that an interrupted merge left in `resume_dir` are taken from there.

    Args:
        scratch: folder for what is not kept in `statistics_dir`.
        with_base: whether what the base's blocks read belongs to them.
    """
    kept = Path(options.statistics_dir).expanduser() if options.statistics_dir else None
    direct = kept and not options.resume_dir
    paths = {t: kept / f"{t}.safetensors" if direct else scratch / f"statistics-{t}.safetensors" for t in samples}
    done = {task for task, path in paths.items() if options.resume_dir and path.is_file()}
    waiting = {task: rows for task, rows in samples.items() if task not in done}
    pooled = pool_inputs(plan.base, waiting if with_base else {}, options, accelerator, scratch)
    readings: dict[Any, Reading] = {}
    for task, rows in progress(waiting.items()):
        found = calibrate_checkpoint(plan.experts[task], rows, options, accelerator, scratch, task, readings)
        found.pooled = pooled.get(task, {})
        with together(accelerator):
            if accelerator.is_main_process:
                found.save(paths[task], compact=kept is not None)
        del found
    if kept and options.resume_dir:
        with together(accelerator):
            for task, path in paths.items() if accelerator.is_main_process else ():
                with atomic_file(kept / f"{task}.safetensors") as partial:
                    shutil.copy2(path, partial)
        paths = {task: kept / f"{task}.safetensors" for task in paths}
    return {task: ActivationStatistics.load(path) for task, path in paths.items()}
