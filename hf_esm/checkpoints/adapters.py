"""A LoRA adapter as a checkpoint: the update of each weight, without a full copy of the model."""

import copy
import pickle
import re
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import WEIGHTS_NAME, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..architecture import canonical_names
from ..errors import HfEsmError
from .base import Checkpoint, build_skeleton, quiet_loading, quiet_peft
from .conversion import to_stored, write_plan
from .layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .shards import ShardedWriter


# Initialisations that change the base model's weights, so that the adapter is not an update of the original.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Variants of LoRA whose update of a weight PEFT computes from the adapter and that weight alone.
_VARIANTS = ("use_dora", "velora_config")

# Settings under which an adapter is more than an update of the base's weights.
_NO_UPDATE = ("trainable_token_indices", "layer_replication", "megatron_config", "use_qalora")

_REMEDY = "Call `merge_and_unload()` on the loaded model, save that with `save_pretrained`, and merge it instead."

# The name that PEFT gives to the one adapter that is loaded.
_ADAPTER = "default"

_AUTO_CLASSES = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}


class LoraCheckpoint(Checkpoint):
    """The base model with a PEFT LoRA adapter on it: `W = W0 + ΔW`.

    PEFT itself computes every ΔW (rank and alpha patterns, rank-stabilised scaling, DoRA, `fan_in_fan_out`), on a
    skeleton of the model that holds the adapter's weights alone. Weights that the adapter replaces (`modules_to_save`,
    biases) are read in full; all other weights are the base's.

    Attributes:
        folder: folder of the adapter.
        peft_config: settings of the adapter.
        base: the base as a model of the adapter's class reads it.
    """

    def __init__(self, folder: Path, title: str, base: Checkpoint, allow_pickle: bool = False):
        """Read the adapter.

        Args:
            folder: folder of the adapter.
            title: name of the adapter in messages.
            base: the model that the adapter was trained on.
            allow_pickle: read the adapter's weights from a pickle file.

        Raises:
            HfEsmError: if the adapter cannot be read, is not an update of weights, or does not fit the base.
        """
        self.folder, self.title = folder, title
        self.peft_config = adapter = _read_config(folder, title)
        tensors = _read_tensors(folder, title, allow_pickle)
        model_class, config = _task_model(adapter, base, tensors, title)
        self.skeleton = build_skeleton(model_class, config)
        self.base = base.seen_as(model_class, config)
        loaded = _load_adapter(adapter, tensors, build_skeleton(model_class, config), title, base.title)
        self._additions, self._replaced = _changes(loaded)
        self._check_ties(loaded)
        self.extra = []
        expected = canonical_names(self.skeleton)
        self.names = {n: live for n, live in expected.items() if live in self._replaced or n in self.base.names}
        self.missing = [name for name in self.base.missing if name not in self.names]
        if self.missing:
            raise HfEsmError(
                f"{title}: neither the adapter nor the base holds {self.missing[:3]}, which {model_class.__name__} "
                "needs. Give as base the checkpoint that the adapter was trained on."
            )

    def _check_ties(self, loaded: nn.Module) -> None:
        """Raise if the adapter changes one of several tied weights alone, or something that is not a weight."""
        source_of = getattr(self.skeleton, "all_tied_weights_keys", None) or {}
        known = set(canonical_names(self.skeleton).values())
        for live in {*self._additions, *self._replaced} - known:
            source = self._replaced.get(source_of.get(live))
            if live in self._additions or source is None or not torch.equal(source, self._replaced[live]):
                kind = f"which is tied to '{source_of[live]}'" if live in source_of else "which is not a stored weight"
                raise HfEsmError(f"{self.title} changes '{live}', {kind}. {_REMEDY}")
        state = loaded.state_dict().items()
        saved = {_plain(path) for path, tensor in state if ".modules_to_save." in path and not tensor.is_meta}
        for live, source in source_of.items():
            if source in saved and live not in self._replaced:
                raise HfEsmError(
                    f"{self.title} replaces '{source}', but not '{live}', which is tied to it in the base. Call "
                    "`merge_and_unload()` on the loaded model, untie its weights "
                    "(`model.config.tie_word_embeddings = False`), save that, and merge it instead."
                )

    def changes(self, name: str) -> bool:
        """Return whether the adapter changes a weight, by its canonical name."""
        return self.names[name] in self._additions or self.names[name] in self._replaced

    def shape(self, name: str) -> tuple[int, ...]:
        live = self.names[name]
        return tuple(self._replaced[live].shape) if live in self._replaced else self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        live = self.names[name]
        return self._replaced[live].dtype if live in self._replaced else self.base.dtype(name)

    def tensor(self, name: str) -> Tensor:
        live = self.names[name]
        weight = self._replaced[live] if live in self._replaced else self.base.tensor(name)
        return (weight + self._additions[live](weight)).to(weight.dtype) if live in self._additions else weight

    def update(self, name: str, base: Tensor) -> Tensor:
        live = self.names[name]
        weight = self._replaced.get(live, base).to(base.device)
        update = weight.float() - base.float()
        return update + self._additions[live](weight).to(base.device) if live in self._additions else update

    def load_model(self, **placement: Any) -> PreTrainedModel:
        if placement:  # over a model that is partly on disk, PEFT writes a copy of it into the working folder
            return self._load_from_disk(**placement)
        model = self.base.load_model_as(type(self.skeleton), self.config)
        with quiet_peft():
            return PeftModel.from_pretrained(model, str(self.folder)).merge_and_unload().eval()

    def _load_from_disk(self, offload_folder: str, **placement: Any) -> PreTrainedModel:
        """Load the model from a copy with the updates in it, which is written weight by weight to `offload_folder`."""
        folder = Path(offload_folder) / "adapted"
        folder.mkdir(parents=True)
        self.config.save_pretrained(folder)
        groups = write_plan(self)
        plan = {key: tensor for group in groups for key, tensor in group.stored.items()}
        with ShardedWriter(folder, plan) as writer:
            for group in groups:
                for key, tensor in to_stored(self, {name: self.tensor(name) for name in group.names}).items():
                    writer.write(key, tensor)
        with quiet_loading():
            model = type(self.skeleton).from_pretrained(
                folder, config=self.config, dtype="auto", offload_folder=offload_folder, **placement
            )
        return model.eval()

    def load_model_as(self, model_class: type, config: PretrainedConfig, **placement: Any) -> PreTrainedModel:
        raise NotImplementedError("an adapter is an expert, never a base")


