"""The files of a PEFT adapter: its settings, its stored tensors, and the class of model that it was trained on."""

import copy
import pickle
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Optional

import transformers
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import HfEsmError
from ..utils import reason_of
from .adapter_settings import read_settings
from .base import Checkpoint, build_skeleton
from .layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .parts import PartOfBase, parts_of


MERGE_REMEDY = "Call `merge_and_unload()` on the loaded model, save that with `save_pretrained`, and merge it instead."
UNWRAP = "Save the model inside: `accelerator.unwrap_model(model, keep_torch_compile=False).save_pretrained(folder)`."
LEAVE_OUT = "Leave it out, or merge a LoRA adapter of the same data in its place."

# Initialisations that change the base model's weights, so that the adapter is not an update of the original.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")

# Variants of LoRA that are made without the base's weights.
_VARIANTS = ("use_dora", "velora_config")

# Settings under which a LoRA adapter is more than an update of the base's weights.
_NO_UPDATE = ("layer_replication", "megatron_config", "arrow_config")

# What PEFT writes before the names of the base's modules.
PEFT_PREFIX = "base_model.model."

_AUTO_CLASSES = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}


def read_adapter_config(folder: Path, title: str) -> PeftConfig:
    """Read the settings of an adapter.

    Raises:
        HfEsmError: if they cannot be read, or if such an adapter cannot be merged into the base's weights.
    """
    config = read_settings(folder, title)
    for name in ("base_model_name_or_path", "revision"):
        if not isinstance(getattr(config, name), (str, type(None))):
            raise HfEsmError(
                f"{title}: {name!r} in its {ADAPTER_CONFIG} must be a text, not {getattr(config, name)!r}."
            )
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind == "ROUTED_EXPERTS":
        raise HfEsmError(
            f"{title} holds the experts of all tasks of an ESM++ model, which no one weight can. Name the model's "
            f"folder and one of its tasks: {{path: …, task: {config.tasks[0]}}}."
        )
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise HfEsmError(
            f"{title} is an adapter of type {kind}, which adds to what the model reads and changes no weight. Leave "
            "it out of the merge, and put it on the merged model: `PeftModel.from_pretrained(merged, folder)`."
        )
    if getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), "tuner_layer_cls", None) is None:
        raise HfEsmError(f"{title} is an adapter of type {kind}, which peft cannot merge into weights. {LEAVE_OUT}")
    if isinstance(config, LoraConfig):
        _check_lora(config, title)
    return config


def _check_lora(config: LoraConfig, title: str) -> None:
    """Raise an error for settings under which a LoRA adapter is more than an update of the base's weights."""
    initialisation = str(config.init_lora_weights).lower()
    if initialisation.startswith("loftq"):
        raise HfEsmError(
            f"{title}: initialised with '{initialisation}', over a quantised copy of the base. {LEAVE_OUT}"
        )
    if initialisation.startswith(_CHANGES_BASE):
        raise HfEsmError(
            f"{title}: initialised with '{initialisation}', which changes the base's own weights. Save it again as an "
            "ordinary LoRA adapter: `model.save_pretrained(folder, path_initial_model_for_weight_conversion=before)`, "
            "where `before` is the folder of the adapter as it was before training."
        )
    for setting in _NO_UPDATE:
        if getattr(config, setting, None):
            raise HfEsmError(
                f"{title} uses {setting}, which is more than an update of the base's weights. {LEAVE_OUT}"
            )


def is_plain_lora(config: PeftConfig) -> bool:
    """Whether the layers of an adapter are those of LoRA, which PEFT makes without the base's weights."""
    variants = [f.name for f in fields(config) if f.metadata.get("is_lora_variant") and f.name not in _VARIANTS]
    if config.peft_type != "LORA" or config.init_lora_weights == "mica" or config.use_qalora:
        return False
    return not any(getattr(config, name) for name in variants)


