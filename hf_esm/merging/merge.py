"""`merge_models`: several fine-tunes of one checkpoint in, one merged model out."""

import logging
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

from accelerate import Accelerator
from accelerate.utils import tqdm
from transformers import PreTrainedModel

from ..architecture import is_routable
from ..calibration.calibrator import calibrate_experts
from ..calibration.placement import algebra_device, factor_bytes
from ..calibration.statistics import ActivationStatistics
from ..checkpoints import ModelSource, open_checkpoint, publish_folder, resolve_source, staging_folder
from ..errors import HfEsmError
from ..hub.hashes import write_hashes
from ..hub.push import push_folder
from ..methods import ROUTED, describe_method, resolve_method
from ..metrics.metric import resolve_metric
from ..planning.arguments import (
    check_arguments,
    check_statistics,
    differing_processors,
    find_processors,
    gather_statistics,
    name_experts,
    read_validation,
    taken_of_others,
    torch_dtype,
)
from ..planning.heads import load_task_model
from ..planning.options import MergeOptions
from ..planning.plan import MergePlan, check_disk, check_memory, check_values, plan_merge
from ..routing.experts import write_experts
from ..routing.model import RoutedModel
from ..tuners.routed import DECIDING, check_separable
from ..utils.distributed import default_accelerator, gather, main_first, together
from ..utils.fingerprints import model_identity
from ..utils.resume import Work
from ..utils.sizes import bytes_of, readable
from ..version import __version__
from .alpha import CandidateModels, score_candidates, search_alpha
from .learning import learn_mask
from .output import write_files, write_model
from .weights import MergedUpdates, WeightReport, merge_weights, scale_layers


logger = logging.getLogger(__name__)


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
        if not isinstance(method, ROUTED):
            raise HfEsmError(
                f"Method {method.name!r} has no experts, so no rank. Leave it out, or use 'esm++' or 'tsv-c'."
            )
        method = replace(method, rank=options.rank)
    accelerator = accelerator or default_accelerator()
    run = _Run(options, accelerator, callback)
    experts = name_experts(experts)
    check_arguments(options, method, experts, calibration, validation, score_fn, processor)
    open_options = {
        "token": token,
        "allow_pickle": options.allow_pickle,
        "trust_remote_code": options.trust_remote_code,
    }

    def read_headers() -> tuple[dict[str, ModelSource], MergePlan]:
        sources = {"base": resolve_source(base, "base", **open_options)}
        sources |= {task: resolve_source(spec, f"expert '{task}'", **open_options) for task, spec in experts.items()}
        opened = open_checkpoint(sources["base"], headers_only=dry_run)
        checkpoints = {task: open_checkpoint(sources[task], opened, dry_run) for task in experts}
        if isinstance(method, ROUTED) and method.router in DECIDING:
            for checkpoint in (opened, *checkpoints.values()):
                check_separable(checkpoint.skeleton)
        plan = plan_merge(opened, checkpoints, method, options.heads, torch_dtype(options.dtype), sources)
        if isinstance(method, ROUTED) and not any(is_routable(n, opened.linear.get(n)) for n in plan.heads.shared):
            raise HfEsmError(f"{opened.title} has no linear maps to route experts on. Merge it by another method.")
        return sources, plan

    with run.stage("reading headers", joined=False):
        sources, plan = main_first(accelerator, read_headers)
    output = Path(options.output_dir).expanduser() if options.output_dir else None
    if dry_run:
        plan.warnings += [*_noticed(plan, options, validation, score_fn), *_lacking(plan, output, options.max_memory)]
        return plan
    for warning in [*plan.warnings, *_noticed(plan, options, validation, score_fn)]:
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
        work = _work(plan, sources, statistics, samples, options, accelerator)
        work.check()
    with run.stage("checking weights"):
        check_values(plan, run.progress("Checking weights"))

    with ExitStack() as stack:
        folder = _shared_folder(stack, output, accelerator)
        scratch = work.folder or folder / ".scratch"
        stack.callback(work.release)
        with together(accelerator):
            if accelerator.is_main_process:
                if options.resume_dir:
                    work.begin(folder)
                else:
                    scratch.mkdir()
        with run.stage("calibrating", joined=False):
            routed = isinstance(method, ROUTED)
            keep_base = options.statistics_dir or (routed and method.router == "discriminant")
            if method.needs_statistics:
                progress = run.progress("Calibrating")
                statistics |= calibrate_experts(plan, samples, options, accelerator, scratch, keep_base, progress)
        check_statistics(plan, statistics, run.warn)
        if method.needs_samples:
            with run.stage("learning", joined=False):
                method.learned = learn_mask(
                    plan,
                    samples,
                    accelerator,
                    batch_size=options.batch_size,
                    seed=options.seed,
                    folder=scratch if options.resume_dir else None,
                    progress=run.progress,
                )
        with run.stage("merging"):
            rank, size = accelerator.process_index, accelerator.num_processes
            reports = merge_weights(
                plan,
                statistics,
                scratch,
                rank,
                size,
                run.progress("Merging"),
                bytes_of(options.max_memory, "max_memory") if options.max_memory else None,
                resumable=options.resume_dir is not None,
                device=algebra_device(accelerator),
            )
        reports = {name: report for part in gather(accelerator, reports) for name, report in part.items()}
        scale_layers(reports, method, {name for name in reports if _is_matrix(plan, name)})
        with run.stage("choosing alpha"):
            updates = MergedUpdates(plan.base, reports, sorted(scratch.glob("updates-*.safetensors")))
            alpha, scores = _choose_alpha(plan, updates, labelled, score_fn, accelerator, run)
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
        if routed:
            with run.stage("adding experts", joined=False):
                write_experts(
                    folder, scratch, plan, updates, alpha, statistics, samples, accelerator, options, run.progress
                )
        with run.stage("publishing"):
            if accelerator.is_main_process:
                shutil.rmtree(folder / ".scratch", ignore_errors=True)
                if routed:
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


