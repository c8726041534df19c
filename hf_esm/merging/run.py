"""The steps of one merge."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Optional

from ..architecture import block_depths
from ..calibration import ActivationStatistics, factor_bytes
from ..checkpoints import REFINED_FOLDER, differing_processors
from ..data import default_prompt_of, with_prompt
from ..hub import write_hashes
from ..methods import Mean, MergeMethod, weights_cancel
from ..planning import (
    MergeData,
    MergePlan,
    Override,
    check_disk,
    check_factors,
    check_memory,
    check_values,
    merged_processor,
)
from ..utils import Work, bytes_of, gather, main_first, publish_folder, together
from .alpha import LabelScore, describe_alpha, read_validation
from .cache import InputCache
from .choice import Candidate, Chosen, choose, given_scale
from .depth import scale_by_depth
from .expert_statistics import (
    STATISTICS_SAMPLES,
    Gathered,
    Inputs,
    calibrate_experts,
    count_tokens,
    gather_statistics,
    missing_statistics,
    swapped_statistics,
)
from .first_rows import first_rows
from .judging import ask_experts
from .learning import learn_mask
from .lora_output import write_lora
from .one_pass import OnePass
from .output import ModelWriter, write_files, write_modules, write_weights
from .planned import PlannedRun
from .refined import check_refinable, refine_chosen, too_few_to_refine
from .result import MergeResult
from .routed_experts import write_experts
from .updates import FactoredUpdates, MergedUpdates, WrittenUpdates
from .weights import Worker, merge_weights, scale_layers, whole_updates


class MergeRun(PlannedRun):
    """One merge. All processes call its steps in the order in which they are defined, after those of `PlannedRun`."""

    def read_inputs(self) -> Inputs:
        """Read the statistics that exist, the samples to calibrate on, and the validation rows."""
        with self.stage("reading samples", joined=False):
            inputs = main_first(self.accelerator, partial(self._read_inputs, self.data))
        self.stages = self.stages_of(bool(inputs.agreement_samples))
        if self.plan.vocabulary is None:
            self.warn(*differing_processors(inputs.processors, self.plan.experts))
        self.warn(*swapped_statistics(inputs.statistics, self.sources))
        return inputs

    def check_inputs(self) -> None:
        """Raise what `read_inputs` would raise, as far as the statistics and one row of every file tell."""
        data = self.data if self.labelled else replace(self.data, validation=None)  # whose rows are not read
        self._read_inputs(first_rows(data, self.options), STATISTICS_SAMPLES)

    def _read_inputs(self, data: Optional[MergeData], sampled: int = 0) -> Inputs:
        """Read the inputs: all of `data`, or none. Each row is one of `sampled` if these are first rows alone."""
        plan, options = self.plan, self.options
        check_memory(plan, options.max_memory)
        processors = self.processors
        gathered = Gathered({}, {}, {})
        if data is not None:
            gathered = gather_statistics(plan, self.sources, data, processors, options, self.needs())
        if options.refine and not sampled:
            check_refinable(plan, gathered.agreement_samples)
        if self.output is not None:
            to_calibrate = gathered.samples if self.needs().statistics else {}
            to_calibrate = {task: rows * (sampled or 1) for task, rows in to_calibrate.items()}
            factors = sum(factor_bytes(plan.experts[task], rows, shared=True) for task, rows in to_calibrate.items())
            check_disk(plan, self.output, factors, options.statistics_dir or options.cache_dir, options.resume_dir)
        processors = {**processors, "base": merged_processor(processors, self.tokenizer, plan.voice)}
        read_by = processors
        if plan.vocabulary:
            read_by = {
                name: with_prompt(processors["base"], default_prompt_of(own)) for name, own in processors.items()
            }
        labelled = read_validation(plan, data.validation, read_by, options) if data and self.labelled else {}
        return Inputs(processors, gathered.statistics, gathered.samples, gathered.agreement_samples, labelled)

    def find_work(self, inputs: Inputs) -> None:
        """Look for the work of an interrupted merge.

        Raises:
            HfEsmError: if the work depends on other models, samples or settings.
        """
        with together(self.accelerator):
            self.work = Work(self.options.resume_dir, self.dependencies(inputs) if self.options.resume_dir else {})
            self.work.check()

    def check_weights(self) -> None:
        """Read every weight once, or every factor of a merge in factors, and check it, unless one pass does so."""
        if self.checks_late:
            return
        with self.stage("checking weights"):
            check = check_factors if self.in_factors else check_values
            check(self.plan, self.progress("Checking weights"))

    # The merge.

    @cached_property
    def cache(self) -> Optional[InputCache]:
        """The cache of statistics and answers, if the caller named one."""
        return InputCache.of(self.plan, self.sources, self.options)

    @contextmanager
    def _cache_locked(self) -> Iterator[None]:
        """Keep other merges from computing at once what both would put into the cache."""
        with ExitStack() as held:
            with together(self.accelerator):
                if self.cache is not None and self.accelerator.is_main_process:
                    held.enter_context(self.cache.locked())
            yield

    def calibrate(self, inputs: Inputs) -> Inputs:
        """Collect the statistics of the experts that have samples, or token counts alone if no method needs more."""
        plan, options, needs = self.plan, self.options, self.needs()
        embeddings = plan.base.embeddings & (set(plan.heads.shared) - plan.unchanged)
        collected: dict[str, ActivationStatistics] = {}
        with self.stage("calibrating", joined=False), self._cache_locked():
            if needs.statistics:
                progress = self.progress("Calibrating")
                collected = calibrate_experts(
                    plan,
                    inputs.samples,
                    options,
                    self.accelerator,
                    self.scratch,
                    progress,
                    needs.features,
                    cache=self.cache,
                )
            elif embeddings and all(t in inputs.samples or s is not None for t, s in inputs.statistics.items()):
                collected = count_tokens(plan, inputs.samples, options, self.accelerator, self.scratch, self.cache)
        inputs = replace(inputs, statistics={**inputs.statistics, **collected})
        if needs.statistics:
            self.warn(*missing_statistics(plan, inputs.statistics))
        if plan.vocabulary is not None:
            name, known = plan.vocabulary.embedding, inputs.statistics
            plan.vocabulary.weigh({t: s.token_counts.get(name) for t, s in known.items() if s is not None})
        return inputs

    def ask_experts(self, inputs: Inputs) -> Inputs:
        """Run the experts on the samples that agreement is measured on."""
        if not inputs.agreement_samples:
            self._do_without_agreement()
            return inputs
        if self.refining and (few := too_few_to_refine(inputs.agreement_samples)):
            self.warn(f"'{few}' has one sample beside those of the statistics, so that nothing is refined.")
            self.refining = None
            self.stages = self.stages_of(True)
        with self.stage("asking experts", joined=False), self._cache_locked():
            answers = ask_experts(
                self.plan,
                inputs.agreement_samples,
                self.options,
                self.accelerator,
                self.scratch,
                self.progress("Asking experts"),
                self.cache,
            )
        return replace(inputs, answers=answers)

    def _do_without_agreement(self) -> None:
        """Take the first method and its α where neither samples for agreement are left nor labels choose; say so."""
        if self.needs().agreement == "halves":
            self.warn(
                "No samples beside those of the statistics: the method and alpha are not chosen by agreement with the "
                "experts, and nothing is refined. Pass samples of every task as `calibration`."
            )
        self.refining, self.static_methods = None, self.static_methods[: None if self.labelled else 1]

    def merge_weights(self, inputs: Inputs) -> list[Candidate]:
        """Pass one, by each of the methods: merge every weight into scratch files, or in one pass into the output."""
        methods = list(self.static_methods)
        of_tasks = [self.plan.weights, *(self.plan.rule_of(name).weights for name in self.plan.overridden)]
        if len(methods) > 1 and not any(map(weights_cancel, of_tasks)):
            methods.append(Mean())
        with self.stage("merging", joined=False):
            if self.one_pass:
                return [self._written(methods[0], inputs)]
            return [self._candidate(method, inputs, alone=len(methods) == 1) for method in methods]

    def _written(self, method: MergeMethod, inputs: Inputs) -> Candidate:
        """Merge every weight into the output."""
        plan, statistics = replace(self.plan, method=method), inputs.statistics
        thresholds, scales = self._prepare(plan, inputs), given_scale(method, self.options)
        with ModelWriter(self.folder, plan.base, self.options) as writer:
            merge = OnePass(plan, writer, *scales, self._worker(), thresholds, checked=not self.checks_late)
            reports = merge.run(statistics, self.progress("Merging"))
        self.plan.unchanged = plan.unchanged
        return Candidate(method, WrittenUpdates(plan.base, reports))

    def _worker(self) -> Worker:
        max_memory = self.options.max_memory and bytes_of(self.options.max_memory, "max_memory")
        return Worker.of(self.accelerator, max_memory)

    def _candidate(self, method: MergeMethod, inputs: Inputs, alone: bool) -> Candidate:
        plan = replace(self.plan, method=method)
        scratch = self.scratch if alone else self.scratch / method.name
        with together(self.accelerator):
            scratch.mkdir(exist_ok=True)
        thresholds = self._prepare(plan, inputs)
        with together(self.accelerator):
            reports = merge_weights(
                plan,
                inputs.statistics,
                scratch,
                worker=self._worker(),
                thresholds=thresholds,
                resumable=self.options.resume_dir is not None,
                in_factors=self.in_factors,
                progress=self.progress(f"Merging by {method.name}" if not alone else "Merging"),
            )
        reports = {name: report for part in gather(self.accelerator, reports) for name, report in part.items()}
        base = plan.base
        matrices = [name for name in reports if name in base.linear or len(base.shape(name)) == 2]
        scale_layers(reports, {name: plan.rule_of(name).method for name in matrices})
        scale_by_depth(reports, plan, block_depths(base.skeleton))
        files = sorted(scratch.glob("updates-*.safetensors"))
        updates = FactoredUpdates(plan, reports, files) if self.in_factors else MergedUpdates(base, reports, files)
        return Candidate(method, updates)

    def _prepare(self, plan: MergePlan, inputs: Inputs) -> dict[str, list[Any]]:
        """Let the methods learn from the whole model; return the thresholds of all stacks by the methods' `repr`."""
        learn = partial(
            learn_mask,
            plan,
            inputs.samples,
            self.accelerator,
            batch_size=self.options.batch_size,
            seed=self.options.seed,
            folder=self.scratch if self.options.resume_dir else None,
            progress=self.progress,
        )
        with nullcontext() if plan.method.needs_samples else together(self.accelerator):
            whole = whole_updates(plan, inputs.statistics, learn, self.progress("Preparing"), self.in_factors)
            return {repr(method): method.prepare(whole) for method in plan.methods}

    def choose(self, inputs: Inputs, candidates: list[Candidate]) -> Chosen:
        """Choose the method and α."""
        with self.stage("choosing", joined=False):
            return choose(
                self.plan, candidates, inputs, self.data.score_fn, self.options, self.accelerator, self.progress
            )

    def refine(self, inputs: Inputs, chosen: Chosen) -> Chosen:
        """Train gates on the experts' essential directions, if asked, and measure agreement with the experts."""
        if chosen.judge is None:
            return chosen
        with self.stage("refining" if self.refining else "measuring agreement", joined=False):
            chosen = refine_chosen(
                self.plan,
                chosen,
                inputs,
                self.refining,
                self.options,
                accelerator=self.accelerator,
                folder=self.scratch,
                progress=self.progress,
            )
        return chosen

    def score(self, inputs: Inputs, chosen: Chosen) -> Chosen:
        """Score the chosen model, the base and the experts, if labels or the caller's function chose α; warn of tasks
        on which the base is better.
        """
        if chosen.by == "labels":
            scores = None
            with self.stage("scoring"):
                if self.accelerator.is_main_process:
                    score_fn, plan = self.data.score_fn, self.plan
                    labels = LabelScore(plan, inputs.labelled, score_fn, self.accelerator, self.options)
                    scores = labels.compare(chosen.weight)
            chosen = replace(chosen, scores_by_task=gather(self.accelerator, scores)[0])
        self.warn(*chosen.warnings())
        return chosen

    def result_of(self, chosen: Chosen) -> MergeResult:
        """Return the result as far as it is known."""
        method = chosen.candidate.method
        if self.method.routes:
            method = self.method.with_static_method(method.name) if self.automatic else self.method
        overrides = [*self.plan.overrides, Override(match=".", alpha=0.0)] if chosen.is_base else self.plan.overrides
        self.plan = replace(self.plan, method=method, overrides=overrides)
        reports = chosen.candidate.reports
        merged_by = chosen.candidate.method
        rule = describe_alpha(chosen.alpha, chosen.scores, merged_by.default_alpha, chosen.within_error)
        return MergeResult(
            output_dir=self.folder,
            alpha=chosen.alpha,
            alpha_by_kind=dict(chosen.by_kind),
            alpha_scores=chosen.scores,
            alpha_errors=chosen.errors,
            alpha_default=merged_by.default_alpha if merged_by.tunable else None,
            evaluations=chosen.evaluations,
            weights=[reports[name] for name in self.plan.base.names if name in reports],
            seconds=self.seconds,
            warnings=self.warnings,
            plan=self.plan,
            chosen_by=chosen.by,
            choice="; ".join(filter(None, (chosen.note, rule))),
            agreement=chosen.agreement,
            scores=chosen.scores_by_task,
            refined=chosen.refined,
            standings=chosen.standings,
        )

    def write(self, result: MergeResult, inputs: Inputs, chosen: Chosen) -> None:
        """Pass two: write the merged weights, unless they are in the output already, and all other files."""
        accelerator = self.accelerator
        if self.options.output == "lora":
            return self._write_lora(result, inputs, chosen)
        with self.stage("writing"):
            if not self.one_pass:
                write_weights(
                    self.folder,
                    self.plan.base,
                    chosen.weight,
                    self.options,
                    progress=self.progress("Writing"),
                    rank=accelerator.process_index,
                    world_size=accelerator.num_processes,
                )
            if accelerator.is_main_process:
                write_modules(self.folder, self.plan.base, chosen.weight, self.options)
                if chosen.adapter is not None:
                    chosen.adapter.save_adapter(self.folder / REFINED_FOLDER)
                refining = self.refining if chosen.refined else None
                write_files(result, self.sources, inputs, self.data, self.options, refining)

    def _write_lora(self, result: MergeResult, inputs: Inputs, chosen: Chosen) -> None:
        """Write the merged updates as a LoRA adapter, and all other files."""
        ranks, reports, main = None, chosen.candidate.reports, self.accelerator.is_main_process
        with self.stage("writing", joined=False):
            with together(self.accelerator):
                if main:
                    known, progress = inputs.statistics, self.progress("Writing")
                    ranks = write_lora(self.folder, self.scratch, self.plan, chosen, known, self.options, progress)
            for name, (rank, error) in gather(self.accelerator, ranks)[0].items():
                reports[name].rank, reports[name].rank_error = rank, error
            with together(self.accelerator):
                if main:
                    refining = self.refining if chosen.refined else None
                    write_files(result, self.sources, inputs, self.data, self.options, refining)

    def add_experts(self, inputs: Inputs, chosen: Chosen) -> None:
        """Write the experts and the router, if the method routes."""
        if not self.method.routes:
            return
        # A router gains from samples that the statistics do without.
        apart = inputs.agreement_samples
        samples = {task: [*rows, *apart.get(task, [])] for task, rows in inputs.samples.items()}
        with self.stage("adding experts", joined=False):
            write_experts(
                self.folder,
                self.scratch,
                self.plan,
                chosen.weight,
                statistics=inputs.statistics,
                samples=samples,
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
                    if self.options.resume_dir:
                        self.work.publishing(self.folder)
                    publish_folder(self.folder, self.output, self.options.overwrite)
                if self.options.resume_dir:
                    self.work.end()
        if self.output is None:
            result._temporary = self.cleanup.pop_all()
        else:
            result.output_dir = self.output
