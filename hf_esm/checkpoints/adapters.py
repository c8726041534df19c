"""A LoRA adapter as a checkpoint: its update of each weight, without writing out a full copy of the model (but to run
one that does not fit in memory).
"""

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
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..architecture import canonical_names
from ..errors import HfEsmError
from .base import Checkpoint, build_skeleton, quiet_loading
from .conversion import to_stored, write_plan
from .shards import ShardedWriter


# Initialisations that change the base model's weights, so that the adapter is not an update of the original.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


# Variants of LoRA whose update of a weight PEFT computes from the adapter and that weight alone.
_VARIANTS = ("use_dora", "velora_config")


_NO_UPDATE = ("trainable_token_indices", "layer_replication", "megatron_config", "use_qalora")


_REMEDY = "Call `merge_and_unload()` on the loaded model, save that with `save_pretrained`, and merge it instead."


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
    biases) are taken in full; every other weight is the base's.
    """

    def __init__(self, folder: Path, title: str, base: Checkpoint, allow_pickle: bool = False):
        self.folder, self.title = folder, title
        try:
            self.peft_config = PeftConfig.from_pretrained(folder)
        except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
            raise HfEsmError(f"{title}: its adapter_config.json cannot be used: {error!r}. Upgrade peft?") from None
        self._refuse_unsupported()
        weights = self._read_weights(allow_pickle)
        model_class, config = self._task_model(base, weights)
        self.skeleton = build_skeleton(model_class, config)
        self.base = base.seen_as(model_class, config)
        self._index(self._inject(weights, model_class, config))
        self.extra = []
        expected = canonical_names(self.skeleton)
        self.names = {n: live for n, live in expected.items() if live in self._replaced or n in self.base.names}
        self.missing = [name for name in self.base.missing if name not in self.names]
        if self.missing:
            raise HfEsmError(
                f"{title}: neither the adapter nor the base holds {self.missing[:3]}, which {model_class.__name__} "
                "needs. Give as base the checkpoint that the adapter was trained on."
            )

    def _refuse_unsupported(self) -> None:
        config, title = self.peft_config, self.title
        if not isinstance(config, LoraConfig):
            raise HfEsmError(f"{title} is a {config.peft_type} adapter; only LoRA is read as it is. {_REMEDY}")
        how = config.init_lora_weights
        if isinstance(how, str) and how.lower().startswith(_CHANGES_BASE):
            raise HfEsmError(
                f"{title}: initialised with '{how}', which changes the base's own weights. Save it again with "
                "`path_initial_model_for_weight_conversion`, which turns it into an ordinary LoRA adapter."
            )
        variants = [f.name for f in fields(config) if f.metadata.get("is_lora_variant") and f.name not in _VARIANTS]
        for setting in (*_NO_UPDATE, *variants):
            if getattr(config, setting, None):
                raise HfEsmError(f"{title} uses {setting}, which is no update of the base's weights alone. {_REMEDY}")

    def _read_weights(self, allow_pickle: bool) -> dict[str, Tensor]:
        """The stored tensors; what LoRA adds in float32, as PEFT loads it to train on."""
        if not (self.folder / "adapter_model.safetensors").is_file():
            if not (self.folder / "adapter_model.bin").is_file():
                raise HfEsmError(f"{self.title}: there is no adapter_model.safetensors in {self.folder}.")
            if not allow_pickle:
                raise HfEsmError(
                    f"{self.title}: adapter_model.bin is a pickle file, which can run code when it is read. Save the "
                    "adapter again as safetensors, or pass allow_pickle=True if you trust it."
                )
        try:
            weights = load_peft_weights(str(self.folder), device="cpu")
        except (SafetensorError, OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            why = str(error).partition("\n")[0]
            raise HfEsmError(
                f"{self.title}: the adapter's weights cannot be read ({why}). Copy or download them again."
            ) from None
        return {key: value.float() if ".lora_" in key else value for key, value in weights.items()}

    def _task_model(
        self, base: Checkpoint, weights: dict[str, Tensor]
    ) -> tuple[type[PreTrainedModel], PretrainedConfig]:
        """The class that the adapter was trained on, with as many labels as its head has."""
        config = copy.deepcopy(base.config)
        mapping = self.peft_config.auto_mapping or {}
        auto = _AUTO_CLASSES.get(self.peft_config.task_type)
        if auto is None:
            model_class = getattr(transformers, mapping.get("base_model_class") or "", type(base.skeleton))
        elif type(config) in auto._model_mapping:
            model_class = auto._model_mapping[type(config)]
            model_class = model_class[0] if isinstance(model_class, (tuple, list)) else model_class
        else:
            raise HfEsmError(
                f"{self.title}: a {self.peft_config.task_type} adapter, but there is no such model of the base's type "
                f"({config.model_type}). Was it trained on another base?"
            )
        config.num_labels = self._num_labels(model_class, config, weights)
        return model_class, config

    def _num_labels(
        self, model_class: type[PreTrainedModel], config: PretrainedConfig, weights: dict[str, Tensor]
    ) -> int:
        state = build_skeleton(model_class, config).state_dict()
        for key, tensor in weights.items():
            live = re.sub(r"^base_model\.model\.", "", key)
            if live in state and state[live].shape != tensor.shape and state[live].shape[0] == config.num_labels:
                return tensor.shape[0]
        return config.num_labels

    def _inject(
        self, weights: dict[str, Tensor], model_class: type[PreTrainedModel], config: PretrainedConfig
    ) -> nn.Module:
        """The model on the meta device, with the adapter's weights in it."""
        adapter = copy.deepcopy(self.peft_config)
        adapter.init_lora_weights = False
        other = f"Was it trained on another base than {self.base.title}?"
        try:
            model = PeftModel(build_skeleton(model_class, config), adapter, low_cpu_mem_usage=True)
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    # It would bring the weights to the device and the dtype of the base, which here has none.
                    module._move_adapter_to_device_of_base_layer = lambda *args, **kwargs: None
            outcome = set_peft_model_state_dict(model, weights, low_cpu_mem_usage=True)
        except KeyError as error:
            raise HfEsmError(f"{self.title}: its file lacks {error}. Save or download the adapter again.") from None
        except (ValueError, RuntimeError) as error:
            raise HfEsmError(f"{self.title} does not fit: {' '.join(str(error).split())} {other}") from None
        # With `bias="all"` PEFT stores the biases of saved modules a second time.
        unexpected = [key for key in outcome.unexpected_keys if ".modules_to_save." not in key]
        if unexpected:
            raise HfEsmError(f"{self.title}: the model has no place for {unexpected[:3]}. {other}")
        absent = [key for key, tensor in model.state_dict().items() if ".lora_" in key and tensor.is_meta]
        if absent:
            raise HfEsmError(f"{self.title}: its file lacks {absent[:3]}. Save or download the adapter again.")
        return model.get_base_model()

    def _index(self, model: nn.Module) -> None:
        """Sort what the adapter changes into additions and replacements, by live name."""
        self._additions: dict[str, Callable[[Tensor], Tensor]] = {}
        self._replaced: dict[str, Tensor] = {}
        for path, module in model.named_modules():
            if isinstance(module, LoraLayer) and _ADAPTER in module.scaling:
                self._additions[f"{_plain(path)}.{_parameter(module)}"] = partial(_weight_update, module)
                if module.lora_bias.get(_ADAPTER):
                    self._additions[f"{_plain(path)}.bias"] = partial(_bias_update, module)
        saved: set[str] = set()
        for path, tensor in model.state_dict().items():
            if not tensor.is_meta and ".lora_" not in path and ".original_module." not in path:
                self._replaced[_plain(path)] = tensor
                saved |= {_plain(path)} if ".modules_to_save." in path else set()
        tied = getattr(self.skeleton, "all_tied_weights_keys", None) or {}
        known = set(canonical_names(self.skeleton).values())
        for live in {*self._additions, *self._replaced} - known:
            kept = self._replaced.get(tied.get(live))
            if live in self._additions or kept is None or not torch.equal(kept, self._replaced[live]):
                why = f"which is tied to '{tied[live]}'" if live in tied else "which is no weight of the model alone"
                raise HfEsmError(f"{self.title} changes '{live}', {why}. {_REMEDY}")
        if left := [live for live, kept in tied.items() if kept in saved and live not in self._replaced]:
            raise HfEsmError(
                f"{self.title} replaces '{tied[left[0]]}', but '{left[0]}', which is tied to it in the base, stayed "
                "as it was. Call `merge_and_unload()` on the loaded model, untie its weights "
                "(`model.config.tie_word_embeddings = False`), save that, and merge it instead."
            )

    def changes(self, name: str) -> bool:
        """Whether the adapter touches this weight."""
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
        if placement:  # over a model that is partly on disk, PEFT writes a copy of it into the current folder
            return self._load_from_disk(**placement)
        model = self.base.load_model_as(type(self.skeleton), self.config)
        return PeftModel.from_pretrained(model, str(self.folder)).merge_and_unload().eval()

    def _load_from_disk(self, offload_folder: str, **placement: Any) -> PreTrainedModel:
        """The live model from a copy with the updates in it, which is written weight by weight, and goes with the
        folder.
        """
        folder = Path(offload_folder) / "adapted"
        folder.mkdir(parents=True)
        self.config.save_pretrained(folder)
        groups = write_plan(self)
        with ShardedWriter(
            folder, {key: tensor for group in groups for key, tensor in group.stored.items()}
        ) as writer:
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


def _parameter(layer: LoraLayer) -> str:
    """The name of the parameter that a LoRA layer updates."""
    return getattr(layer, "parameter_name", None) or "weight"


def _weight_update(layer: LoraLayer, weight: Tensor) -> Tensor:
    """What PEFT adds to `weight`, float32. Only variants such as DoRA, which rescale the sum, look at its values."""
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
    """What `lora_bias=True` adds to the layer's bias."""
    return layer.lora_B[_ADAPTER].bias.detach() * layer.scaling[_ADAPTER]


def _plain(path: str) -> str:
    """A parameter's or module's name in the model without the adapter."""
    return path.replace(".base_layer", "").replace(f".modules_to_save.{_ADAPTER}", "")
