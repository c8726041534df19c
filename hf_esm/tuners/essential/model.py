"""Essential components on the linear maps of a whole model."""

from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn

from ..base import AdapterModel, check_linear
from .config import EssentialComponentsConfig
from .layer import EssentialComponentsLayer, EssentialComponentsLinear


class EssentialComponentsModel(AdapterModel):
    """A model with the essential components `E C` of one task's update on its weights (arXiv 2602.20208).

    Factors are float32 over a base of any dtype. `essential_components` writes such an adapter from a fine-tuned
    model, and `fuse_components` makes one adapter of several. The adapter can be trained as any other PEFT adapter.
    """

    prefix: str = "essential_components_"
    tuner_layer_cls = EssentialComponentsLayer
    adapter_names_error = (
        "Essential components apply the same adapters to a whole batch. For adapter_names, write the components as "
        "LoRA adapters (`essential_components(…, as_lora=True)`)."
    )

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
        check_linear(target, current_key, "essential components")
        layer = EssentialComponentsLinear(target, current_key, adapter_name, rank, config.inference_mode)
        self.add_layer(adapter_name, layer, parent, target_name, target)