@dataclass
class MergeResult:
    """What a merge did.

    Attributes:
        output_dir: folder with the merged model (a temporary one, gone with this object, if none was asked for).
        alpha: scale of the merged update.
        alpha_scores: mean validation score by α, if it was searched.
        weights: what became of each merged weight: rule, norms, scales, energy kept.
        seconds: time by stage.
        warnings: what was noticed on the way.
        plan: the checks' outcome: models, commits, heads, method.
    """

    output_dir: Path
    alpha: float
    alpha_scores: dict[float, float]
    weights: list[WeightReport]
    seconds: dict[str, float]
    warnings: list[str]
    plan: MergePlan
    _temporary: Any = field(default=None, repr=False)

    def load_model(self, **kwargs: Any) -> PreTrainedModel:
        """The merged model, in the base's class; `kwargs` go to `from_pretrained`."""
        return type(self.plan.base.skeleton).from_pretrained(self.output_dir, **kwargs)

    def load_task_model(self, task: str, **kwargs: Any) -> PreTrainedModel:
        """The merged body with the head of one task; see `heads.load_task_model`."""
        return load_task_model(self.output_dir, task, **kwargs)

    def load_routed(self, **kwargs: Any) -> RoutedModel:
        """The merged model with its experts, if the method was ESM++; see `RoutedModel.from_pretrained`."""
        return RoutedModel.from_pretrained(self.output_dir, **kwargs)

    def push_to_hub(self, repo_id: str, *, private: Optional[bool] = None, token: Any = None, **kwargs: Any) -> Any:
        """Upload the merged model, its heads, card and recipe. Calibration samples stay here."""
        return push_folder(self.output_dir, repo_id, private=private, token=token, **kwargs)

    def __str__(self) -> str:
        how = Counter(report.how for report in self.weights)
        lines = [f"{self.plan.method.name}: {len(self.plan.experts)} experts merged, alpha {self.alpha:g}"]
        rules = [f"{count} unchanged" if rule == "unchanged" else f"{count} by {rule}" for rule, count in how.items()]
        lines.append("  weights  " + ", ".join(rules))
        energies = [value for report in self.weights for value in report.energy_kept.values()]
        if energies:
            lines.append(f"  energy   {sum(energies) / len(energies):.1%} of the output shifts kept on average")
        lines.append("  time     " + ", ".join(f"{stage} {value:.1f} s" for stage, value in self.seconds.items()))
        lines += [f"  warning  {warning}" for warning in self.warnings]
        return "\n".join([*lines, f"  written  {self.output_dir}"])


