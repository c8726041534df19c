"""What the experts of a merge read: samples, and statistics that are passed, stored with the weights, or collected."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Optional

from accelerate import Accelerator

from ..architecture import reads_prompts
from ..calibration import ActivationStatistics, Reading, calibrate_checkpoint, pool_inputs
from ..checkpoints import STATISTICS_FILE, ExpertLoader, ModelSource
from ..data import Sample, encode, is_samples_file, prompts_of, read_rows, sample_fingerprint
from ..errors import HfEsmError
from ..metrics import ExpertAnswers, LabelledSamples
from ..planning import MergeData, MergeOptions, MergePlan, calibrated_widths, counted_rows
from ..utils import atomic_file, check_known, fingerprint, gather, together
from .cache import InputCache, readable_statistics


@dataclass(frozen=True)
class Inputs:
    """What a merge reads besides weights. All mappings are by task.

    Attributes:
        processors: tokenizer or processor of each expert; that of the merged model has the key `"base"`.
        statistics: activation statistics, or None where there are none (yet).
        samples: encoded samples of the experts that have no statistics, and of all experts if the method learns.
        agreement_samples: other encoded samples, on which the merged model is compared with the experts. Empty if
            agreement is not used, or a task has none.
        labelled: encoded validation rows with their labels, if alpha is searched on them.
        answers: every expert's answers on its `agreement_samples`, once the experts were asked.
    """

    processors: Mapping[str, Any]
    statistics: Mapping[str, Optional[ActivationStatistics]]
    samples: Mapping[str, list[Sample]]
    agreement_samples: Mapping[str, list[Sample]] = field(default_factory=dict)
    labelled: Mapping[str, LabelledSamples] = field(default_factory=dict)
    answers: Mapping[str, ExpertAnswers] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What a merge uses of its samples.

    Attributes:
        statistics: activation statistics of every expert.
        samples: the samples themselves, of every expert, all of them, to learn a mask on.
        features: the pooled features of the base, which a router is made from.
        agreement: whether samples are set apart for agreement: `"halves"`, even if half of a few samples is left for
            statistics; `"rest"`, only those that statistics do not take; `""`, none.
    """

    statistics: bool = False
    samples: bool = False
    features: bool = False
    agreement: str = ""


STATISTICS_SAMPLES = 32  # per task, by default


@dataclass(frozen=True)
class Gathered:
    """Statistics that exist, and encoded samples; see `Inputs`."""

    statistics: dict[str, Optional[ActivationStatistics]]
    samples: dict[str, list[Sample]]
    agreement_samples: dict[str, list[Sample]]


def gather_statistics(
    plan: MergePlan,
    sources: Mapping[str, ModelSource],
    data: MergeData,
    processors: Mapping[str, Any],
    options: MergeOptions,
    needs: Needs = Needs(statistics=True),
) -> Gathered:
    """Return the statistics that exist, and the encoded samples: of tasks without statistics, and for agreement.

    If a task has no samples for agreement, no samples are set apart. Agreement with a task of weight 0 or below is no
    aim.

    Raises:
        HfEsmError: if a task lacks what the merge needs, or if its statistics do not fit the plan.
    """
    gathered = Gathered(dict.fromkeys(plan.experts), {}, {})
    counted = bool(plan.base.embeddings & set(plan.heads.shared))
    required = needs.statistics or needs.samples
    wanted = {task for task, weight in zip(plan.experts, plan.weights, strict=True) if weight > 0}
    for task, expert in plan.experts.items():
        calibration = data.calibration_of(task)
        if not required and not needs.agreement and (calibration is None or not counted):
            continue
        statistics, rows = statistics_and_samples(calibration)
        if needs.samples:
            _check_samples(plan, task, rows)
        existing = _existing_statistics(plan, sources[task], task, statistics, rows, options, needs)
        if existing is not None:
            existing.check_fits(calibrated_widths(plan), task, counted_rows(plan, task))
        gathered.statistics[task] = existing
        if rows is None or (existing is not None and not needs.agreement and not needs.samples):
            continue
        title = f"calibration of '{task}'"
        several = needs.agreement or needs.samples
        chosen = read_rows(rows, title, options if several else _for_statistics(options))
        prompts = needs.samples and reads_prompts(expert.skeleton)
        encoded = encode(chosen, processors[task], expert.config, title, options, with_targets=prompts)
        encoded = prompts_of(encoded, title) if prompts else encoded
        learned, apart = encoded, []
        if needs.agreement:
            most = len(encoded) if needs.samples else STATISTICS_SAMPLES
            learned, apart = _set_apart(encoded, existing, options, needs.agreement, most)
        if existing is None or needs.samples:
            gathered.samples[task] = learned
        if apart and task in wanted:
            gathered.agreement_samples[task] = apart
    if needs.features:
        _check_features(gathered.statistics)
    if needs.agreement and (not wanted or gathered.agreement_samples.keys() != wanted):
        return gather_statistics(plan, sources, data, processors, options, replace(needs, agreement=""))
    return gathered


