"""What a merge will do, found out from headers alone: who fits, what is merged how, what it costs, what is missing."""

import functools
import math
import re
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
import yaml
from huggingface_hub import ModelCard

from ..architecture import body_prefix
from ..checkpoints import Checkpoint, LoraCheckpoint, ModelSource
from ..errors import HfEsmError
from ..methods import MergeMethod
from ..utils.resume import Work
from ..utils.sizes import bytes_of, readable
from .heads import HeadPlan, plan_heads


# What an update of low rank takes of a full one's time; measured at widths of 1,024 and 4,096.
_ADAPTER = 0.1


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
            labels = f", {expert.config.num_labels} labels" if self.heads.own[task] else ""
            own = f", keeps {len(self.heads.own[task])} weights of its own" if self.heads.own[task] else ""
            lines.append(f"  {task}: {expert.source or 'live model'}{commit}, {kind}{labels}{own}")
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items() if count)
        lines += [
            "",
            f"  merged     {kinds}",
            f"  untouched  {len(self.heads.kept_from_base) + len(self.unchanged)} weights of the base",
            "  licences   " + "; ".join(f"{name}: {licence}" for name, licence in self.licences.items()),
            f"  disk       {readable(self.output_bytes)} for the model, {readable(self.scratch_bytes)} scratch",
            f"  memory     {self._memory()}",
            f"  time       about {_duration(self.seconds)} to merge, besides reading and calibrating",
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
    parts = set(map(_part, base.names))
    _check_complete(base, [name for name in base.missing if _part(name) in parts])
    for expert in experts.values():
        _check_complete(expert, expert.missing)
        _check_architecture(base, expert)
    head_plan = plan_heads(base, experts, heads)
    for expert in experts.values():
        _check_weights(base, expert, head_plan)
        if differing := _differing_settings(base, expert):
            warnings.append(f"{expert.title}: its config differs from the base's in {', '.join(differing)}.")
        tied = set(head_plan.kept_from_base) & set(getattr(expert.skeleton, "all_tied_weights_keys", None) or ())
        if tied and not isinstance(expert, LoraCheckpoint):
            warnings.append(
                f"{expert.title}: {_some(sorted(tied))} is tied to its embeddings, but the base has one of its own, "
                "which stays as it is. Untie the expert's, or tie the base's, if that is not what you want."
            )
        if untied := set(getattr(base.skeleton, "all_tied_weights_keys", None) or ()) & set(expert.names):
            warnings.append(
                f"{expert.title}: {_some(sorted(untied))} is its own, but tied to the embeddings in the base, and so "
                "in the merged model; the task keeps its own as its head."
            )
        if expert.extra:
            warnings.append(
                f"{expert.title}: its file holds weights its model has no place for: {_some(expert.extra)}."
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
        seconds=_estimate_seconds(base, merged, list(experts.values())),
        warnings=head_plan.warnings + warnings,
        unchanged=frozenset(unchanged),
    )


def merge_bytes(elements: int, tasks: int) -> int:
    """What merging a weight of so many elements takes: each expert's, its factors in float64, and the work on them."""
    return 4 * elements * (2 * tasks + 6)


def check_disk(
    plan: MergePlan,
    output: Path,
    statistics_bytes: int = 0,
    statistics_dir: Optional[str] = None,
    resume_dir: Optional[str] = None,
) -> None:
    """Raise if the output would replace one of the models, or a disk cannot hold what goes there."""
    for model in (plan.base, *plan.experts.values()):
        folder = getattr(model, "folder", None) or model.source
        if folder and Path(folder).resolve().is_relative_to(output.resolve()):
            raise HfEsmError(f"{model.title} stands in output_dir {output}, which would be replaced. Choose another.")
    scratch = Path(resume_dir).expanduser() if resume_dir else output
    kept = Path(statistics_dir).expanduser() if statistics_dir else scratch
    wanted = [(output, plan.output_bytes), (scratch, plan.scratch_bytes), (kept, statistics_bytes)]
    if resume_dir:
        work = Work(resume_dir, {})
        wanted += [(scratch, -work.nbytes), (scratch, statistics_bytes if statistics_dir else 0)]
    needed: dict[int, float] = defaultdict(float)
    places = {}
    for place, count in wanted:
        there = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.exists())
        disk = there.stat().st_dev
        needed[disk] += count
        places.setdefault(disk, (place, there))
    for disk, (place, there) in places.items():
        free = shutil.disk_usage(there).free
        if needed[disk] > free:
            raise HfEsmError(
                f"{place}: merging needs {readable(needed[disk])} on this disk and {readable(free)} are free. Make "
                "room there."
            )


