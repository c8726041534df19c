"""What a merge will do, found out from headers alone: who fits, what is merged how, what it costs, what is missing."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
import yaml
from huggingface_hub import ModelCard

from ..architecture import matrix_names, width_of
from ..checkpoints import Checkpoint, LoraCheckpoint, ModelSource
from ..errors import HfEsmError
from ..methods import MergeMethod
from ..utils import readable
from .compatibility import check_architecture, check_complete, check_weights, differing_settings, first_names, part_of
from .heads import HeadPlan, plan_heads
from .resources import estimate_seconds, merge_bytes, readable_duration


@dataclass
class MergePlan:
    """The outcome of all checks that need no weight. `print` it, or run `hf-esm inspect`.

    Attributes:
        base: the base's checkpoint.
        experts: the experts' checkpoints by task.
        method: the method with its settings.
        heads: which weights are merged, kept per task, or left as the base has them.
        kinds: how many weights are linear maps, other matrices, and parameters of other kinds.
        licences: licence by model, as their cards state them.
        output_bytes: size of the merged weights.
        scratch_bytes: size of the unscaled updates that are kept on disk while merging.
        memory_bytes: what merging needs: the largest weight, once per expert and for the work on it.
        calibration_bytes: what calibrating needs: the largest expert.
        learning_bytes: what learning on the samples needs, if the method does; the heads besides.
        seconds: roughly how long merging takes here, from the operations of its eigenproblems.
        warnings: what the user should know.
        unchanged: the weights that no expert changes, which stay the base's: from headers, those that no adapter
            touches where all experts are adapters; all of them once `check_values` has seen them.
    """

    base: Checkpoint
    experts: dict[str, Checkpoint]
    method: MergeMethod
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

    def __str__(self) -> str:
        lines = [f"{self.method.name} merge of {len(self.experts)} experts into {self.base.title}", ""]
        for task, expert in self.experts.items():
            kind = "LoRA adapter" if isinstance(expert, LoraCheckpoint) else type(expert.skeleton).__name__
            commit = f" @ {expert.revision[:12]}" if expert.revision else ""
            labels = f", {expert.config.num_labels} labels" if self.heads.by_task[task] else ""
            own = f", keeps {len(self.heads.by_task[task])} weights of its own" if self.heads.by_task[task] else ""
            lines.append(f"  {task}: {expert.source or 'live model'}{commit}, {kind}{labels}{own}")
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items() if count)
        lines += [
            "",
            f"  merged     {kinds}",
            f"  untouched  {len(self.heads.kept_from_base) + len(self.unchanged)} weights of the base",
            "  licences   " + "; ".join(f"{name}: {licence}" for name, licence in self.licences.items()),
            f"  disk       {readable(self.output_bytes)} for the model, {readable(self.scratch_bytes)} scratch",
            f"  memory     {self._memory()}",
            f"  time       about {readable_duration(self.seconds)} to merge, besides reading and calibrating",
        ]
        return "\n".join(lines + [f"  warning    {warning}" for warning in self.warnings])

    def _memory(self) -> str:
        wanted = {"to calibrate": self.calibration_bytes if self.method.needs_statistics else 0}
        wanted |= {"to learn": self.learning_bytes, "to merge": self.memory_bytes}
        return ", ".join(f"{readable(count)} {what}" for what, count in wanted.items() if count)


def plan_merge(
    base: Checkpoint,
    experts: dict[str, Checkpoint],
    method: MergeMethod,
    heads: Any = "auto",
    dtype: Optional[torch.dtype] = None,
    sources: Optional[Mapping[str, ModelSource]] = None,
) -> MergePlan:
    """Check that the experts are fine-tunes of the base, and say what merging them means.

    Raises:
        HfEsmError: if an expert is of another architecture or shape, or lacks weights.
    """
    warnings: list[str] = []
    parts = set(map(part_of, base.names))
    check_complete(base, [name for name in base.missing if part_of(name) in parts])
    for expert in experts.values():
        check_complete(expert, expert.missing)
        check_architecture(base, expert)
    head_plan = plan_heads(base, experts, heads)
    for expert in experts.values():
        check_weights(base, expert, head_plan)
        if differing := differing_settings(base, expert):
            warnings.append(f"{expert.title}: its config differs from the base's in {', '.join(differing)}.")
        tied = set(head_plan.kept_from_base) & set(getattr(expert.skeleton, "all_tied_weights_keys", None) or ())
        if tied and not isinstance(expert, LoraCheckpoint):
            warnings.append(
                f"{expert.title}: {first_names(sorted(tied))} is tied to its embeddings, but the base has one of its "
                "own, which stays as it is. Untie the expert's, or tie the base's, if that is not what you want."
            )
        if untied := set(getattr(base.skeleton, "all_tied_weights_keys", None) or ()) & set(expert.names):
            warnings.append(
                f"{expert.title}: {first_names(sorted(untied))} is its own, but tied to the embeddings in the base, "
                "and so in the merged model; the task keeps its own as its head."
            )
        if expert.extra:
            warnings.append(
                f"{expert.title}: its file holds weights its model has no place for: {first_names(expert.extra)}."
            )
        if isinstance(expert, LoraCheckpoint):
            named = expert.peft_config.base_model_name_or_path
            if named and base.source and Path(named).name != Path(base.source).name:
                warnings.append(f"{expert.title}: trained on {named}, merged over {base.source}.")
    if not head_plan.shared:
        raise HfEsmError(f"{base.title} and its experts share no weights to merge.")
    licences = {name: _licence(source) for name, source in (sources or {}).items()}
    known = {licence for licence in licences.values() if licence != "not stated"}
    if len(known) > 1:
        warnings.append(f"the licences differ ({', '.join(sorted(known))}): check that they allow one merged model.")
    adapters_alone = all(isinstance(expert, LoraCheckpoint) for expert in experts.values())
    unchanged = {
        name for name in head_plan.shared if adapters_alone and not any(e.changes(name) for e in experts.values())
    }
    merged = [name for name in head_plan.shared if name not in unchanged]
    elements = {name: math.prod(base.shape(name)) for name in head_plan.shared}
    changing, bodies = sum(elements[name] for name in merged), method.bodies_to_learn(len(experts))
    output = sum(
        math.prod(base.shape(n)) * (dtype if dtype and base.dtype(n).is_floating_point else base.dtype(n)).itemsize
        for n in base.names
    )
    loaded = [base if isinstance(expert, LoraCheckpoint) else expert for expert in experts.values()]
    return MergePlan(
        base=base,
        experts=experts,
        method=method,
        heads=head_plan,
        kinds=_kinds(base, merged),
        licences=licences,
        output_bytes=output,
        scratch_bytes=4 * changing,
        memory_bytes=merge_bytes(max((elements[name] for name in merged), default=0), len(experts)),
        calibration_bytes=max(checkpoint.nbytes for checkpoint in loaded),
        learning_bytes=4 * (sum(elements.values()) + (bodies - 1) * changing) if bodies else 0,  # one is run, whole
        seconds=estimate_seconds(base, merged, list(experts.values())),
        warnings=head_plan.warnings + warnings,
        unchanged=frozenset(unchanged),
    )


def _licence(source: ModelSource) -> str:
    try:
        text = source.card()
        licence = ModelCard(text, ignore_metadata_errors=True).data.license if text else None
    except (yaml.YAMLError, ValueError):  # what stands there is no card
        licence = None
    return licence.lower() if isinstance(licence, str) else "not stated"


def _kinds(base: Checkpoint, shared: list[str]) -> dict[str, int]:
    count = Counter(
        "linear maps"
        if name in base.linear
        else "other matrices"
        if len(base.shape(name)) == 2
        else "other parameters"
        for name in shared
    )
    return dict(sorted(count.items()))


def calibrated_widths(plan: MergePlan) -> dict[str, int]:
    """The linear maps that are merged with statistics, each of a mixture by itself, and how many inputs each has."""
    return {
        matrix: width_of(plan.base.shape(name), linear)
        for name, linear in plan.base.linear.items()
        if name in plan.heads.shared
        for matrix in matrix_names(name, linear)
    }