def _noticed(plan: MergePlan, options: MergeOptions, validation: Any, score_fn: Any) -> list[str]:
    """What was given in vain, and what takes more memory than was allowed."""
    given = [name for name, value in (("validation", validation), ("score_fn", score_fn)) if value is not None]
    found = [f"{name} is only used with alpha='auto'." for name in given if options.alpha != "auto"]
    if options.max_memory and plan.output_bytes > bytes_of(options.max_memory, "max_memory"):
        whole = {"alpha='auto'": options.alpha == "auto", plan.method.name: isinstance(plan.method, ROUTED)}
        size = readable(plan.output_bytes)
        found += [f"{what}: holds the whole merged model, {size} or more, in memory." for what in whole if whole[what]]
    return found


def _lacking(plan: MergePlan, output: Optional[Path], max_memory: Any) -> list[str]:
    """What would stop the merge: too little memory or disk."""
    found = []
    for check in (partial(check_memory, plan, max_memory), partial(check_disk, plan, output) if output else None):
        try:
            if check is not None:
                check()
        except HfEsmError as error:
            found.append(str(error))
    return found


class _Run:
    """Stages, times, warnings and progress of one merge."""

    def __init__(self, options: MergeOptions, accelerator: Accelerator, callback: Optional[Callable]):
        self.options, self.accelerator, self.callback = options, accelerator, callback
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []

    @contextmanager
    def stage(self, name: str, joined: bool = True) -> Iterator[None]:
        """Time a stage, which all processes leave together; `joined=False` where the work inside sees to that."""
        start = time.perf_counter()
        with together(self.accelerator) if joined else nullcontext():
            yield
        self.seconds[name] = time.perf_counter() - start

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        if self.accelerator.is_main_process:
            logger.warning(message)

    def progress(self, description: str) -> Callable[[Iterable], Iterator]:
        """A wrapper for iterables: a named bar on the main process, and the caller's callback."""

        def wrap(items: Any) -> Iterator:
            items = list(items)
            bar = tqdm(items, desc=description, disable=not self.options.progress or not items)
            for done, item in enumerate(bar):
                yield item
                if self.callback is not None and self.accelerator.is_main_process:
                    self.callback(description, done + 1, len(items))

        return wrap


def _shared_folder(stack: ExitStack, output: Optional[Path], accelerator: Accelerator) -> Path:
    """A folder that all processes work in, removed in the end: beside the output, else a temporary one."""
    folder = None
    with together(accelerator):
        if accelerator.is_main_process:
            place = output or Path(tempfile.gettempdir()) / "hf_esm"
            folder = stack.enter_context(staging_folder(place))
    return gather(accelerator, folder)[0]


def _work(
    plan: MergePlan,
    sources: Mapping[str, Any],
    statistics: Mapping[str, Optional[ActivationStatistics]],
    samples: Mapping[str, list],
    options: MergeOptions,
    accelerator: Accelerator,
) -> Work:
    """Work in progress, and all that it depends on."""
    if not options.resume_dir:
        return Work(None, {})
    identities = {name: model_identity(source) for name, source in sources.items()}
    found = {t: [asdict(s.provenance), s.keys_of, s.means()] for t, s in statistics.items() if s}
    return Work(
        options.resume_dir,
        {
            "the base": identities.pop("base"),
            "experts": identities,
            "samples or statistics": [found, samples],
            "the method or its settings": describe_method(plan.method),
            "heads": options.heads,
            "a batch_size": options.batch_size,
            "a seed": options.seed,
            "a number of processes": accelerator.num_processes,
            "a version": __version__,
        },
    )


def _is_matrix(plan: MergePlan, name: str) -> bool:
    return name in plan.base.linear or len(plan.base.shape(name)) == 2


def _choose_alpha(
    plan: MergePlan, updates: MergedUpdates, labelled: dict, score_fn: Any, accelerator: Accelerator, run: _Run
) -> tuple[float, dict[float, float]]:
    """The given α, the method's own, or the best on validation, which the main process alone looks for."""
    alpha = run.options.alpha
    if alpha != "auto" or not accelerator.is_main_process:
        return plan.method.default_alpha if alpha in (None, "auto") else float(alpha), {}
    models = CandidateModels(plan, accelerator.device, whole=callable(score_fn))
    metric = resolve_metric(run.options.metric)

    def score(candidate: float) -> float:
        models.set_alpha(updates, candidate)
        scores = score_candidates(models, labelled, score_fn, metric, run.options.batch_size)
        return sum(scores.values()) / len(scores)

    share = score_fn is None and metric.is_share
    rows = sum(len(data.labels) for data in labelled.values()) if share else None
    progress = run.progress("Choosing alpha")
    return search_alpha(score, progress, default=plan.method.default_alpha, rows=rows)
