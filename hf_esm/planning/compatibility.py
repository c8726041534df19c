"""Checks that an expert is a fine-tune of the base, from headers and configs."""

import re
from typing import Any, Optional

from transformers import PreTrainedModel

from ..architecture import body_prefix
from ..checkpoints import Checkpoint
from ..errors import HfEsmError, IncompatibleError
from ..utils import first_names
from .heads import HeadPlan


def check_complete(checkpoint: Checkpoint, missing: list[str]) -> None:
    """Raise an error if weights are missing from a model's files."""
    if missing:
        instead = f", and hold {first_names(checkpoint.extra)} instead" if checkpoint.extra else ""
        raise HfEsmError(
            f"{checkpoint.title}: its files lack {first_names(missing)}, which its "
            f"{type(checkpoint.skeleton).__name__} needs{instead}. Save the model again with `save_pretrained`."
        )


def check_architecture(base: Checkpoint, expert: Checkpoint) -> None:
    """Raise an error if an expert is of another architecture than the base."""
    base_type, expert_type = base.config.model_type, expert.config.model_type
    if base_type != expert_type:
        remedy = "Experts must be fine-tunes of it."
        parts = [name for name, part in base.skeleton.named_modules() if _config_type(part) is type(expert.config)]
        if parts:
            remedy = (
                f"It may be a fine-tune of a part of the base: pass that part of the loaded base, `model.{parts[0]}`, "
                "as the base."
            )
        raise IncompatibleError(f"{expert.title} is a {expert_type} model, but the base is a {base_type}. {remedy}")


def _config_type(module: Any) -> Optional[type]:
    """Return the class of a module's config, if it has one."""
    return type(module.config) if isinstance(module, PreTrainedModel) else None


def check_weights(base: Checkpoint, expert: Checkpoint, heads: HeadPlan) -> None:
    """Raise an error if the bodies of expert and base differ in their weights, or merged weights in their shapes."""
    for having, lacking in ((base, expert), (expert, base)):
        prefix = body_prefix(having.skeleton)
        body = [name for name, live in having.names.items() if not prefix or live == prefix + name]
        # A body may lack a whole part of the other body (BERT's pooler), but not half a part.
        parts = set(map(part_of, lacking.names))
        if missing := [name for name in body if name not in lacking.names and part_of(name) in parts]:
            verbs = ("has", "lacks") if having is expert else ("lacks", "has")
            raise IncompatibleError(
                f"{expert.title} {verbs[0]} {first_names(missing)}, which the base {verbs[1]}. Is it a fine-tune of "
                "this base?"
            )
    for name in heads.shared:
        base_shape, shape = base.shape(name), expert.shape(name)
        if base_shape == shape:
            continue
        raise IncompatibleError(
            f"{expert.title}: '{expert.names[name]}' is {tuple(shape)}, in the base it is {tuple(base_shape)}. "
            "Experts must be fine-tunes of this base."
        )


# Settings that make another function of the same weights, if they differ.
_OF_THE_FUNCTION = r"(num_.*heads|.*_heads|n_heads?|head_dim|hidden_act|hidden_activation|activation(_function)?)$"


# Settings whose differences do not matter: of origin, training, run and head, or visible in shapes.
_INDIFFERENT = (
    r"(.*dropout.*|.*drop_(rate|prob|path).*|architectures|.*dtype|transformers_version|_.*|id2label|label2id|num_labels|"
    r"problem_type|use_cache|.*token_ids?|.*init.*|summary_.*|classifier_.*|tokenizer_class|return_dict|output_.*|"
    r"auto_map|vocab_size|finetuning_task|gradient_checkpointing|torchscript|.*loss.*|name_or_path|semantic_.*|"
    r".*layerdrop|.*suppress_tokens|forced_.*|prefix|n_ctx|n_positions|pretraining_tp|max_window_layers|pooler_.*|"
    r"projection_dim|legacy|use_mean_pooling|quantization_config|image_size|"
    r"pipeline_.*|custom_.*|task_specific_params|is_decoder|add_cross_attention|pruned_heads|tie_.*|mask_.*|apply_spec.*)$"
)


def differing_settings(base: Checkpoint, expert: Checkpoint) -> list[str]:
    """Return the settings of the body, with both values, in which an expert's config differs from that of the base.

    Raises:
        HfEsmError: if a difference makes another function of the same weights.
    """
    base_settings, settings = _settings(base.config), _settings(expert.config)
    differing = []
    for name in sorted(base_settings.keys() & settings.keys()):
        values = settings[name], base_settings[name]
        if values[0] == values[1]:
            continue
        difference = f"{name} ({values[0]}, base {values[1]})"
        if None not in values and re.match(_OF_THE_FUNCTION, name.rpartition(".")[2]):
            raise IncompatibleError(
                f"{expert.title}: its config differs from the base's in {difference}. Is it a fine-tune of this base?"
            )
        differing.append(difference)
    return differing


def _settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the settings of a config whose differences matter, those of its parts by dotted names."""
    settings: dict[str, Any] = {}
    for name, value in (config if isinstance(config, dict) else config.to_dict()).items():
        name = str(name)
        if not re.match(_INDIFFERENT, name):
            settings |= _settings(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return settings


def part_of(name: str) -> str:
    """Return the part of the model that a weight belongs to: `encoder`, `pooler`, `classifier`."""
    return name.partition(".")[0]
