"""Is an expert a fine-tune of this base? Answered from headers and configs."""

import re
from typing import Any

from ..architecture import body_prefix
from ..checkpoints import Checkpoint
from ..errors import HfEsmError
from .heads import HeadPlan


def check_complete(checkpoint: Checkpoint, missing: list[str]) -> None:
    if missing:
        raise HfEsmError(
            f"{checkpoint.title}: the file lacks {first_names(missing)}, which its "
            f"{type(checkpoint.skeleton).__name__} needs. Save the model again with `save_pretrained`."
        )


def check_architecture(base: Checkpoint, expert: Checkpoint) -> None:
    own, other = base.config.model_type, expert.config.model_type
    if own != other:
        remedy = "Experts must be fine-tunes of it."
        if type(expert.config) in base.config.sub_configs.values():
            name = type(expert.skeleton).__name__
            remedy = f"It may be a part of the base: load `{name}.from_pretrained(…)` of the base, and pass that."
        raise HfEsmError(f"{expert.title} is a {other} model, but the base is a {own}. {remedy}")


def check_weights(base: Checkpoint, expert: Checkpoint, heads: HeadPlan) -> None:
    """Every weight of the body that one has and the other lacks, and every shape, before any weight is read."""
    for verb, one, other in (("lacks", base, expert), ("has", expert, base)):
        prefix = body_prefix(one.skeleton)
        in_body = [name for name, live in one.names.items() if not prefix or live == prefix + name]
        # A body without a part that the other's has (BERT's pooler) is no error; one with half of it is.
        parts = set(map(part_of, other.names))
        alone = [name for name in in_body if name not in other.names and part_of(name) in parts]
        if alone:
            what = f"which the base {'lacks' if one is expert else 'has'}"
            raise HfEsmError(f"{expert.title} {verb} {first_names(alone)}, {what}. Is it a fine-tune of this base?")
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


def differing_settings(base: Checkpoint, expert: Checkpoint) -> list[str]:
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


def part_of(name: str) -> str:
    """The part of the model that a weight belongs to: `encoder`, `pooler`, `classifier`."""
    return name.partition(".")[0]


def first_names(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
