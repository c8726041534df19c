"""The plan of a merge, from headers and a sample of weights: whether experts fit, what is merged, what it costs."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from huggingface_hub import ModelCard

from ..architecture import KINDS, matrix_names, ties, width_of
from ..checkpoints import AdapterCheckpoint, Checkpoint, ModelSource
from ..data import Sample
from ..errors import HfEsmError
from ..methods import MergeMethod
from ..utils import check_known, first_names, plain_text, readable, readable_duration
from .compatibility import check_architecture, check_complete, check_weights, differing_settings, part_of
from .depth import LinesSettings, check_lines
from .heads import HeadPlan, plan_heads
from .kinship import check_related
from .modules import with_common_modules
from .overrides import Override, Rule, kinds_of, select_overrides
from .resources import estimate_seconds, merge_bytes
from .vocabulary import BASE, Vocabulary


@dataclass(repr=False)
class MergePlan:
    """What a merge will do, as far as it is known before all weights are read. `print` shows it, as `inspect` does.

    Attributes:
        base: checkpoint of the base.
        experts: checkpoints of the experts, by task.
        method: method with its settings.
        weights: per expert, the weight of its task in the merge.
        heads: which weights are merged, kept per task, or taken from the base.
        kinds: numbers of merged linear maps, other matrices, and other parameters.
        licences: licence of each model, as its card states it.
        output_bytes: size of the merged weights, or of the adapter.
        output: what is written: `"model"`, or `"adapter"`.
        scratch_bytes: size of the unscaled updates on disk during the merge; 0 if every weight is written as soon as
            it is merged.
        memory_bytes: memory for merging: the largest weight, once per expert and for the computation.
        calibration_bytes: memory for calibrating: the largest expert.
        learning_bytes: memory for learning on samples, without the heads; 0 if the method does not learn.
        seconds: estimated time for merging on this machine, without reading and calibrating.
        warnings: messages for the user.
        unchanged: canonical names of weights that no expert changes and that stay those of the base. Before the
            weights are read (`check_values`), only weights that no adapter touches are known, if all experts are
            adapters.
        refining_bytes: memory for refining, besides activations; 0 without.
        chosen_from: names of the methods that one is chosen from; empty if the method is fixed.
        vocabulary: the vocabulary of the merged model, if that is not simply the base's.
        voice: the model whose chat template, special tokens and settings of generation the merged model has.
        passes: passes over samples for agreement and refining, in words.
        weight_kinds: by canonical name, what each merged weight is (see `architecture.KINDS`); empty for none of them.
        overrides: other settings for some weights, as the caller gave them.
        overridden: by canonical name, what the overrides set for a weight.
        lines: how the scale of merged updates grows with depth, if it does.
    """

    base: Checkpoint
    experts: dict[str, Checkpoint]
    method: MergeMethod
    weights: tuple[float, ...]
    heads: HeadPlan
    kinds: dict[str, int]
    licences: dict[str, str]
    output_bytes: int
    scratch_bytes: int
    memory_bytes: int
    calibration_bytes: int
    learning_bytes: int
    seconds: float
    warnings: list[str] = field(default_factory=list)
    unchanged: frozenset[str] = frozenset()
    output: str = "model"
    refining_bytes: int = 0
    chosen_from: tuple[str, ...] = ()
    vocabulary: Optional[Vocabulary] = None
    voice: str = BASE
    passes: list[str] = field(default_factory=list)
    weight_kinds: dict[str, str] = field(default_factory=dict)
    overrides: Sequence[Override] = ()
    overridden: dict[str, Override] = field(default_factory=dict)
    lines: Optional[LinesSettings] = None

    def rule_of(self, name: str) -> Rule:
        """Return how a weight is merged, by its canonical name."""
        override = self.overridden.get(name)
        if override is None:
            return Rule(self.method, self.weights)
        named = dict(zip(self.experts, self.weights, strict=True)) | dict(override.weights or {})
        named_method = override.method is not None
        return Rule(override.method or self.method, tuple(named.values()), override.alpha, named_method)

    def in_merged_tokens(self, task: str, samples: list[Sample]) -> list[Sample]:
        """Return an expert's encoded samples as the merged model and the base read them."""
        return samples if self.vocabulary is None else self.vocabulary.translate(task, samples)

    @property
    def methods(self) -> list[MergeMethod]:
        """The method of the merge, and after it those of the overrides, each once."""
        methods = [self.method, *(rule.method for rule in self.overridden.values() if rule.method is not None)]
        return list({repr(method): method for method in methods}.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain data: sizes in bytes, time in seconds."""
        experts = {
            task: {
                "source": expert.source,
                "revision": expert.revision,
                "kind": expert.kind,
                "weight": weight,
                "keeps": self.heads.by_task[task],
            }
            for (task, expert), weight in zip(self.experts.items(), self.weights, strict=True)
        }
        numbers = ("output_bytes", "scratch_bytes", "memory_bytes", "calibration_bytes", "learning_bytes")
        return {
            "method": self.method.name,
            "chosen_from": self.chosen_from,
            "base": self.base.source,
            "experts": experts,
            "kinds": self.kinds,
            "untouched": len(self.heads.kept_from_base) + len(self.unchanged),
            "licences": self.licences,
            "output": self.output,
            **{name: getattr(self, name) for name in (*numbers, "refining_bytes", "seconds")},
            "passes": self.passes,
            "warnings": self.warnings,
        }

    def __repr__(self) -> str:
        return f"MergePlan({self.method.name} of {', '.join(self.experts)} into {self.base.title})"

    def __str__(self) -> str:
        lines = [f"{self._methods()} merge of {len(self.experts)} experts into {self.base.title}", ""]
        for task, expert in self.experts.items():
            kind = expert.kind
            commit = f" @ {expert.revision[:12]}" if expert.revision else ""
            head = self.heads.by_task[task]
            labels = f", {expert.config.num_labels} labels, keeps {len(head)} weights of its own" if head else ""
            weight = self.weights[list(self.experts).index(task)]
            weighted = f", weight {weight:g}" if weight != 1 else ""
            lines.append(f"  {task}: {expert.source or 'live model'}{commit}, {kind}{labels}{weighted}")
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items() if count)
        size = readable(self.output_bytes)
        scratch = f", {readable(self.scratch_bytes)} scratch" if self.scratch_bytes else ""
        lines += [
            "",
            f"  merged     {kinds}",
            *self._quantised(),
            f"  untouched  {len(self.heads.kept_from_base) + len(self.unchanged)} weights of the base",
            "  licences   " + "; ".join(f"{name}: {licence}" for name, licence in self.licences.items()),
            f"  disk       {size} for the {self.output}{scratch}",
            f"  memory     {self._memory()}",
            f"  time       about {readable_duration(self.seconds)} to merge, besides reading and calibrating",
        ]
        if self.vocabulary is not None:
            lines.append(f"  tokens     {self.vocabulary}")
        if self.voice != BASE:
            lines.append(f"  chat       template, special tokens and settings of generation of '{self.voice}'")
        lines += [f"  override   {override}" for override in self.overrides]
        lines += [f"  depth      {self.lines}"] if self.lines else []
        lines += [f"  samples    {line}" for line in self.passes]
        return "\n".join(lines + [f"  warning    {warning}" for warning in self.warnings])

    def _quantised(self) -> list[str]:
        """Return the line that names the quantised models, if there are any."""
        models = {"base": self.base, **self.experts}
        named = [f"{name} ({model.quantised})" for name, model in models.items() if model.quantised]
        return [f"  quantised  {', '.join(named)}: read as bfloat16"] if named else []

    def _methods(self) -> str:
        chosen = " or ".join(self.chosen_from)
        if not chosen:
            return self.method.name
        return f"{self.method.name} (over {chosen})" if self.method.routes else chosen

    def _memory(self) -> str:
        calibrated = any(method.needs_statistics for method in self.methods)
        needed = {"to calibrate": self.calibration_bytes if calibrated else 0}
        needed |= {"to learn": self.learning_bytes, "to refine": self.refining_bytes, "to merge": self.memory_bytes}
        return ", ".join(f"{readable(count)} {purpose}" for purpose, count in needed.items() if count)


def plan_merge(
    base: Checkpoint,
    experts: dict[str, Checkpoint],
    method: MergeMethod,
    *,
    heads: str | Iterable[str] = "auto",
    dtype: Optional[torch.dtype] = None,
    sources: Optional[Mapping[str, ModelSource]] = None,
    weights: Optional[Mapping[str, float]] = None,
    overrides: Sequence[Override] = (),
    scaled_kinds: Iterable[str] = (),
    lines: Optional[LinesSettings] = None,
) -> MergePlan:
    """Check that the experts are fine-tunes of the base, and plan their merge.

    Args:
        base: checkpoint of the base.
        experts: checkpoints of the experts, by task.
        method: method with its settings.
        heads: see `plan_heads`.
        dtype: of the written weights; by default that of the base.
        sources: the models by task, whose cards state licences; the base is `"base"`.
        weights: of tasks in the merge; 1 for a task that is not named.
        overrides: other settings for some weights.
        scaled_kinds: kinds of weights with an α of their own.
        lines: how the scale of merged updates grows with depth, if it does.

    Raises:
        HfEsmError: if an expert is of another architecture, shape or base, or lacks weights, if a method cannot merge
            by these `weights`, or an override selects no weight.
    """
    weights_of = tuple(float((weights or {}).get(task, 1)) for task in experts)
    method.check_weights(weights_of)
    check_lines(lines, method)
    base, experts, warnings = with_common_modules(base, experts)
    parts = set(map(part_of, base.names))
    check_complete(base, [name for name in base.missing if part_of(name) in parts])
    for expert in experts.values():
        check_complete(expert, expert.missing)
        check_architecture(base, expert)
    head_plan = plan_heads(base, experts, heads)
    warnings += head_plan.warnings
    if base.quantised and base.extra:
        warnings.append(
            f"{base.title}: its files hold quantised weights that its model has no place for, which are left out: "
            f"{first_names(base.extra)}."
        )
    for expert in experts.values():
        check_weights(base, expert, head_plan)
        warnings += _warnings_of(expert, base, head_plan)
    if not head_plan.shared:
        raise HfEsmError(f"{base.title} and its experts share no weights to merge.")
    warnings += check_related(base, experts, head_plan.shared)
    licences = {name: _licence(source) for name, source in (sources or {}).items()}
    stated = {licence for licence in licences.values() if licence != "not stated"}
    if len(stated) > 1:
        warnings.append(f"the licences differ ({', '.join(sorted(stated))}): check that they allow one merged model.")
    unchanged = _untouched_by_adapters(experts, head_plan)
    merged = [name for name in head_plan.shared if name not in unchanged]
    kinds = kinds_of(base, head_plan.shared)
    check_known(scaled_kinds, [kind for kind in KINDS if kind in kinds.values()], "merged weight of kind", "`alpha`")
    plan = MergePlan(
        base=base,
        experts=experts,
        method=method,
        weights=weights_of,
        heads=head_plan,
        kinds=_kinds(base, merged),
        licences=licences,
        **_sizes(base, experts, method, dtype, head_plan.shared, merged),
        seconds=0.0,
        warnings=warnings,
        unchanged=unchanged,
        weight_kinds=kinds,
        overrides=overrides,
        overridden=select_overrides(base, kinds, overrides),
        lines=lines,
    )
    _check_overridden(plan)
    plan.seconds = estimate_seconds(
        base, merged, list(experts.values()), lambda name: plan.rule_of(name).method.decomposes
    )
    return plan


def _check_overridden(plan: MergePlan) -> None:
    """Raise an error if a method cannot merge as the overrides say."""
    if plan.method.needs_samples and any(override.method is not None for override in plan.overrides):
        raise HfEsmError(
            f"`overrides`: {plan.method.name} learns on the whole model, so that no weight can have another "
            "method. Leave `method` out."
        )
    for rule in map(plan.rule_of, plan.overridden):
        rule.method.check_weights(rule.weights)


def _warnings_of(expert: Checkpoint, base: Checkpoint, heads: HeadPlan) -> list[str]:
    """Return warnings of all that an expert has and the merged model will not have."""
    warnings = []
    if differing := differing_settings(base, expert):
        warnings.append(f"{expert.title}: its config differs from the base's in {', '.join(differing)}.")
    tied = set(heads.kept_from_base) & ties(expert.skeleton).keys()
    if tied and not isinstance(expert.stored, AdapterCheckpoint):
        warnings.append(
            f"{expert.title}: {first_names(sorted(tied))} is tied to its embeddings, but the base stores a weight of "
            "its own, which is not merged. To merge it, save the expert with a weight of its own: "
            "`model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())`, and "
            "`model.config.tie_word_embeddings = False`."
        )
    if untied := ties(base.skeleton).keys() & set(expert.names.values()):
        warnings.append(
            f"{expert.title} stores {first_names(sorted(untied))} of its own, which is tied to the embeddings in the "
            "base and in the merged model. The task keeps its own as its head."
        )
    if expert.extra:
        warnings.append(
            f"{expert.title}: its files hold weights that its model has no place for: {first_names(expert.extra)}."
        )
    if isinstance(expert.stored, AdapterCheckpoint):
        trained_on = expert.stored.peft_config.base_model_name_or_path
        if trained_on and base.source and Path(trained_on).name != Path(base.source).name:
            warnings.append(f"{expert.title}: trained on {trained_on}, merged over {base.source}.")
    return warnings


def _untouched_by_adapters(experts: Mapping[str, Checkpoint], heads: HeadPlan) -> frozenset[str]:
    """Return the weights that no expert changes, as far as headers show: only if all experts are adapters."""
    return frozenset(name for name in heads.shared if not any(e.changes(name) for e in experts.values()))


def _sizes(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    method: MergeMethod,
    dtype: Optional[torch.dtype],
    shared: list[str],
    merged: list[str],
) -> dict[str, int]:
    """Return the fields of a plan that count bytes."""
    elements = {name: math.prod(base.shape(name)) for name in shared}
    changing, bodies = sum(elements[name] for name in merged), method.bodies_to_learn(len(experts))
    output = sum(
        math.prod(base.shape(n)) * (dtype if dtype and base.dtype(n).is_floating_point else base.dtype(n)).itemsize
        for n in base.names
    )
    loaded = [base if isinstance(expert.stored, AdapterCheckpoint) else expert for expert in experts.values()]
    return {
        "output_bytes": output,
        "scratch_bytes": 4 * changing,
        "memory_bytes": merge_bytes(max((elements[name] for name in merged), default=0), len(experts)),
        "calibration_bytes": max(checkpoint.nbytes for checkpoint in loaded),
        # One body is run and therefore whole; the others hold only the weights that change.
        "learning_bytes": 4 * (sum(elements.values()) + (bodies - 1) * changing) if bodies else 0,
    }


def _licence(source: ModelSource) -> str:
    """Return the licence that a model's card states."""
    try:
        text = source.card()
        licence = ModelCard(text, ignore_metadata_errors=True).data.license if text else None
    except Exception:  # the README is not a card; its readers raise what they like
        licence = None
    return plain_text(licence).lower() if isinstance(licence, str) else "not stated"


def _kinds(base: Checkpoint, names: list[str]) -> dict[str, int]:
    """Count linear maps, other matrices and other parameters."""
    count = Counter(
        "linear maps"
        if name in base.linear
        else "other matrices"
        if len(base.shape(name)) == 2
        else "other parameters"
        for name in names
    )
    return dict(sorted(count.items()))


def calibrated_widths(plan: MergePlan) -> dict[str, int]:
    """Return the input width `d_in` of every linear map that is merged with statistics, by name.

    Each matrix of a mixture of experts counts by itself.
    """
    return {
        matrix: width_of(plan.base.shape(name), linear)
        for name, linear in plan.base.linear.items()
        if name in plan.heads.shared
        for matrix in matrix_names(name, linear)
    }


def counted_rows(plan: MergePlan, task: str) -> dict[str, int]:
    """Return the number of an expert's own rows of every embedding that is merged, by name."""
    stored = plan.experts[task].stored
    return {name: stored.shape(name)[0] for name in plan.base.embeddings if name in plan.heads.shared}