def _for_statistics(options: MergeOptions) -> MergeOptions:
    """Return the options of reading the samples of statistics alone."""
    most = STATISTICS_SAMPLES if options.statistics_samples is None else options.statistics_samples
    return replace(options, num_samples=min(options.num_samples or most, most)) if most else options


def _set_apart(
    samples: list[Sample],
    statistics: Optional[ActivationStatistics],
    options: MergeOptions,
    how: str,
    most: int = STATISTICS_SAMPLES,
) -> tuple[list[Sample], list[Sample]]:
    """Return samples for statistics, `most` by default, and others for agreement, drawn by seed whatever their order
    is; where there are statistics, all that these were not taken from are for agreement.

    A least-squares merge fits the samples of its statistics: on those it agrees more than it does elsewhere.
    """
    learned, apart = samples, samples
    if statistics is None:
        count = options.statistics_samples
        if count is None:
            count = min(most, (len(samples) + 1) // 2 if how == "halves" else len(samples))
        count = count or len(samples)
        drawn = sorted(samples, key=lambda sample: fingerprint([options.seed, sample_fingerprint(sample)]))
        learned, apart = drawn[:count], drawn[count:]
    known = map(sample_fingerprint, learned) if statistics is None else statistics.provenance.samples
    seen = set(known)
    return learned, [sample for sample in apart if sample_fingerprint(sample) not in seen]


def statistics_and_samples(calibration: Any) -> tuple[Any, Any]:
    """Return the statistics and the samples that a caller passes for one task; None for what is not passed."""
    if isinstance(calibration, Mapping) and (
        calibration.keys() == {"samples"}
        or "statistics" in calibration
        or any(isinstance(value, ActivationStatistics) for value in calibration.values())
    ):
        check_known(calibration, ("statistics", "samples"), "key", "`calibration`")
        return calibration.get("statistics"), calibration.get("samples")
    if isinstance(calibration, ActivationStatistics) or _is_statistics_file(calibration):
        return calibration, None
    return None, calibration


def _check_samples(plan: MergePlan, task: str, rows: Any) -> None:
    """Raise an error unless there are samples of a task."""
    if rows is None:
        raise HfEsmError(
            f"{plan.experts[task].title}: {plan.method.name} learns from the samples themselves. Pass unlabelled "
            "inputs of the task as its `calibration`, not statistics."
        )


def _existing_statistics(
    plan: MergePlan,
    source: ModelSource,
    task: str,
    statistics: Any,
    rows: Any,
    options: MergeOptions,
    needs: Needs,
) -> Optional[ActivationStatistics]:
    """Return the statistics that a task has, and None if they are collected on its samples.

    Statistics beside the expert's weights serve where there are no samples, or where samples are for agreement and the
    file tells which samples it was made from.
    """
    if isinstance(statistics, ActivationStatistics):
        return statistics
    if statistics is not None:
        return ActivationStatistics.load(Path(statistics).expanduser())
    stored = source.folder / STATISTICS_FILE if source.folder and needs.statistics else None
    if stored is not None and stored.is_file():
        existing = ActivationStatistics.load(stored)
        if rows is None or (
            needs.agreement and existing.provenance.samples and (existing.pooled or not needs.features)
        ):
            return existing
    elif rows is None and needs.statistics:
        raise HfEsmError(
            f"{plan.experts[task].title} has no `calibration`, and its folder has no {STATISTICS_FILE}. Pass about "
            f"{options.num_samples or STATISTICS_SAMPLES} unlabelled inputs of the task, or choose a method that "
            "needs none, such as `method='tsv-m'`."
        )
    return None


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

    places = {name: place(source.name) for name, source in sources.items()}
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
    with_features: bool = False,
    *,
    cache: Optional[InputCache] = None,
) -> dict[str, ActivationStatistics]:
    """Return the statistics of every expert that has samples. One model is in memory at a time.

    The statistics of an expert are a file before the next expert is loaded. Files that an interrupted merge left in
    `options.resume_dir`, and files in the cache, are used again. Statistics that are kept, or that make a router,
    include the features of the base.

    Args:
        scratch: folder for statistics that are not kept in `options.statistics_dir`.
        with_features: include the features of the base even if the statistics are not kept.
        cache: keeps the statistics for other merges.
    """
    paths = {task: scratch / f"statistics-{task}.safetensors" for task in samples}
    folder = Path(options.statistics_dir).expanduser() if options.statistics_dir else None
    saved = {task: folder / f"{task}.safetensors" for task in samples} if folder else {}
    cached = {task: cache.statistics(task, rows) for task, rows in samples.items()} if cache else {}
    if (saved or cached) and not options.resume_dir:
        paths = cached or saved
    known = [task for task, path in cached.items() if readable_statistics(path)]
    known = gather(accelerator, known)[0]  # one answer for all processes, which calibrate together
    paths |= {task: cached[task] for task in known}
    done = {*known, *(task for task, path in paths.items() if options.resume_dir and path.is_file())}
    waiting = {task: rows for task, rows in samples.items() if task not in done}
    with_base = bool(saved or cached) or with_features
    read = {task: plan.in_merged_tokens(task, rows) for task, rows in waiting.items()} if with_base else {}
    pooled = pool_inputs(plan.base, read, options, accelerator, scratch)
    readings: dict[Any, Reading] = {}
    loader = ExpertLoader()
    for task, rows in progress(waiting.items()):
        collected = calibrate_checkpoint(
            plan.experts[task], rows, options, accelerator, scratch, task, readings, loader=loader
        )
        collected.pooled = pooled.get(task, {})
        with together(accelerator):
            if accelerator.is_main_process:
                collected.save(paths[task], compact=bool(saved or cached))
        del collected
    with together(accelerator):
        for task, path in paths.items() if accelerator.is_main_process else ():
            for place in (files[task] for files in (saved, cached) if files and files[task] != path):
                with atomic_file(place) as partial:
                    shutil.copy2(path, partial)
    paths = saved or cached or paths
    return {task: ActivationStatistics.load(path) for task, path in paths.items()}


def count_tokens(
    plan: MergePlan,
    samples: Mapping[str, list[Sample]],
    options: MergeOptions,
    accelerator: Accelerator,
    scratch: Path,
    cache: Optional[InputCache] = None,
) -> dict[str, ActivationStatistics]:
    """Return token counts alone of every expert, for methods that need no other statistics; of an expert that has
    statistics in the cache, these.
    """
    loader = ExpertLoader()
    paths = {task: cache.statistics(task, rows) for task, rows in samples.items()} if cache else {}
    known = gather(accelerator, [task for task, path in paths.items() if readable_statistics(path)])[0]
    return {
        task: ActivationStatistics.load(paths[task])
        if task in known
        else calibrate_checkpoint(
            plan.experts[task], rows, options, accelerator, scratch, task, counts_only=True, loader=loader
        )
        for task, rows in samples.items()
    }
