"""The steps of a merge before any long work: headers, plan, and what the merge needs of its samples."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, Optional

from accelerate import Accelerator
from transformers import PreTrainedModel

from ..architecture import is_routable, reads_prompts, writes
from ..checkpoints import (
    Access,
    Checkpoint,
    ModelSource,
    ModelSpec,
    find_processors,
    model_identity,
    open_checkpoint,
    prompt_before,
    resolve_models,
)
from ..data import with_prompt
from ..errors import HfEsmError
from ..methods import MergeMethod, describe_method, resolve_method
from ..planning import (
    BASE,
    MergeData,
    MergeOptions,
    MergePlan,
    RefineSettings,
    Vocabulary,
    check_low_rank,
    check_trained,
    choose_voice,
    endless_turns,
    merged_processor,
    plan_merge,
    plan_vocabulary,
    refining_bytes,
    resolve_lines,
    resolve_overrides,
    resolve_refine,
    resolve_tokenizer,
    tokenizer_of,
    torch_dtype,
)
from ..tuners.routed import check_separable
from ..utils import bytes_of, main_first, readable
from ..version import __version__
from .choice import methods_to_choose_from
from .expert_statistics import Inputs, Needs
from .generation import merged_generation
from .session import Session


class PlannedRun(Session):
    """The steps of a merge that read headers, and samples of the weights.

    Attributes:
        named: the method that the caller named, with its settings.
        data: the caller's data.
        sources: the models by task, the base as `"base"`; known after `open_models`.
        processors: tokenizer or processor of every source; known after `open_models`.
        tokenizer: tokenizer of the merged model's vocabulary, if there is one; known after `open_models`.
        plan: result of the checks; known after `open_models`.
        automatic: whether the method, or that of the static model, is chosen for the kind of model; known after
            `open_models`.
        static_methods: the methods that the static model is merged by, to choose the best; known after `open_models`.
        refining: settings of refining, or None; known after `open_models`.
        one_pass: whether every weight is merged into the output as soon as it is read; known after `open_models`.
    """

    sources: dict[str, ModelSource]
    processors: dict[str, Any]
    tokenizer: Any
    plan: MergePlan
    automatic: bool
    static_methods: list[MergeMethod]
    refining: Optional[RefineSettings]
    one_pass: bool

    def __init__(
        self,
        options: MergeOptions,
        method: MergeMethod,
        data: MergeData,
        accelerator: Accelerator,
        callback: Optional[Callable[[str, int, int], None]] = None,
    ):
        super().__init__(options, accelerator, callback)
        self.named, self.data = method, data

    @property
    def method(self) -> MergeMethod:
        """The method of the merge; with several `static_methods`, the first of them until one is chosen."""
        return self.plan.method

    @property
    def methods(self) -> list[MergeMethod]:
        """All methods that the merge may use."""
        return [*self.static_methods, *self.plan.methods]

    @property
    def in_factors(self) -> bool:
        """Whether the merge is done inside the span of the experts' factors; see `spans.Span`."""
        return self.options.output == "lora"

    # Before any long work.

    def open_models(
        self, base: Optional[ModelSpec], experts: Mapping[str, ModelSpec], access: Access, headers_only: bool
    ) -> None:
        """Resolve the models, read their headers, and plan the merge."""
        with self.stage("reading headers", joined=False):
            read = partial(self._read_headers, base, experts, access, headers_only)
            self.sources, self.plan = main_first(self.accelerator, read)
        base = self.plan.base.skeleton
        static = self.method.static_method
        self.automatic = self.named.chooses or (static == "auto" and writes(base))
        self.static_methods = self._candidates(base) if self.automatic else [self.method]
        if not self.automatic and static not in ("auto", "own"):
            self.static_methods = [resolve_method(static)]
        if len(self.static_methods) > 1:
            self.plan.chosen_from = tuple(method.name for method in self.static_methods)
        chosen = (self.automatic and writes(base)) if self.options.refine is None else self.options.refine
        self.refining = resolve_refine(chosen)
        if self.refining and self.method.routes and not self.method.needs_statistics:
            raise HfEsmError(f"{self.method.name} merges nothing that could be refined. Leave `refine` out.")
        if self.refining and self.refining.keep_adapter and self.method.routes:
            raise HfEsmError(
                f"refine: {self.method.name} writes an adapter of its experts, over weights that gates are folded "
                "into. Leave `keep_adapter` out."
            )
        if self.refining and self.refining.keep_adapter and self.plan.base.modules and self.plan.base.modules.tensors:
            raise HfEsmError(
                f"refine: {self.plan.base.title} has dense modules, whose gates no adapter can hold. Leave "
                "`keep_adapter` out."
            )
        if self.options.output == "lora":
            check_low_rank(self.plan, self.methods, self.refining, self.options.rank)
        if self.refining:
            self.plan.refining_bytes = refining_bytes(self.plan, self.refining)
            self._leave_out_what_does_not_fit()
        self.one_pass = self._in_one_pass()
        if self.one_pass:
            self.plan.scratch_bytes = 0
        self.plan.passes = self._passes()
        self.stages = self.stages_of(bool(self.needs().agreement and self.data.calibration))

    def stages_of(self, agrees: bool) -> list[str]:
        """Return the names of the merge's stages, in order.

        Args:
            agrees: whether there are samples to measure agreement on.
        """
        several = len(self.static_methods) > 1 and (agrees or self.labelled)
        stages = {
            "reading headers": True,
            "reading samples": True,
            "checking weights": not self.checks_late,
            "calibrating": self.needs().statistics,
            "asking experts": agrees,
            "merging": True,
            "choosing": several or self.searched,
            "refining": agrees and self.refining is not None,
            "measuring agreement": agrees and self.refining is None,
            "scoring": self.labelled,
            "writing": True,
            "adding experts": self.method.routes,
            "publishing": True,
        }
        return [name for name, used in stages.items() if used]

    def _candidates(self, base: PreTrainedModel) -> list[MergeMethod]:
        return methods_to_choose_from(self.named, base, self.data.is_labelled)

    def _leave_out_what_does_not_fit(self) -> None:
        """Do not refine where only the default would, and memory is too little for it."""
        plan, most = self.plan, self.options.max_memory
        if self.options.refine is None and most and plan.refining_bytes > bytes_of(most, "max_memory"):
            plan.warnings.append(
                f"`max_memory` {most}: refining would need {readable(plan.refining_bytes)}, so the merged model is "
                "not refined. Give at least that."
            )
            self.refining, plan.refining_bytes = None, 0

    def _passes(self) -> list[str]:
        """Return what agreement costs, for the plan."""
        passes, needs = [], self.needs()
        if needs.agreement:
            by_kind = list(self.options.alpha_by_kind.values())
            searches = 2 * by_kind.count("auto") if by_kind else self.searched or len(self.static_methods) > 1
            runs = 1 + 8 * searches * sum(method.tunable for method in self.static_methods)
            passes.append(
                f"agreement: every expert once over its samples, the merged model {runs} times or so over those of "
                "all tasks"
            )
        if self.refining:
            passes.append(
                f"refining: at most {self.refining.steps} steps, forward and backward, on {self.refining.batch_size} "
                f"samples of each task; {readable(self.plan.refining_bytes)} besides activations"
            )
        return passes

    def _read_headers(
        self, base: Optional[ModelSpec], experts: Mapping[str, ModelSpec], access: Access, headers_only: bool
    ) -> tuple[dict[str, ModelSource], MergePlan]:
        sources = resolve_models(base, experts, access)
        opened = open_checkpoint(sources["base"], headers_only=headers_only)
        checkpoints = {task: open_checkpoint(sources[task], opened, headers_only) for task in experts}
        vocabulary, voice, warnings = self._plan_tokens(sources, opened, checkpoints)
        if vocabulary is not None:
            opened, checkpoints = vocabulary.base, dict(vocabulary.experts)
        method = self._candidates(opened.skeleton)[0] if self.named.chooses else self.named
        method = method.for_model(reads_prompts(opened.skeleton), writes(opened.skeleton))
        if method.decides:
            for checkpoint in (opened, *checkpoints.values()):
                check_separable(checkpoint.skeleton)
        plan = plan_merge(
            opened,
            checkpoints,
            method,
            heads=self.options.heads,
            dtype=torch_dtype(self.options.dtype),
            sources=sources,
            weights=self.options.weights,
            overrides=resolve_overrides(self.options.overrides, experts),
            scaled_kinds=self.options.alpha_by_kind,
            lines=resolve_lines(self.options.lines),
        )
        routable = [opened.names[n] for n in plan.heads.shared if is_routable(n, opened.linear.get(n))]
        if method.routes and not any(map(method.routes_on, routable)):
            named = " that the method's `targets` name" if routable else ""
            raise HfEsmError(
                f"{opened.title} has no linear maps to route experts on{named}. Merge it by another method, such as "
                f"{'esm++' if routable else 'esm'!r}."
            )
        for name, model in {"base": plan.base, **plan.experts}.items():
            self.processors[name] = with_prompt(self.processors[name], prompt_before(model.skeleton))
        plan.vocabulary, plan.voice = vocabulary, voice
        plan.warnings += warnings
        if self.options.output == "model":  # a merge of adapters into one need not read the base
            plan.warnings += check_trained(plan.base, plan.experts, plan.heads.shared)
        if opened.skeleton.can_generate():  # now, since its files may be damaged
            processor = merged_processor(self.processors, self.tokenizer, voice)
            generation = merged_generation(plan, sources, {**self.processors, BASE: processor})
            plan.warnings += endless_turns(processor, generation.eos_token_id)
        return sources, plan

    def _plan_tokens(
        self, sources: dict[str, ModelSource], base: Checkpoint, experts: Mapping[str, Checkpoint]
    ) -> tuple[Optional[Vocabulary], str, list[str]]:
        """Read the tokenizers; return the merged model's vocabulary, the model whose template it has, and warnings."""
        self.processors, lacking = find_processors(sources, self.data.processor, self.options.trust_remote_code)
        settings = resolve_tokenizer(self.options.tokenizer, experts)
        tokenizers = {name: tokenizer_of(processor) for name, processor in self.processors.items()}
        vocabulary, self.tokenizer, warnings = plan_vocabulary(base, experts, tokenizers, settings)
        voice = choose_voice(self.processors, settings.source, self.options.chat_template)
        return vocabulary, voice, [*lacking, *warnings]

    def dry_plan(self) -> MergePlan:
        """Return the plan, with warnings of what would waste time."""
        self.plan.warnings += self._notices()
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
        warnings = [
            f"`{name}` is only used with `method='auto'` or `alpha='auto'`." for name in unused if not self.labelled
        ]
        held = plan.base.nbytes if options.output == "lora" else plan.output_bytes
        if options.max_memory and held > bytes_of(options.max_memory, "max_memory"):
            causes = {"`alpha='auto'`": self.searched, plan.method.name: plan.method.routes}
            causes |= {"`refine`": self.refining is not None, "`method='auto'`": len(self.static_methods) > 1}
            size = readable(held)
            warnings += [
                f"{cause}: holds the whole merged model in memory, {size} or more."
                for cause in causes
                if causes[cause]
            ]
        return warnings

    def _in_one_pass(self) -> bool:
        """Return whether nothing must be known of the whole merged model before a weight can be written, no samples
        are run, and there is one process.
        """
        lines, modules, needs = self.plan.lines, self.plan.base.modules, self.needs()
        return not (
            self.options.output != "model"
            or self.options.resume_dir is not None
            or self.searched
            or self.refining is not None
            or self.method.routes
            or len(self.static_methods) > 1
            or any(method.layer_exponent or method.stacks_shared_inputs for method in self.methods)
            or (lines is not None and lines.first is None)
            or (modules is not None and modules.tensors)
            or needs.statistics
            or needs.samples
            or self.accelerator.num_processes > 1
        )

    @property
    def checks_late(self) -> bool:
        """Whether a weight is checked when it is merged, as nothing reads it before."""
        return self.one_pass and not any(method.reads_whole for method in self.methods)

    @property
    def searched(self) -> bool:
        """Whether α is searched because the caller asked for it."""
        return self.options.searches_alpha

    @property
    def labelled(self) -> bool:
        """Whether labels, or a function of the caller's, choose α."""
        return (self.searched or len(self.static_methods) > 1) and self.data.is_labelled

    @property
    def _truncates(self) -> bool:
        """Whether statistics measure what the rank of an adapter leaves out."""
        given = all(self.data.calibration_of(task) is not None for task in self.plan.experts)
        return self.options.output == "lora" and self.options.rank is not None and given

    def needs(self) -> Needs:
        """Return what the merge uses of its samples."""
        compared = (self.searched or len(self.static_methods) > 1) and not self.labelled
        components = self.refining is not None and self.refining.components > 0
        return Needs(
            statistics=components or self._truncates or any(m.needs_statistics for m in self.methods),
            samples=self.method.needs_samples,
            features=self.method.needs_features,
            agreement="halves" if compared or self.refining else "rest" if self.labelled else "",
        )

    def dependencies(self, inputs: Inputs) -> dict[str, Any]:
        """Return all that work in progress depends on, under the names that errors use."""
        identities = {name: model_identity(source) for name, source in self.sources.items()}
        statistics = {
            t: [asdict(s.provenance), s.keys_of, s.means()] for t, s in inputs.statistics.items() if s is not None
        }
        return {
            "the base": identities.pop("base"),
            "the experts": identities,
            "the samples or statistics": [statistics, inputs.samples, inputs.agreement_samples],
            "the method or its settings": describe_method(self.named),
            "`refine`": self.refining and asdict(self.refining),
            "`weights`": self.options.weights,
            "`lines`": self.plan.lines and asdict(self.plan.lines),
            "`tokenizer`": self.options.tokenizer,
            "`overrides`": [override.describe() for override in self.plan.overrides],
            "`heads`": self.options.heads,
            "`output`": self.options.output,
            "`batch_size`": self.options.batch_size,
            "`seed`": self.options.seed,
            "the number of processes": self.accelerator.num_processes,
            "the version of hf_esm": __version__,
        }
