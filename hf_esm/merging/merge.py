"""`merge_models`: several fine-tunes of one checkpoint in, one merged model out."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Optional

from accelerate import Accelerator

from ..architecture import is_routable
from ..calibration import factor_bytes
from ..checkpoints import Access, ModelSource, differing_processors, find_processors, open_checkpoint, resolve_source
from ..errors import HfEsmError
from ..hub import write_hashes
from ..methods import resolve_method
from ..planning import (
    MergeData,
    MergeOptions,
    MergePlan,
    check_arguments,
    check_disk,
    check_memory,
    check_values,
    name_experts,
    plan_merge,
    torch_dtype,
)
from ..tuners.routed import check_separable
from ..utils import bytes_of, default_accelerator, gather, main_first, publish_folder, together
from .alpha import choose_alpha, read_validation
from .expert_statistics import calibrate_experts, check_statistics, gather_statistics, taken_of_others
from .learning import learn_mask
from .output import write_files, write_model
from .result import MergeResult
from .routed_experts import write_experts
from .run import MergeRun, lacking_resources, notices, shared_folder, work_in_progress
from .updates import MergedUpdates
from .weights import Worker, merge_weights, scale_layers, whole_updates


def merge_models(
    base: Any,
    experts: Any,
    *,
    calibration: Any = None,
    validation: Optional[Mapping[str, Any]] = None,
    score_fn: Optional[Callable[[Any], float] | Mapping[str, Callable[[Any], float]]] = None,
    processor: Any = None,
    token: Optional[str | bool] = None,
    callback: Optional[Callable[[str, int, int], None]] = None,
    accelerator: Optional[Accelerator] = None,
    dry_run: bool = False,
    **options: Any,
) -> "MergeResult | MergePlan":
    """Merge fine-tunes of one checkpoint into one model, without training.

    Args:
        base: the checkpoint that the experts were tuned from: a Hub id (`"me/model"`, `"me/model@revision"`), a
            folder, `{"path": …, "revision": …}`, or a live `PreTrainedModel`.
        experts: by task name, the same, or the folder or id of a PEFT LoRA adapter. At least two.
        calibration: by task name, unlabelled proxy samples: strings, pairs of strings, rows (`text`, `text_pair`,
            `image`, `audio`, or the columns that `columns` names), ready model inputs (`input_ids`, …), images, a
            `datasets.Dataset`, a `DataLoader`, a data file, `{"path": …}` for `datasets.load_dataset`; or
            `ActivationStatistics`, or the path of a statistics file. Or the one folder that `statistics_dir` named
            in an earlier merge. Not needed for experts that have a statistics file beside their weights, nor by
            methods that use none.
        validation: by task name, labelled rows (column `label`), for `alpha="auto"`.
        score_fn: used by `alpha="auto"` instead: called with the merged model, or, given by task name, with each
            task's model; higher is better.
        processor: tokenizer or processor, where none stands beside the models.
        token: access token for the Hub.
        callback: called on the main process as `callback(stage, done, total)`.
        accelerator: the Accelerate instance to run under; by default a new one.
        dry_run: stop after the checks that need no weights, and return the `MergePlan`.
        options: fields of `MergeOptions`: `method`, `alpha`, `heads`, `output_dir`, `num_samples`, …

    Returns a `MergeResult`, the same on every process.

    Raises:
        HfEsmError: on input that cannot be merged, before any long work; nothing is left at `output_dir`.
    """
    unknown = options.keys() - {f.name for f in fields(MergeOptions)}
    if unknown:
        raise TypeError(f"merge_models has no argument {sorted(unknown)[0]!r}")
    options = MergeOptions(**options)
    method = resolve_method(options.method)
    if options.rank is not None:
        method = method.with_rank(options.rank)
    accelerator = accelerator or default_accelerator()
    run = MergeRun(options, accelerator, callback)
    experts = name_experts(experts)
    check_arguments(options, method, experts, MergeData(calibration, validation, score_fn, processor))
    access = Access(token, options.allow_pickle, options.trust_remote_code)

    def read_headers() -> tuple[dict[str, ModelSource], MergePlan]:
        sources = {"base": resolve_source(base, "base", access)}
        sources |= {task: resolve_source(spec, f"expert '{task}'", access) for task, spec in experts.items()}
        opened = open_checkpoint(sources["base"], headers_only=dry_run)
        checkpoints = {task: open_checkpoint(sources[task], opened, dry_run) for task in experts}
        if method.decides:
            for checkpoint in (opened, *checkpoints.values()):
                check_separable(checkpoint.skeleton)
        plan = plan_merge(opened, checkpoints, method, options.heads, torch_dtype(options.dtype), sources)
        if method.routes and not any(is_routable(n, opened.linear.get(n)) for n in plan.heads.shared):
            raise HfEsmError(f"{opened.title} has no linear maps to route experts on. Merge it by another method.")
        return sources, plan

    with run.stage("reading headers", joined=False):
        sources, plan = main_first(accelerator, read_headers)
    output = Path(options.output_dir).expanduser() if options.output_dir else None
    if dry_run:
        plan.warnings += [
            *notices(plan, options, validation, score_fn),
            *lacking_resources(plan, output, options.max_memory),
        ]
        return plan
    for warning in [*plan.warnings, *notices(plan, options, validation, score_fn)]:
        run.warn(warning)
    if output is not None and (live := [source.title for source in sources.values() if source.model is not None]):
        run.warn(f"{', '.join(live)}: given live, so that the recipe names what was loaded, not what became of it.")

    def read_samples() -> tuple[dict, dict, dict, dict]:
        check_memory(plan, options.max_memory)
        processors = find_processors(sources, processor, options.trust_remote_code)
        statistics, samples = gather_statistics(plan, sources, calibration, processors, method, options)
        if output is not None:
            to_calibrate = samples if method.needs_statistics else {}
            factors = sum(factor_bytes(plan.experts[t], rows, shared=True) for t, rows in to_calibrate.items())
            check_disk(plan, output, factors, options.statistics_dir, options.resume_dir)
        labelled = read_validation(plan, validation, processors, options) if options.alpha == "auto" else {}
        return processors, statistics, samples, labelled

    with run.stage("reading samples", joined=False):
        processors, statistics, samples, labelled = main_first(accelerator, read_samples)
    for warning in differing_processors(processors, plan.experts):
        run.warn(warning)
    for warning in taken_of_others(statistics, sources):
        run.warn(warning)
    with together(accelerator):
        work = work_in_progress(plan, sources, statistics, samples, options, accelerator)
        work.check()
    with run.stage("checking weights"):
        check_values(plan, run.progress("Checking weights"))

    with ExitStack() as stack:
        folder = shared_folder(stack, output, accelerator)
        scratch = work.folder or folder / ".scratch"
        stack.callback(work.release)
        with together(accelerator):
            if accelerator.is_main_process:
                if options.resume_dir:
                    work.begin(folder)
                else:
                    scratch.mkdir()
        with run.stage("calibrating", joined=False):
            keep_base = options.statistics_dir or method.needs_features
            if method.needs_statistics:
                progress = run.progress("Calibrating")
                statistics |= calibrate_experts(plan, samples, options, accelerator, scratch, keep_base, progress)
        check_statistics(plan, statistics, run.warn)
        learn = partial(
            learn_mask,
            plan,
            samples,
            accelerator,
            batch_size=options.batch_size,
            seed=options.seed,
            folder=scratch if options.resume_dir else None,
            progress=run.progress,
        )
        with run.stage("preparing", joined=not method.needs_samples):
            thresholds = method.prepare(whole_updates(plan, learn, run.progress("Preparing")))
        with run.stage("merging"):
            rank, size = accelerator.process_index, accelerator.num_processes
            max_memory = bytes_of(options.max_memory, "max_memory") if options.max_memory else None
            reports = merge_weights(
                plan,
                statistics,
                scratch,
                worker=Worker.of(accelerator, max_memory),
                thresholds=thresholds,
                resumable=options.resume_dir is not None,
                progress=run.progress("Merging"),
            )
        reports = {name: report for part in gather(accelerator, reports) for name, report in part.items()}
        scale_layers(reports, method, {name for name in reports if is_matrix(plan, name)})
        with run.stage("choosing alpha"):
            updates = MergedUpdates(plan.base, reports, sorted(scratch.glob("updates-*.safetensors")))
            alpha, scores = choose_alpha(plan, updates, labelled, score_fn, accelerator, run)
        alpha, scores = gather(accelerator, (alpha, scores))[0]
        result = MergeResult(
            folder,
            alpha,
            scores,
            [reports[name] for name in plan.base.names if name in reports],
            run.seconds,
            run.warnings,
            plan,
        )
        with run.stage("writing"):
            write_model(folder, plan, updates, alpha, options, run.progress("Writing"), rank, size)
            if accelerator.is_main_process:
                write_files(folder, plan, sources, processors, samples, statistics, calibration, options, result)
        if method.routes:
            with run.stage("adding experts", joined=False):
                write_experts(
                    folder, scratch, plan, updates, alpha, statistics, samples, accelerator, options, run.progress
                )
        with run.stage("publishing"):
            if accelerator.is_main_process:
                shutil.rmtree(folder / ".scratch", ignore_errors=True)
                if method.routes:
                    write_hashes(folder)
                if output is not None:
                    publish_folder(folder, output, options.overwrite)
                if options.resume_dir:
                    work.end()
        if output is None:
            result._temporary = stack.pop_all()
        else:
            result.output_dir = output
    return result


def is_matrix(plan: MergePlan, name: str) -> bool:
    return name in plan.base.linear or len(plan.base.shape(name)) == 2
