"""Essential components on the linear maps of a whole model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...errors import HfEsmError
from .config import EssentialComponentsConfig
from .layer import EssentialComponentsLayer, EssentialComponentsLinear


class EssentialComponentsModel(BaseTuner):
    """One task's essential components (arXiv 2602.20208), `Δ ≈ E C`, beside the weights of a model.

    An adapter of these keeps its factors in float32 over a base of any dtype. `essential_components` writes one from
    a fine-tuned model, `fuse_components` makes one of several; it can be trained as any other.
    """

    prefix: str = "essential_components_"
    tuner_layer_cls = EssentialComponentsLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        config: EssentialComponentsConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, current_key), config.r)
        if isinstance(target, EssentialComponentsLayer):
            target.update_layer(adapter_name, rank, config.inference_mode)
            return
        layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(layer, (nn.Linear, Conv1D)):
            raise HfEsmError(
                f"'{current_key}' is a {type(layer).__name__}: essential components are of nn.Linear and Conv1D "
                "alone. Leave it out of target_modules."
            )
        adapted = EssentialComponentsLinear(target, adapter_name, rank, config.inference_mode)
        if adapter_name not in self.active_adapters:
            adapted.requires_grad_(False)
        self._replace_module(parent, target_name, adapted, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise HfEsmError(
                "Essential components take one set of adapters per batch. For adapter_names, write them as LoRA "
                "adapters (`essential_components(…, as_lora=True)`)."
            )
        yield

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own also sets `weight` on what is put back when an adapter is unloaded, which a head of several
        # layers among `modules_to_save` does not have. Devices are the layer's concern.
        setattr(parent, child_name, new_module)
