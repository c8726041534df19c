"""The steps of one merge, with its times, warnings and progress."""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

from accelerate import Accelerator
from accelerate.utils import tqdm

from ..architecture import is_routable
from ..calibration import factor_bytes
from ..checkpoints import (
    Access,
    ModelSource,
    ModelSpec,
    differing_processors,
    find_processors,
    model_identity,
    open_checkpoint,
    resolve_source,
)
from ..errors import HfEsmError
from ..hub import write_hashes
from ..methods import MergeMethod, describe_method
from ..planning import (
    MergeData,
    MergeOptions,
    MergePlan,
    check_disk,
    check_memory,
    check_values,
    plan_merge,
    torch_dtype,
)
from ..tuners.routed import check_separable
from ..utils import (
    Work,
    bytes_of,
    gather,
    main_first,
    publish_folder,
    readable,
    staging_folder,
    together,
)
from ..version import __version__
from .alpha import choose_alpha, read_validation
from .expert_statistics import Inputs, calibrate_experts, gather_statistics, missing_statistics, swapped_statistics
from .learning import learn_mask
from .output import write_files, write_model
from .result import MergeResult
from .routed_experts import write_experts
from .updates import MergedUpdates, WeightReport
from .weights import Worker, merge_weights, scale_layers, whole_updates


logger = logging.getLogger(__name__)


