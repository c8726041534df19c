"""Essential components on the linear maps of a whole model."""

from typing import Any

from torch import nn

from ..base import AdapterModel, check_linear
from .config import EssentialComponentsConfig
from .layer import EssentialComponentsLayer, EssentialComponentsLinear


class EssentialComponentsModel(AdapterModel):
    """A model with the essential components `E C` of one task's update on its weights (arXiv 2602.20208).

    With gates, of one or several tasks: `E diag(gates) C`. Tensors are float32 over a base of any dtype.
    `essential_components` writes an adapter without gates from a fine-tuned model, and `fuse_components` makes one
    adapter of several. The adapter can be trained as any other PEFT adapter; with gates, they alone are trained.
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
        config.task_ranks_of(current_key)  # raises if they do not fit
        settings = adapter_name, config.rank_of(current_key), config.gates, config.inference_mode
        if isinstance(target, EssentialComponentsLayer):
            target.update_layer(*settings)
            return
        check_linear(target, current_key, "essential components")
        layer = EssentialComponentsLinear(target, current_key, *settings)
        self.add_layer(adapter_name, layer, parent, target_name, target)