def read_adapter_tensors(folder: Path, title: str, allow_pickle: bool) -> dict[str, Tensor]:
    """Read the stored tensors of an adapter by their names in the file.

    Raises:
        HfEsmError: if there are none, if they cannot be read, or if they are pickled and that is not allowed.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        if not (folder / WEIGHTS_NAME).is_file():
            raise HfEsmError(f"{title}: there is no {ADAPTER_WEIGHTS} in {folder}.")
        if not allow_pickle:
            raise HfEsmError(
                f"{title}: {WEIGHTS_NAME} is a pickle file, which can run code when it is read. Save the adapter "
                "again as safetensors, or pass `allow_pickle=True` if you trust it."
            )
    try:
        # Sorted: safetensors lists names in random order, and messages name the first.
        tensors = dict(sorted(load_peft_weights(str(folder), device="cpu").items()))
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise HfEsmError(
            f"{title}: the adapter's weights cannot be read ({reason_of(error)}). Copy or download them again."
        ) from None
    if not tensors:
        raise HfEsmError(
            f"{title}: its file holds no tensors, as when `save_pretrained` is given the state of a wrapped model. "
            f"{UNWRAP}"
        )
    if empty := [key for key, tensor in tensors.items() if not tensor.numel()]:
        raise HfEsmError(
            f"{title}: {len(empty)} of the {len(tensors)} tensors in its file are empty ('{empty[0]}', …), as when an "
            "adapter is saved under DeepSpeed ZeRO-3 without gathering its weights. Save it again with Accelerate: "
            "`model.save_pretrained(folder, state_dict=accelerator.get_state_dict(model))`."
        )
    return tensors


def part_of_adapter(adapter: PeftConfig, base: Checkpoint, tensors: dict[str, Tensor]) -> Checkpoint:
    """Return the part of the base that an adapter was trained on, if its modules are not in the base as a whole: of an
    adapter of a language model by itself, that part of a vision-language base.
    """
    if _fits(type(base.skeleton), base.config, tensors):
        return base
    named = _named_class(adapter)
    parts = parts_of(base.skeleton)
    own = {place: part for place, part in parts.items() if named and isinstance(part.config, named.config_class)}
    for place, part in (own or parts).items():  # encoders of CLIP have modules of the same names
        for model_class in filter(None, (_class_of_task(adapter, part.config), type(part))):
            if _fits(model_class, part.config, tensors):
                return PartOfBase(base, place, model_class, part.config)
    return base


def _fits(model_class: type[PreTrainedModel], config: PretrainedConfig, tensors: dict[str, Tensor]) -> bool:
    """Whether all modules that an adapter changes are in a model."""
    skeleton = build_skeleton(model_class, config)
    return all(_owner(key, skeleton) for key in tensors)


def adapted_class(
    adapter: PeftConfig, base: Checkpoint, tensors: dict[str, Tensor]
) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """Return the class that an adapter was trained on, and its config, with the labels and the tokens of the adapter.

    That is the class of the adapter's task type, or the class that it names, if all modules that the adapter changes
    are in it; otherwise the class of the base. (Adapters of vision-language models say `CAUSAL_LM`, those of Whisper
    `SEQ_2_SEQ_LM`.)
    """
    named = [_class_of_task(adapter, base.config), _named_class(adapter)]
    known = [found for found in named if found is not None and isinstance(base.config, found.config_class)]
    classes = list(dict.fromkeys([*known, type(base.skeleton)]))
    model_class = next((found for found in classes if _fits(found, base.config, tensors)), classes[0])
    return model_class, _config_of_rows(build_skeleton(model_class, base.config), tensors)


def _class_of_task(adapter: PeftConfig, config: PretrainedConfig) -> Optional[type[PreTrainedModel]]:
    """Return the class of the adapter's task type for a config, if there is one."""
    auto_class = _AUTO_CLASSES.get(adapter.task_type)
    if auto_class is None or type(config) not in auto_class._model_mapping:
        return None
    model_class = auto_class._model_mapping[type(config)]
    return model_class[0] if isinstance(model_class, (tuple, list)) else model_class


def _named_class(adapter: PeftConfig) -> Optional[type[PreTrainedModel]]:
    """Return the class that an adapter without a task type names, if Transformers has it."""
    mapping = adapter.auto_mapping if isinstance(adapter.auto_mapping, dict) else {}
    named = mapping.get("base_model_class")
    return getattr(transformers, str(named), None) if adapter.task_type not in _AUTO_CLASSES else None


def live_name(key: str) -> str:
    """Return the name that a tensor of an adapter has in the model without the adapter, if it is a weight there."""
    key = key.removeprefix(PEFT_PREFIX)
    for part in (".base_layer", ".token_adapter", ".modules_to_save.default"):
        key = key.replace(part, "")
    return key


def _owner(key: str, skeleton: PreTrainedModel) -> bool:
    """Whether a model has the module that a tensor of an adapter belongs to, if the tensor is one of a module."""
    if not key.startswith(PEFT_PREFIX):
        return True
    parts = key.removeprefix(PEFT_PREFIX).split(".")
    for end in range(len(parts), 0, -1):
        with suppress(AttributeError):
            module = skeleton.get_submodule(".".join(parts[:end]))
            return not any(module.children()) or bool(module._parameters)
    return False


def _config_of_rows(skeleton: PreTrainedModel, tensors: dict[str, Tensor]) -> PretrainedConfig:
    """Return the config with as many labels and tokens as the adapter's head and embeddings have, if it has any."""
    config, state = copy.deepcopy(skeleton.config), skeleton.state_dict()
    text, tokens = config.get_text_config(), getattr(skeleton.config.get_text_config(), "vocab_size", None)
    for key, tensor in tensors.items():
        live = live_name(key)
        if live not in state or state[live].shape == tensor.shape:
            continue
        if len(state[live]) == tokens:
            text.vocab_size = len(tensor)
        elif len(state[live]) == config.num_labels:
            config.num_labels = len(tensor)
    return config
