"""The routed adapter of a model in memory, and others that a user has put beside it or on top."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import HfEsmError
from ..tuners.routed import RoutedExpertsLayer


if TYPE_CHECKING:
    from .model import RoutedModel


def adapter_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The tensors of a routed adapter, by their names in its file; other adapters may lie on its layers."""
    layers = [module for module in model.modules() if isinstance(module, RoutedExpertsLayer)]
    return {f"base_model.model.{layer.name}.{name}": t for layer in layers for name, t in layer.tensors(adapter)}


def static_name(name: str) -> str:
    """The name of a weight without adapters, from its name under any number of them."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def check_present(routed: "RoutedModel") -> PeftModel:
    """The `PeftModel` of a routed model.

    Raises:
        HfEsmError: if its adapter was deleted or unloaded.
    """
    model = routed.model

    def is_on(adapter: str) -> bool:
        return any(isinstance(m, RoutedExpertsLayer) and adapter in m.configs for m in model.modules())

    if is_on(routed.adapter):  # an adapter on top shares PEFT's table, and takes its namesake along
        model.peft_config.setdefault(routed.adapter, routed.config)
    if not is_on(model.active_adapter):
        raise HfEsmError(
            f"The routed adapter was deleted or unloaded from this {type(routed).__name__}. Load the model again: "
            f"`RoutedModel.from_pretrained('{routed.folder}')`."
        )
    return model


def check_alone(models: Iterable[nn.Module], adapter: str) -> None:
    """Refuse adapters that a routed model would lose when it is saved.

    Args:
        models: the routed model, and its task models.
        adapter: name of the routed adapter.
    """
    for model in models:
        for place, module in model.named_modules():
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                own = {adapter} if isinstance(module, RoutedExpertsLayer) else set()
                if others := sorted(module._get_available_adapters() - own):
                    raise HfEsmError(
                        f"'{place}' has an adapter {others[0]!r}, which RoutedModel does not save. Save it with "
                        "`save_pretrained` of the model that it was added to, and remove it with "
                        f"`delete_adapter({others[0]!r})` of that model."
                    )
