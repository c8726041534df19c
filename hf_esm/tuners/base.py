"""What the layers, models and configurations of both tuners share."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Optional

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import HfEsmError
from ..utils import check_task_names, device_of, in_place, is_offloaded


_NOTHING = nullcontext()


def check_tasks(tasks: Any) -> None:
    """Raise unless the tasks of an adapter are a list of different names, each of which can name a file."""
    if not isinstance(tasks, (list, tuple)) or not tasks or len(set(map(str, tasks))) < len(tasks):
        raise HfEsmError(f"`tasks` must be a list of tasks of different names, not {tasks!r}.")
    check_task_names(tasks)


def recorded() -> bool:
    """Whether the code that runs is recorded, by `torch.compile`, `torch.export` or `torch.jit.trace`.

    Then no value of a tensor may be read: it would hold for all inputs.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def names_to_sets(config: PeftConfig) -> None:
    """Turn lists of module names into sets, which is how PEFT looks names up."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, name), list):
            setattr(config, name, set(getattr(config, name)))


class AdapterLayer(BaseTunerLayer):
    """A linear map with float32 adapter tensors on it.

    Attributes:
        name: full name of the linear map in its model.
        known_loaded: adapters whose tensors were checked after loading.
    """

    def __init__(self, base_layer: nn.Module, name: str):
        self.base_layer, self.name = base_layer, name
        self.known_loaded: set[str] = set()
        self._disable_adapters = False
        self.merged_adapters = []
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def tensors(self, adapter: str) -> Iterator[tuple[str, Tensor]]:
        """The parameters and buffers of one adapter, by attribute."""
        for name in (*self.adapter_layer_names, *self.other_param_names):
            if adapter in (by_adapter := getattr(self, name)):
                yield name, by_adapter[adapter]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Optional[torch.device] = None) -> None:
        # PEFT would also cast to the dtype of the base. In bfloat16, directions are no longer orthonormal and routes
        # change.
        device = device or device_of(self.get_base_layer())
        for name, tensor in self.tensors(adapter_name):
            if not tensor.is_meta and device.type != "meta":
                getattr(self, name)[adapter_name] = tensor.to(device)

    def in_place(self) -> AbstractContextManager[None]:
        """Within this context, the adapters' tensors can be read, also where Accelerate offloads them."""
        parts = [self._modules[name] for name in (*self.adapter_layer_names, *self.other_param_names)]
        hooked = [part for part in parts if "_hf_hook" in vars(part)]  # in every pass: it must take no time
        return in_place(*hooked) if any(map(is_offloaded, hooked)) else _NOTHING

    def ensure_loaded(self, adapter: str) -> None:
        """Refuse an adapter whose file lacks tensors, about which PEFT only warns. Checks each adapter once.

        Raises:
            HfEsmError: if a tensor has not been loaded or contains NaN.
        """
        if recorded() or adapter in self.known_loaded:
            return
        for name, tensor in self.tensors(adapter):
            if tensor.is_meta or bool(tensor.isnan().any()):
                raise HfEsmError(
                    f"{self.name}: adapter '{adapter}' has no {name}. Its file lacks the tensor, or contains NaN: "
                    "write the adapter again."
                )
        self.known_loaded.add(adapter)


class AdapterModel(BaseTuner):
    """A tuner of `nn.Linear` and `Conv1D` modules. Its active adapters apply to a whole batch.

    Attributes:
        adapter_names_error: message when `adapter_names` asks for another adapter per sample.
    """

    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    adapter_names_error: str

    def add_layer(
        self, adapter_name: str, layer: AdapterLayer, parent: nn.Module, target_name: str, target: nn.Module
    ) -> None:
        """Put a new adapter layer in the place of the module that it wraps."""
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # When an adapter is unloaded, PEFT's method also sets `weight` on the module that it puts back. A head of
        # several layers among `modules_to_save` has no such attribute. `AdapterLayer` takes care of devices.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise HfEsmError(self.adapter_names_error)
        yield


def check_linear(target: nn.Module, name: str, what: str) -> None:
    """Refuse a module that is neither `nn.Linear` nor `Conv1D`, or an adapter layer on one of them."""
    layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise HfEsmError(
            f"'{name}' is a {type(layer).__name__}, but {what} need an nn.Linear or a Conv1D. Leave the module out of "
            "target_modules."
        )