def _read_config(folder: Path, title: str) -> LoraConfig:
    """Read the settings of an adapter, and raise for those that make it more than an update of weights."""
    try:
        config = PeftConfig.from_pretrained(folder)
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        raise HfEsmError(f"{title}: its {ADAPTER_CONFIG} cannot be used: {error!r}. Upgrade peft?") from None
    if not isinstance(config, LoraConfig):
        raise HfEsmError(f"{title} is a {config.peft_type} adapter; only LoRA is read as it is. {_REMEDY}")
    initialisation = config.init_lora_weights
    if isinstance(initialisation, str) and initialisation.lower().startswith(_CHANGES_BASE):
        raise HfEsmError(
            f"{title}: initialised with '{initialisation}', which changes the base's own weights. Save it again with "
            "`path_initial_model_for_weight_conversion`, which turns it into an ordinary LoRA adapter."
        )
    variants = [f.name for f in fields(config) if f.metadata.get("is_lora_variant") and f.name not in _VARIANTS]
    for setting in (*_NO_UPDATE, *variants):
        if getattr(config, setting, None):
            raise HfEsmError(f"{title} uses {setting}, which is more than an update of the base's weights. {_REMEDY}")
    return config


def _read_tensors(folder: Path, title: str, allow_pickle: bool) -> dict[str, Tensor]:
    """Read the stored tensors. Factors of updates become float32, in which PEFT trains them."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        if not (folder / WEIGHTS_NAME).is_file():
            raise HfEsmError(f"{title}: there is no {ADAPTER_WEIGHTS} in {folder}.")
        if not allow_pickle:
            raise HfEsmError(
                f"{title}: {WEIGHTS_NAME} is a pickle file, which can run code when it is read. Save the adapter "
                "again as safetensors, or pass `allow_pickle=True` if you trust it."
            )
    try:
        tensors = load_peft_weights(str(folder), device="cpu")
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise HfEsmError(
            f"{title}: the adapter's weights cannot be read ({reason}). Copy or download them again."
        ) from None
    return {key: value.float() if ".lora_" in key else value for key, value in tensors.items()}


def _task_model(
    adapter: LoraConfig, base: Checkpoint, tensors: dict[str, Tensor], title: str
) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """Return the class that the adapter was trained on, and its config, with as many labels as the adapter's head."""
    config = copy.deepcopy(base.config)
    mapping = adapter.auto_mapping or {}
    auto_class = _AUTO_CLASSES.get(adapter.task_type)
    if auto_class is None:
        model_class = getattr(transformers, mapping.get("base_model_class") or "", type(base.skeleton))
    elif type(config) in auto_class._model_mapping:
        model_class = auto_class._model_mapping[type(config)]
        model_class = model_class[0] if isinstance(model_class, (tuple, list)) else model_class
    else:
        raise HfEsmError(
            f"{title}: a {adapter.task_type} adapter, but there is no such model of the base's type "
            f"({config.model_type}). Was it trained on another base?"
        )
    config.num_labels = _num_labels(model_class, config, tensors)
    return model_class, config