def check_memory(plan: MergePlan, max_memory: Optional[str | int]) -> None:
    """Raise if the largest weight, or what a method learns with, does not fit in `max_memory`."""
    if max_memory is None:
        return
    wanted = {
        f"the largest weight of {len(plan.experts)} experts": plan.memory_bytes,
        f"learning by {plan.method.name}": plan.learning_bytes,
    }
    for what, count in wanted.items():
        if count > bytes_of(max_memory, "max_memory"):
            raise HfEsmError(f"max_memory {max_memory}: {what} needs {readable(count)}. Give at least that.")


def check_values(plan: MergePlan, progress: Any = iter) -> None:
    """Read every weight that will be merged or kept by a task once, raise if one is not finite or an expert equals the
    base, and note in the plan which ones no expert changes.
    """
    changed: dict[str, set[str]] = {task: set() for task in plan.experts}
    for name in progress(plan.heads.shared):
        weight = plan.base.tensor(name)
        _check_finite(weight, plan.base, name)
        for task, expert in plan.experts.items():
            if isinstance(expert, LoraCheckpoint):
                if not expert.changes(name):
                    continue
                update = expert.update(name, weight)
                _check_finite(update, expert, name)
                if update.any():
                    changed[task].add(name)
            elif not torch.equal(tuned := expert.tensor(name), weight):
                _check_finite(tuned, expert, name)
                changed[task].add(name)
    for task, names in changed.items():
        if not names:
            raise HfEsmError(f"{plan.experts[task].title} equals the base in every merged weight. Leave it out.")
    plan.unchanged = frozenset(plan.heads.shared) - frozenset.union(*map(frozenset, changed.values()))
    for task, names in plan.heads.own.items():
        for name in names:
            _check_finite(plan.experts[task].tensor(name), plan.experts[task], name)


def _check_finite(tensor: torch.Tensor, checkpoint: Checkpoint, name: str) -> None:
    # A sum is finite if all its terms are, and is the cheaper look at a sound weight.
    if tensor.is_floating_point() and not tensor.sum(dtype=torch.float64).isfinite():
        raise HfEsmError(
            f"{checkpoint.title}: weight '{checkpoint.names[name]}' holds NaN or infinite values. Save or "
            "download the model again."
        )


def _check_architecture(base: Checkpoint, expert: Checkpoint) -> None:
    own, other = base.config.model_type, expert.config.model_type
    if own != other:
        remedy = "Experts must be fine-tunes of it."
        if type(expert.config) in base.config.sub_configs.values():
            name = type(expert.skeleton).__name__
            remedy = f"It may be a part of the base: load `{name}.from_pretrained(…)` of the base, and pass that."
        raise HfEsmError(f"{expert.title} is a {other} model, but the base is a {own}. {remedy}")


# Settings of which a difference makes another function of the same weights.
_OF_THE_FUNCTION = r"(num_.*heads|.*_heads|n_heads?|head_dim|hidden_act|hidden_activation|activation(_function)?)$"
# Settings that say where a model comes from, how it is trained or run, or what its head is, or that shapes show.
_INDIFFERENT = (
    r"(.*dropout.*|.*drop_(rate|prob|path).*|architectures|.*dtype|transformers_version|_.*|id2label|label2id|num_labels|"
    r"problem_type|use_cache|.*token_ids?|.*init.*|summary_.*|classifier_.*|tokenizer_class|return_dict|output_.*|"
    r"auto_map|vocab_size|finetuning_task|gradient_checkpointing|torchscript|.*loss.*|name_or_path|semantic_.*|"
    r".*layerdrop|.*suppress_tokens|forced_.*|prefix|n_ctx|n_positions|pretraining_tp|max_window_layers|pooler_.*|"
    r"projection_dim|legacy|use_mean_pooling|quantization_config|image_size|"
    r"pipeline_.*|custom_.*|task_specific_params|is_decoder|add_cross_attention|pruned_heads|tie_.*|mask_.*|apply_spec.*)$"
)