class MergeRun:
    """One merge. All processes call its steps in the order in which they are defined.

    Attributes:
        options: the options of the merge.
        method: the method with its settings.
        data: the caller's data.
        accelerator: the Accelerate instance that all steps run under.
        output: folder that the caller named for the merged model, if any.
        seconds: time by stage, in seconds.
        warnings: messages for the user.
        sources: the models by task, the base as `"base"`; known after `open_models`.
        plan: result of the checks; known after `open_models`.
        work: work in progress in `options.resume_dir`; known after `find_work`.
        folder: where the merged model is written before it is published; known inside `workspace`.
        scratch: where intermediate files are; known inside `workspace`.
    """

    sources: dict[str, ModelSource]
    plan: MergePlan
    work: Work
    folder: Path
    scratch: Path

    def __init__(
        self,
        options: MergeOptions,
        method: MergeMethod,
        data: MergeData,
        accelerator: Accelerator,
        callback: Optional[Callable[[str, int, int], None]] = None,
    ):
        self.options, self.method, self.data = options, method, data
        self.accelerator, self.callback = accelerator, callback
        self.output = Path(options.output_dir).expanduser() if options.output_dir else None
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self._cleanup = ExitStack()

    # What every step uses.

    @contextmanager
    def stage(self, name: str, joined: bool = True) -> Iterator[None]:
        """Time a stage, at whose end all processes wait for each other; `joined=False` if the block does so itself."""
        start = time.perf_counter()
        with together(self.accelerator) if joined else nullcontext():
            yield
        self.seconds[name] = time.perf_counter() - start

    def warn(self, *messages: str) -> None:
        """Record warnings, and log them on the main process."""
        for message in messages:
            self.warnings.append(message)
            if self.accelerator.is_main_process:
                logger.warning(message)

    def progress(self, description: str) -> Callable[[Iterable], Iterator]:
        """Return a wrapper for iterables that shows a bar and calls the caller's callback, on the main process."""

        def wrap(items: Any) -> Iterator:
            items = list(items)
            bar = tqdm(items, desc=description, disable=not self.options.progress or not items)
            for done, item in enumerate(bar):
                yield item
                if self.callback is not None and self.accelerator.is_main_process:
                    self.callback(description, done + 1, len(items))

        return wrap

    # Before any long work.

    def open_models(
        self, base: ModelSpec, experts: Mapping[str, ModelSpec], access: Access, headers_only: bool
    ) -> None:
        """Resolve the models, read their headers, and plan the merge."""
        with self.stage("reading headers", joined=False):
            read = partial(self._read_headers, base, experts, access, headers_only)
            self.sources, self.plan = main_first(self.accelerator, read)

    def _read_headers(
        self, base: ModelSpec, experts: Mapping[str, ModelSpec], access: Access, headers_only: bool
    ) -> tuple[dict[str, ModelSource], MergePlan]:
        sources = {"base": resolve_source(base, "base", access)}
        sources |= {task: resolve_source(spec, f"expert '{task}'", access) for task, spec in experts.items()}
        opened = open_checkpoint(sources["base"], headers_only=headers_only)
        checkpoints = {task: open_checkpoint(sources[task], opened, headers_only) for task in experts}
        if self.method.decides:
            for checkpoint in (opened, *checkpoints.values()):
                check_separable(checkpoint.skeleton)
        dtype = torch_dtype(self.options.dtype)
        plan = plan_merge(opened, checkpoints, self.method, self.options.heads, dtype, sources)
        if self.method.routes and not any(is_routable(n, opened.linear.get(n)) for n in plan.heads.shared):
            raise HfEsmError(f"{opened.title} has no linear maps to route experts on. Merge it by another method.")
        return sources, plan

    def dry_plan(self) -> MergePlan:
        """Return the plan, with warnings of all that would stop the merge or waste its time."""
        self.plan.warnings += [*self._notices(), *self._lacking_resources()]
        return self.plan

    def announce(self) -> None:
        """Warn of what the headers and the arguments show."""
        self.warn(*self.plan.warnings, *self._notices())
        live = [source.title for source in self.sources.values() if source.model is not None]
        if self.output is not None and live:
            self.warn(
                f"{', '.join(live)}: passed as a live model. The recipe names what it was loaded from, which does not "
                "include later changes."
            )

    def _notices(self) -> list[str]:
        """Return warnings of arguments that have no effect, and of steps that need more memory than is allowed."""
        options, plan = self.options, self.plan
        unused = [name for name in ("validation", "score_fn") if getattr(self.data, name) is not None]
        warnings = [f"`{name}` is only used with `alpha='auto'`." for name in unused if options.alpha != "auto"]
        if options.max_memory and plan.output_bytes > bytes_of(options.max_memory, "max_memory"):
            causes = {"`alpha='auto'`": options.alpha == "auto", plan.method.name: plan.method.routes}
            size = readable(plan.output_bytes)
            warnings += [
                f"{cause}: holds the whole merged model in memory, {size} or more."
                for cause in causes
                if causes[cause]
            ]
        return warnings

    def _lacking_resources(self) -> list[str]:
        """Return the errors of a merge that has too little memory or disk."""
        checks = [partial(check_memory, self.plan, self.options.max_memory)]
        checks += [partial(check_disk, self.plan, self.output)] if self.output is not None else []
        errors = []
        for check in checks:
            try:
                check()
            except HfEsmError as error:
                errors.append(str(error))
        return errors

    def read_inputs(self) -> Inputs:
        """Read the statistics that exist, the samples to calibrate on, and the validation rows."""
        with self.stage("reading samples", joined=False):
            inputs = main_first(self.accelerator, self._read_inputs)
        self.warn(*differing_processors(inputs.processors, self.plan.experts))
        self.warn(*swapped_statistics(inputs.statistics, self.sources))
        return inputs

    def _read_inputs(self) -> Inputs:
        plan, options, data = self.plan, self.options, self.data
        check_memory(plan, options.max_memory)
        processors = find_processors(self.sources, data.processor, options.trust_remote_code)
        statistics, samples = gather_statistics(plan, self.sources, data, processors, options)
        if self.output is not None:
            to_calibrate = samples if self.method.needs_statistics else {}
            factors = sum(factor_bytes(plan.experts[task], rows, shared=True) for task, rows in to_calibrate.items())
            check_disk(plan, self.output, factors, options.statistics_dir, options.resume_dir)
        searched = options.alpha == "auto"
        labelled = read_validation(plan, data.validation, processors, options) if searched else {}
        return Inputs(processors, statistics, samples, labelled)

    def find_work(self, inputs: Inputs) -> None:
        """Look for the work of an interrupted merge.

        Raises:
            HfEsmError: if the work depends on other models, samples or settings.
        """
        with together(self.accelerator):
            self.work = Work(self.options.resume_dir, self._dependencies(inputs) if self.options.resume_dir else {})
            self.work.check()

    def _dependencies(self, inputs: Inputs) -> dict[str, Any]:
        """Return all that work in progress depends on, under the names that errors use."""
        identities = {name: model_identity(source) for name, source in self.sources.items()}
        statistics = {t: [asdict(s.provenance), s.keys_of, s.means()] for t, s in inputs.statistics.items() if s}
        return {
            "the base": identities.pop("base"),
            "the experts": identities,
            "the samples or statistics": [statistics, inputs.samples],
            "the method or its settings": describe_method(self.method),
            "`heads`": self.options.heads,
            "`batch_size`": self.options.batch_size,
            "`seed`": self.options.seed,
            "the number of processes": self.accelerator.num_processes,
            "the version of hf_esm": __version__,
        }

    def check_weights(self) -> None:
        """Read every weight once, and check that it is finite."""
        with self.stage("checking weights"):
            check_values(self.plan, self.progress("Checking weights"))

    # The merge.

    @contextmanager
    def workspace(self) -> Iterator[None]:
        """Provide the folders that all processes work in. An unpublished one is removed at the end."""
        with self._cleanup:
            self.folder = self._shared_folder()
            self.scratch = self.work.folder or self.folder / ".scratch"
            self._cleanup.callback(self.work.release)
            with together(self.accelerator):
                if self.accelerator.is_main_process:
                    if self.options.resume_dir:
                        self.work.begin(self.folder)
                    else:
                        self.scratch.mkdir()
            yield

    def _shared_folder(self) -> Path:
        """Make a folder next to the output, or a temporary one, and return its path on every process."""
        folder = None
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                output = self.output or Path(tempfile.gettempdir()) / "hf_esm"
                folder = self._cleanup.enter_context(staging_folder(output))
        return gather(self.accelerator, folder)[0]

    def calibrate(self, inputs: Inputs) -> Inputs:
        """Collect the statistics of the experts that have samples."""
        with self.stage("calibrating", joined=False):
            if self.method.needs_statistics:
                collected = calibrate_experts(
                    self.plan,
                    inputs.samples,
                    self.options,
                    self.accelerator,
                    self.scratch,
                    self.progress("Calibrating"),
                )
                inputs = replace(inputs, statistics={**inputs.statistics, **collected})
        self.warn(*missing_statistics(self.plan, inputs.statistics))
        return inputs

    def prepare(self, inputs: Inputs) -> list[float]:
        """Let the method learn from the whole model; return the thresholds of all stacks."""
        learn = partial(
            learn_mask,
            self.plan,
            inputs.samples,
            self.accelerator,
            batch_size=self.options.batch_size,
            seed=self.options.seed,
            folder=self.scratch if self.options.resume_dir else None,
            progress=self.progress,
        )
        with self.stage("preparing", joined=not self.method.needs_samples):
            return self.method.prepare(whole_updates(self.plan, learn, self.progress("Preparing")))

    def merge_weights(self, inputs: Inputs, thresholds: list[float]) -> dict[str, WeightReport]:
        """Pass one: merge every weight of all experts into scratch files; return reports by weight."""
        max_memory = self.options.max_memory and bytes_of(self.options.max_memory, "max_memory")
        with self.stage("merging"):
            reports = merge_weights(
                self.plan,
                inputs.statistics,
                self.scratch,
                worker=Worker.of(self.accelerator, max_memory),
                thresholds=thresholds,
                resumable=self.options.resume_dir is not None,
                progress=self.progress("Merging"),
            )
        reports = {name: report for part in gather(self.accelerator, reports) for name, report in part.items()}
        base = self.plan.base
        matrices = {name for name in reports if name in base.linear or len(base.shape(name)) == 2}
        scale_layers(reports, self.method, matrices)
        return reports

    def choose_alpha(self, inputs: Inputs, reports: dict[str, WeightReport]) -> tuple[MergedUpdates, MergeResult]:
        """Choose the scale of the merged updates; return the updates, and the result as far as it is known."""
        with self.stage("choosing alpha"):
            updates = MergedUpdates(self.plan.base, reports, sorted(self.scratch.glob("updates-*.safetensors")))
            choice = choose_alpha(
                self.plan,
                updates,
                inputs.labelled,
                self.data.score_fn,
                self.accelerator,
                self.options,
                self.progress("Choosing alpha"),
            )
        alpha, scores = gather(self.accelerator, choice)[0]
        weights = [reports[name] for name in self.plan.base.names if name in reports]
        return updates, MergeResult(self.folder, alpha, scores, weights, self.seconds, self.warnings, self.plan)

    def write(self, result: MergeResult, inputs: Inputs, updates: MergedUpdates) -> None:
        """Pass two: write the merged weights, and all other files of the model."""
        accelerator = self.accelerator
        with self.stage("writing"):
            write_model(
                self.folder,
                self.plan,
                updates,
                result.alpha,
                self.options,
                progress=self.progress("Writing"),
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
            )
            if accelerator.is_main_process:
                write_files(result, self.sources, inputs, self.data, self.options)

    def add_experts(self, result: MergeResult, inputs: Inputs, updates: MergedUpdates) -> None:
        """Write the experts and the router, if the method routes."""
        if not self.method.routes:
            return
        with self.stage("adding experts", joined=False):
            write_experts(
                self.folder,
                self.scratch,
                self.plan,
                partial(updates.weight, alpha=result.alpha),
                statistics=inputs.statistics,
                samples=inputs.samples,
                accelerator=self.accelerator,
                options=self.options,
                progress=self.progress,
            )

    def publish(self, result: MergeResult) -> None:
        """Give the folder its name, and remove the work in progress."""
        with self.stage("publishing"):
            if self.accelerator.is_main_process:
                shutil.rmtree(self.folder / ".scratch", ignore_errors=True)
                if self.method.routes:
                    write_hashes(self.folder)
                if self.output is not None:
                    publish_folder(self.folder, self.output, self.options.overwrite)
                if self.options.resume_dir:
                    self.work.end()
        if self.output is None:
            result._temporary = self._cleanup.pop_all()
        else:
            result.output_dir = self.output