def _num_labels(model_class: type[PreTrainedModel], config: PretrainedConfig, tensors: dict[str, Tensor]) -> int:
    """Return the number of labels of the adapter's head; the config's if the adapter has none."""
    state = build_skeleton(model_class, config).state_dict()
    for key, tensor in tensors.items():
        live = re.sub(r"^base_model\.model\.", "", key)
        if live in state and state[live].shape != tensor.shape and state[live].shape[0] == config.num_labels:
            return tensor.shape[0]
    return config.num_labels


def _load_adapter(
    adapter: LoraConfig, tensors: dict[str, Tensor], skeleton: PreTrainedModel, title: str, base_title: str
) -> nn.Module:
    """Add the adapter's layers to a model on the meta device, and load its tensors into them."""
    adapter = copy.deepcopy(adapter)
    adapter.init_lora_weights = False
    remedy = f"Was it trained on another base than {base_title}?"
    try:
        with quiet_peft():
            model = PeftModel(skeleton, adapter, low_cpu_mem_usage=True)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                # It would move the factors to the device and dtype of the base's weights, which have no values here.
                module._move_adapter_to_device_of_base_layer = lambda *args, **kwargs: None
        report = set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    except KeyError as error:
        raise HfEsmError(f"{title}: its file lacks {error}. Save or download the adapter again.") from None
    except (ValueError, RuntimeError) as error:
        raise HfEsmError(f"{title} does not fit: {' '.join(str(error).split())} {remedy}") from None
    # With `bias="all"` PEFT stores the biases of saved modules a second time.
    unexpected = [key for key in report.unexpected_keys if ".modules_to_save." not in key]
    if unexpected:
        raise HfEsmError(f"{title}: the model has no place for {unexpected[:3]}. {remedy}")
    absent = [key for key, tensor in model.state_dict().items() if ".lora_" in key and tensor.is_meta]
    if absent:
        raise HfEsmError(f"{title}: its file lacks {absent[:3]}. Save or download the adapter again.")
    return model.get_base_model()


def _changes(model: nn.Module) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, Tensor]]:
    """Return what a loaded adapter changes, by live name: functions from a weight to its update, and new weights."""
    additions: dict[str, Callable[[Tensor], Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and _ADAPTER in module.scaling:
            additions[f"{_plain(path)}.{_parameter(module)}"] = partial(_weight_update, module)
            if module.lora_bias.get(_ADAPTER):
                additions[f"{_plain(path)}.bias"] = partial(_bias_update, module)
    replaced = {
        _plain(path): tensor
        for path, tensor in model.state_dict().items()
        if not tensor.is_meta and ".lora_" not in path and ".original_module." not in path
    }
    return additions, replaced


def _parameter(layer: LoraLayer) -> str:
    """Return the name of the parameter that a LoRA layer updates."""
    return getattr(layer, "parameter_name", None) or "weight"


def _weight_update(layer: LoraLayer, weight: Tensor) -> Tensor:
    """Return what PEFT adds to `weight`, float32. Its values matter to variants alone: DoRA rescales the sum."""
    inner, name = layer.get_base_layer(), _parameter(layer)
    skeleton = getattr(inner, name)
    setattr(inner, name, nn.Parameter(weight.detach().to("cpu", torch.float32, copy=True), requires_grad=False))
    try:
        if _ADAPTER not in layer.lora_variant:
            return layer.get_delta_weight(_ADAPTER).detach()
        layer.merge(adapter_names=[_ADAPTER])
        return getattr(inner, name).detach() - weight.float().cpu()
    finally:
        layer.merged_adapters.clear()
        setattr(inner, name, skeleton)


def _bias_update(layer: LoraLayer, bias: Tensor) -> Tensor:
    """Return what `lora_bias=True` adds to the layer's bias."""
    return layer.lora_B[_ADAPTER].bias.detach() * layer.scaling[_ADAPTER]


def _plain(path: str) -> str:
    """Return the name that a parameter or module has in the model without the adapter."""
    return path.replace(".base_layer", "").replace(f".modules_to_save.{_ADAPTER}", "")
