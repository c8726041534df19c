"""A linear map with essential components on it."""

from collections.abc import Mapping
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ...errors import HfEsmError
from ..base import AdapterLayer


class EssentialComponentsLayer(AdapterLayer):
    """The essential components on one linear map, by adapter.

    Attributes:
        essential_components_E: directions `[d_out, r]`, float32: orthonormal columns, strongest first, unless trained.
        essential_components_C: coordinates along them `[r, d_in]`, float32; the adapter's update of the weight is
            `E C`.
        essential_components_gates: of an adapter with gates, the factor of each component, `[r]` float32; the update
            is `E diag(gates) C`, and the gates alone are trained.
    """

    adapter_layer_names = ("essential_components_E", "essential_components_C", "essential_components_gates")

    def __init__(self, base_layer: nn.Module, name: str):
        super().__init__(base_layer, name)
        self.essential_components_E = nn.ParameterDict()
        self.essential_components_C = nn.ParameterDict()
        self.essential_components_gates = nn.ParameterDict()
        self.frozen_peft_weight_names = {}  # PEFT's record of what it must not train, by adapter

    def update_layer(self, adapter_name: str, r: int, gates: bool = False, inference_mode: bool = False) -> None:
        """Add the tensors of an adapter.

        A new adapter does not change the output: E, or with gates the gates, are zero. C, and E under gates, are
        initialised as LoRA's A. Tensors that come from a file are NaN until the file is loaded.
        """
        new = {"E": torch.zeros(self.out_features, r), "C": torch.empty(r, self.in_features)}
        nn.init.kaiming_uniform_(new["C"], a=5**0.5)
        if gates:
            nn.init.kaiming_uniform_(new["E"], a=5**0.5)
            new["gates"] = torch.zeros(r)
            self.frozen_peft_weight_names[adapter_name] = ("essential_components_E", "essential_components_C")
        self.known_loaded.discard(adapter_name)
        for name, tensor in new.items():
            tensor = tensor.fill_(torch.nan) if inference_mode else tensor
            getattr(self, f"essential_components_{name}")[adapter_name] = nn.Parameter(tensor)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_tensors(self, adapter: str, tensors: Mapping[str, nn.Parameter]) -> None:
        """Take parameters as an adapter's `E`, `C` and `gates`; several layers may share them."""
        for name, parameter in tensors.items():
            getattr(self, f"essential_components_{name}")[adapter] = parameter

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """`E [d_out, r]` and `C [r, d_in]` of an adapter.

        Raises:
            HfEsmError: if the adapter's file lacked one of its tensors.
        """
        self.ensure_loaded(adapter)
        return self.essential_components_E[adapter], self.essential_components_C[adapter]

    def gated(self, adapter: str, coordinates: Tensor) -> Tensor:
        """Multiply coordinates `[…, r]` along an adapter's directions by its gates, if it has any."""
        gates = self.essential_components_gates
        return coordinates * gates[adapter] if adapter in gates else coordinates

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class EssentialComponentsLinear(nn.Module, EssentialComponentsLayer):
    """`y = x (W + Σ E C)ᵀ + b` over the active adapters, for `nn.Linear` and `Conv1D`. `E C` is never computed.

    With gates, `E diag(gates) C` takes the place of `E C`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        name: str,
        adapter_name: str,
        r: int,
        gates: bool = False,
        inference_mode: bool = False,
    ):
        super().__init__()
        EssentialComponentsLayer.__init__(self, base_layer, name)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, gates, inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        with self.in_place():
            for adapter in self.active_adapters:
                if adapter in self.essential_components_E:
                    directions, coordinates = self.factors(adapter)
                    inputs = self._cast_input_dtype(x, coordinates.dtype)
                    result = result + F.linear(self.gated(adapter, F.linear(inputs, coordinates)), directions)
        return result.to(dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`E C`, or `E diag(gates) C`, in the orientation in which the base layer stores its weight."""
        directions, coordinates = self.factors(adapter)
        update = self.gated(adapter, directions) @ coordinates
        return update.T if isinstance(self.get_base_layer(), Conv1D) else update

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
                f"{self.name} is a quantised {type(self.get_base_layer()).__name__}, into which essential components "
                "cannot be merged. Load the base without quantisation."
            )
        changed = (weight + sign * self.get_delta_weight(adapter)).to(weight.dtype)
        if safe and not changed.isfinite().all():
            raise HfEsmError(
                f"{self.name}: merging adapter '{adapter}' gives NaN or infinite weights. The adapter is broken; "
                "leave it out."
            )
        weight.data = changed
