"""A linear map with essential components on it."""

from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ...errors import HfEsmError


class EssentialComponentsLayer(BaseTunerLayer):
    """What a module with essential components holds, by adapter.

    Attributes:
        essential_components_E: directions `[d_out, r]`; orthonormal columns, strongest first, unless trained.
        essential_components_C: their coordinates `[r, d_in]`; the adapter's update of the weight is `E C`.
    """

    adapter_layer_names = ("essential_components_E", "essential_components_C")

    def __init__(self, base_layer: nn.Module):
        self.base_layer = base_layer
        self.essential_components_E = nn.ParameterDict()
        self.essential_components_C = nn.ParameterDict()
        self.known_loaded: set[str] = set()
        self._disable_adapters = False
        self.merged_adapters = []
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def update_layer(self, adapter_name: str, r: int, inference_mode: bool = False) -> None:
        """Make room for an adapter. One to train changes nothing before: E is zero, C as LoRA's A. What has to come
        from a file is NaN until it is loaded.
        """
        directions, coordinates = torch.zeros(self.out_features, r), torch.empty(r, self.in_features)
        nn.init.kaiming_uniform_(coordinates, a=5**0.5)
        if inference_mode:
            directions, coordinates = directions.fill_(torch.nan), coordinates.fill_(torch.nan)
        self.known_loaded.discard(adapter_name)
        self.essential_components_E[adapter_name] = nn.Parameter(directions)
        self.essential_components_C[adapter_name] = nn.Parameter(coordinates)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Optional[torch.device] = None) -> None:
        # PEFT's own brings them to the base's dtype, too: in bfloat16 the directions are orthonormal no more.
        for name in self.adapter_layer_names:
            factors = getattr(self, name)
            if adapter_name in factors and not factors[adapter_name].is_meta:
                factors[adapter_name] = factors[adapter_name].to(device or self.weight.device)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """`E` and `C`, once it is known that they were loaded: PEFT only warns of a file that lacks some."""
        found = self.essential_components_E[adapter], self.essential_components_C[adapter]
        if not torch.compiler.is_compiling() and adapter not in self.known_loaded:
            if any(factor.is_meta or bool(factor.isnan().any()) for factor in found):
                raise HfEsmError(
                    f"Adapter '{adapter}': its file lacks essential components of a {type(self.base_layer).__name__} "
                    f"[{self.out_features}, {self.in_features}], or holds NaN. Write it again."
                )
            self.known_loaded.add(adapter)
        return found

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class EssentialComponentsLinear(nn.Module, EssentialComponentsLayer):
    """`y = x (W + Σ E C)ᵀ + b` over the active adapters, for `nn.Linear` and `Conv1D`; `E C` is never built."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, r: int, inference_mode: bool = False):
        super().__init__()
        EssentialComponentsLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter in self.essential_components_E:
                directions, coordinates = self.factors(adapter)
                inputs = self._cast_input_dtype(x, coordinates.dtype)
                result = result + F.linear(F.linear(inputs, coordinates), directions)
        return result.to(dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`E C`, as the base layer stores its weight."""
        directions, coordinates = self.factors(adapter)
        delta = directions @ coordinates
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.essential_components_E:
                self._add_to_weight(adapter, 1, safe_merge)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self._add_to_weight(self.merged_adapters.pop(), -1)

    @torch.no_grad()
    def _add_to_weight(self, adapter: str, sign: int, safe: bool = False) -> None:
        weight = self.get_base_layer().weight
        if not weight.is_floating_point():
            raise HfEsmError(
                f"Essential components cannot be merged into a quantised {type(self.get_base_layer()).__name__}. "
                "Load the base without quantisation to merge."
            )
        changed = (weight + sign * self.get_delta_weight(adapter)).to(weight.dtype)
        if safe and not changed.isfinite().all():
            raise HfEsmError(f"Merging adapter '{adapter}' gives NaN or infinite weights. It is broken; leave it out.")
        weight.data = changed
