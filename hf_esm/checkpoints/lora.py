"""A LoRA adapter as a checkpoint: its update of each weight, without writing out a full copy of the model."""

import copy
import re
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import HfEsmError
from ..weights import canonical_names
from .reader import Checkpoint, build_skeleton


# Initialisations that change the base model's weights, so that the adapter is not an update of the original.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_ADAPTER = "default"
_AUTO_CLASSES = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
}


class LoraCheckpoint(Checkpoint):
    """The base model with a PEFT LoRA adapter on it: `W = W0 + ΔW`.

    PEFT itself computes every ΔW (rank and alpha patterns, rank-stabilised scaling, DoRA, `fan_in_fan_out`), on a
    skeleton of the model that holds the adapter's weights alone. Weights that the adapter replaces (`modules_to_save`,
    biases) are taken in full; every other weight is the base's.
    """

    def __init__(self, folder: Path, title: str, base: Checkpoint):
        self.folder, self.title, self.base = folder, title, base
        self.peft_config = PeftConfig.from_pretrained(folder)
        self._refuse_unsupported()
        try:
            weights = load_peft_weights(str(folder), device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            raise HfEsmError(f"{title}: the adapter's weights in {folder} cannot be read ({error}).") from None
        model_class, config = self._task_model(weights)
        self.skeleton = build_skeleton(model_class, config)
        peft_model = PeftModel(
            build_skeleton(model_class, config), copy.deepcopy(self.peft_config), low_cpu_mem_usage=True
        )
        outcome = set_peft_model_state_dict(peft_model, weights, low_cpu_mem_usage=True)
        if outcome.unexpected_keys:
            raise HfEsmError(f"{title}: the base model has no place for {outcome.unexpected_keys[:3]}. Another base?")
        self._index(peft_model.get_base_model())
        self.missing, self.extra, self.names = [], [], {}
        for name, live in canonical_names(self.skeleton).items():
            if live in self._replaced or name in base.names:
                self.names[name] = live
            else:
                self.missing.append(name)

    def _refuse_unsupported(self) -> None:
        config, title = self.peft_config, self.title
        if not isinstance(config, LoraConfig):
            raise HfEsmError(
                f"{title} is a {config.peft_type} adapter. Only LoRA is read as it is: call "
                "`merge_and_unload()` on the loaded model, save that, and merge it instead."
            )
        how = config.init_lora_weights
        if isinstance(how, str) and how.lower().startswith(_CHANGES_BASE):
            raise HfEsmError(
                f"{title}: initialised with '{how}', which changes the base's own weights. Save it again with "
                "`path_initial_model_for_weight_conversion`, which turns it into an ordinary LoRA adapter."
            )
        for setting in ("trainable_token_indices", "layer_replication", "megatron_config", "alora_invocation_tokens"):
            if getattr(config, setting, None):
                raise HfEsmError(
                    f"{title} uses {setting}, which has no counterpart as an update of the base's weights."
                )

    def _task_model(self, weights: dict[str, Tensor]) -> tuple[type[PreTrainedModel], PretrainedConfig]:
        """The class that the adapter was trained on, with as many labels as its head has."""
        config = copy.deepcopy(self.base.config)
        mapping = self.peft_config.auto_mapping or {}
        auto = _AUTO_CLASSES.get(self.peft_config.task_type)
        if auto is not None:
            model_class = auto._model_mapping[type(config)]
            model_class = model_class[0] if isinstance(model_class, (tuple, list)) else model_class
        else:
            model_class = getattr(transformers, mapping.get("base_model_class") or "", type(self.base.skeleton))
        if model_class is not type(self.base.skeleton):
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

    def _index(self, model: nn.Module) -> None:
        """Sort what the adapter changes into updates and replacements, by live name."""
        self._layers: dict[str, LoraLayer] = {}
        self._replaced: dict[str, Tensor] = {}
        for path, module in model.named_modules():
            if isinstance(module, BaseTunerLayer) and _ADAPTER in module.scaling:
                parameter = getattr(module, "parameter_name", None) or "weight"
                self._layers[f"{_plain(path)}.{parameter}"] = module
        for path, parameter in model.named_parameters():
            if not parameter.is_meta and "lora_" not in path:
                self._replaced[_plain(path)] = parameter.detach()

    def changes(self, name: str) -> bool:
        """Whether the adapter touches this weight."""
        return self.names[name] in self._layers or self.names[name] in self._replaced

    def shape(self, name: str) -> tuple[int, ...]:
        live = self.names[name]
        return tuple(self._replaced[live].shape) if live in self._replaced else self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        live = self.names[name]
        return self._replaced[live].dtype if live in self._replaced else self.base.dtype(name)

    def tensor(self, name: str) -> Tensor:
        live = self.names[name]
        if live in self._replaced:
            return self._replaced[live]
        weight = self.base.tensor(name)
        return (weight.float() + self.update(name, weight)).to(weight.dtype) if live in self._layers else weight

    def update(self, name: str, base: Tensor) -> Tensor:
        live = self.names[name]
        if live in self._replaced:
            return self._replaced[live].to(base.device, torch.float32) - base.float()
        layer = self._layers.get(live)
        if layer is None:
            return torch.zeros_like(base, dtype=torch.float32)
        if not layer.use_dora.get(_ADAPTER, False):
            return layer.get_delta_weight(_ADAPTER).detach().to(base.device, torch.float32)
        # DoRA rescales the rows of the sum, so its update depends on the base's weight: let PEFT merge it in.
        inner = layer.get_base_layer()
        inner.weight = nn.Parameter(base.detach().float().clone(), requires_grad=False)
        layer.merge(adapter_names=[_ADAPTER])
        merged = inner.weight.detach()
        layer.merged_adapters.clear()
        inner.weight = nn.Parameter(torch.empty_like(merged, device="meta"), requires_grad=False)
        return merged - base.float()

    def load_model(self) -> PreTrainedModel:
        model = self.base.load_model_as(type(self.skeleton), self.config)
        return PeftModel.from_pretrained(model, str(self.folder)).merge_and_unload().eval()

    def load_model_as(self, model_class: type, config: PretrainedConfig) -> PreTrainedModel:
        raise NotImplementedError("an adapter is an expert, never a base")


def _plain(path: str) -> str:
    """A parameter's or module's name in the model without the adapter."""
    path = path.replace(".base_layer", "").replace(f".modules_to_save.{_ADAPTER}", "")
    return re.sub(r"\.original_module\b", "", path)