def _differing_settings(base: Checkpoint, expert: Checkpoint) -> list[str]:
    """The settings of the body in which an expert's config differs from the base's, with both values.

    Raises:
        HfEsmError: if they make its weights another function.
    """
    ours, theirs = _settings(base.config), _settings(expert.config)
    differing = {name: f"{name} ({theirs[name]}, base {ours[name]})" for name in ours.keys() & theirs.keys()}
    differing = {name: said for name, said in sorted(differing.items()) if ours[name] != theirs[name]}
    for name, said in differing.items():
        if None not in (ours[name], theirs[name]) and re.match(_OF_THE_FUNCTION, name.rpartition(".")[2]):
            raise HfEsmError(f"{expert.title}: its config differs from the base's in {said}. Is it a fine-tune of it?")
    return list(differing.values())


def _settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config's settings that matter here, those of its parts by dotted names."""
    found: dict[str, Any] = {}
    for name, value in (config if isinstance(config, dict) else config.to_dict()).items():
        name = str(name)
        if not re.match(_INDIFFERENT, name):
            found |= _settings(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _check_complete(checkpoint: Checkpoint, missing: list[str]) -> None:
    if missing:
        raise HfEsmError(
            f"{checkpoint.title}: the file lacks {_some(missing)}, which its {type(checkpoint.skeleton).__name__} "
            "needs. Save the model again with `save_pretrained`."
        )


def _check_weights(base: Checkpoint, expert: Checkpoint, heads: HeadPlan) -> None:
    """Every weight of the body that one has and the other lacks, and every shape, before any weight is read."""
    for verb, one, other in (("lacks", base, expert), ("has", expert, base)):
        prefix = body_prefix(one.skeleton)
        in_body = [name for name, live in one.names.items() if not prefix or live == prefix + name]
        # A body without a part that the other's has (BERT's pooler) is no error; one with half of it is.
        parts = set(map(_part, other.names))
        alone = [name for name in in_body if name not in other.names and _part(name) in parts]
        if alone:
            what = f"which the base {'lacks' if one is expert else 'has'}"
            raise HfEsmError(f"{expert.title} {verb} {_some(alone)}, {what}. Is it a fine-tune of this base?")
    for name in heads.shared:
        ours, theirs = base.shape(name), expert.shape(name)
        if ours == theirs:
            continue
        if len(ours) == 2 and ours[1:] == theirs[1:] and base.linear.get(name) is None:
            raise HfEsmError(
                f"{expert.title}: '{expert.names[name]}' has {theirs[0]} rows, the base has {ours[0]}. If its "
                "vocabulary was resized, call `model.resize_token_embeddings` to bring both to one size."
            )
        raise HfEsmError(
            f"{expert.title}: '{expert.names[name]}' is {theirs}, in the base it is {ours}. Experts must be "
            "fine-tunes of this base."
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


def _estimate_seconds(base: Checkpoint, shared: list[str], experts: list[Checkpoint]) -> float:
    """The eigenproblems of all shared matrices, at the speed of this machine."""
    total, tasks = 0.0, len(experts)
    share = sum(_ADAPTER if isinstance(expert, LoraCheckpoint) else 1.0 for expert in experts) / tasks
    for name in shared:
        shape = base.shape(name)
        if len(shape) >= 2 and (name in base.linear or len(shape) == 2):
            slices = math.prod(shape[:-2])
            total += slices * (
                tasks * min(shape[-2:]) ** 3 + sum(side**3 for side in shape[-2:] if side < 4 * min(shape[-2:]))
            )
    return share * total * _seconds_per_cube()


@functools.cache
def _seconds_per_cube() -> float:
    """How long an eigenproblem takes here, divided by the cube of its size; timed once."""
    probe = torch.randn(768, 768, dtype=torch.float64)
    torch.linalg.eigh(probe + probe.T)
    start = time.perf_counter()
    torch.linalg.eigh(probe + probe.T)
    return (time.perf_counter() - start) / 768**3


def _part(name: str) -> str:
    """The part of the model that a weight belongs to: `encoder`, `pooler`, `classifier`."""
    return name.partition(".")[0]


def _some(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
