"""Quantised checkpoints: how Transformers dequantises their weights, one weight at a time."""

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import local_torch_dtype
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer, HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.utils import is_bitsandbytes_available, is_compressed_tensors_available

from ..errors import HfEsmError
from .layout import CONFIG_FILE


# The dtype that weights are dequantised into, and that the other weights of the model are read in.
DENSE_DTYPE = torch.bfloat16

_READABLE = ("fp8", "mxfp8", "mxfp4", "compressed-tensors", "bitsandbytes")

_WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SCALES = r"(weight_scale(_inv)?|_proj_scales|weight\W+absmax|SCB)$"
_COMPANIONS = r"(_scales?(_inv)?|_zero_point|weight_shape|weight_format|weight\W+[a-z_0-9.]+|SCB)$"

# Scales of activations. They are of no use where activations are not quantised.
ACTIVATION_SCALES = r"\.(input|output|activation|[kqv]|kv)(_global)?_(scale|zero_point)(_inv)?$"


def quantisation_of(config: PretrainedConfig) -> Optional[Any]:
    """Return the `quantization_config` of a model or of its language part; None if the model is not quantised."""
    for part in (config, config.get_text_config(decoder=True)):
        if (settings := getattr(part, "quantization_config", None)) is not None:
            return settings
    return None


def refuse_quantised(config: PretrainedConfig, title: str) -> None:
    """Raise for a live model that is quantised: the numbers that it holds are codes, not weights."""
    settings = quantisation_of(config)
    if settings is None:
        return
    method = _method(settings if isinstance(settings, dict) else settings.to_dict())
    if method not in _READABLE:
        raise _unreadable(method, title)
    raise HfEsmError(
        f"{title} is a live model that is quantised ({method}). Pass its folder or id instead, whose weights are "
        "dequantised one at a time, or call `model.dequantize()` first."
    )


def dense_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config of the same model, dequantised."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    config.dtype = DENSE_DTYPE
    return config


def dequantiser(config: PretrainedConfig, title: str) -> Optional[HfQuantizer]:
    """Return Transformers' quantiser of a stored model, set to dequantise; None if the model is not quantised.

    Raises:
        HfEsmError: if Transformers cannot dequantise the model's weights, or a library for that is missing.
    """
    settings = quantisation_of(config)
    if settings is None:
        return None
    method = _method(settings)
    if method not in _READABLE:
        raise _unreadable(method, title)
    _check_library(method, title)
    if method == "compressed-tensors":
        _check_compressed(settings, title)
    try:
        quantiser = AutoHfQuantizer.from_config(copy.deepcopy(settings), pre_quantized=True)
        if method == "bitsandbytes":
            kind = _Dense4Bit if isinstance(quantiser, Bnb4BitHfQuantizer) else _Dense8Bit
            quantiser = kind(quantiser.quantization_config, pre_quantized=True)
        quantiser.quantization_config.dequantize = True
        quantiser.validate_environment()
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise HfEsmError(
            f"{title}: the quantization_config in its {CONFIG_FILE} cannot be used: {reason}. {_ORIGINAL}"
        ) from None
    if method == "compressed-tensors":
        _check_schemes(quantiser, title)
    return quantiser


def quantisation_name(quantiser: HfQuantizer) -> str:
    """Return what a plan calls a quantisation, such as `bitsandbytes 4 bit`."""
    settings = quantiser.quantization_config
    method = str(getattr(settings.quant_method, "value", settings.quant_method))
    if method == "bitsandbytes":
        return f"{method} {4 if isinstance(quantiser, Bnb4BitHfQuantizer) else 8} bit"
    return f"{method} {settings.quantization_config.format}" if method == "compressed-tensors" else method


@contextmanager
def dense_dtype(quantiser: Optional[HfQuantizer]) -> Iterator[None]:
    """Make modules in the dtype of dequantised weights inside the block, if there is a quantiser."""
    with local_torch_dtype(DENSE_DTYPE if quantiser is not None else torch.get_default_dtype()):
        yield


def dense_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Return the dtype that each weight of a dequantised model is read in, by live name.

    Args:
        model: the model, made within `dense_dtype`. Transformers keeps a few weights in float32.
    """
    precise = tuple(model._get_dtype_plan(DENSE_DTYPE))
    return {
        live: torch.float32 if tensor.is_floating_point() and _has_part(live, precise) else tensor.dtype
        for live, tensor in model.state_dict().items()
    }


def dense_key(key: str, quantiser: HfQuantizer) -> str:
    """Return the name that a stored tensor, or the weight that it is a part of, would have without quantisation."""
    for name, stored in quantiser.serialized_names.items():
        for suffix in sorted(stored, key=len, reverse=True):
            if key.endswith(f".{suffix}"):
                return key.removesuffix(suffix) + name
    return key


def lacks_scales(parts: Iterable[tuple[torch.dtype, str]]) -> bool:
    """Return whether weights are stored as codes of 8 bits or fewer, or as integers, without scales beside them.

    Args:
        parts: dtype of each tensor that the weights are made of, and the end of its name.
    """
    parts = list(parts)
    codes = [name for dtype, name in parts if dtype not in _WEIGHT_DTYPES and not re.search(_COMPANIONS, name)]
    return len(codes) > sum(bool(re.search(_SCALES, name)) for _, name in parts)


_ORIGINAL = "Merge the checkpoint that it was quantised from; adapters that were trained over it fit that one too."


def _method(settings: dict[str, Any]) -> str:
    """Return the name of a quantisation. The oldest bitsandbytes checkpoints do not have one."""
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"
    return str(getattr(method, "value", method))


def _unreadable(method: str, title: str) -> HfEsmError:
    return HfEsmError(f"{title} is quantised ({method}), which Transformers cannot dequantise. {_ORIGINAL}")


def _check_library(method: str, title: str) -> None:
    available = {"bitsandbytes": is_bitsandbytes_available, "compressed-tensors": is_compressed_tensors_available}
    if method in available and not available[method]():
        raise HfEsmError(f"{title} is quantised ({method}), and reading it needs {method}: pip install -U {method}")


def _check_compressed(settings: dict[str, Any], title: str) -> None:
    """Raise for what Transformers leaves out when it dequantises compressed tensors."""
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    groups = [group for group in (settings.get("config_groups") or {}).values() if isinstance(group, dict)]
    orders = {(group.get("weights") or {}).get("actorder") for group in groups}
    left_out = {
        "transform_config": settings.get("transform_config"),
        f"sparsity_config of format {sparsity}": sparsity != "dense",
        "actorder 'group'": orders & {"group", "dynamic"},
    }
    for setting, present in left_out.items():
        if present:
            raise HfEsmError(
                f"{title} is quantised (compressed-tensors) with {setting}, which Transformers cannot dequantise. "
                f"{_ORIGINAL}"
            )


def _check_schemes(quantiser: HfQuantizer, title: str) -> None:
    """Raise if dense layers are compressed in several ways: Transformers would read all of them in the first way."""
    config = quantiser.quantization_config.quantization_config
    dense = {
        name: (group.weights, group.format)
        for name, group in config.config_groups.items()
        if not any(target.startswith("re:") and "experts" in target for target in group.targets)
    }
    if any(scheme != next(iter(dense.values())) for scheme in dense.values()):
        raise HfEsmError(
            f"{title} is quantised (compressed-tensors) in several ways ({', '.join(dense)}), of which Transformers "
            f"dequantises one only. {_ORIGINAL}"
        )


def _has_part(live: str, parts: tuple[str, ...]) -> bool:
    """Return whether a weight's name holds one of these names of modules or parameters."""
    return any(f".{part}." in f".{live}." for part in parts)


class _DequantiseBitsAndBytes(ConversionOps):
    """Makes dense weights of the tensors that bitsandbytes stores, as `model.dequantize()` does of whole models."""

    def __init__(self, hf_quantizer: HfQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: Optional[str] = None,
        model: Optional[PreTrainedModel] = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        collected = {key: value if isinstance(value, list) else [value] for key, value in input_dict.items()}
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        names = self.hf_quantizer.serialized_names["weight"]
        dense: dict[str, Any] = {}
        for key, weights in collected.items():
            if not key.endswith("weight"):
                continue
            of_weight = {name: collected.get(key.removesuffix("weight") + name) for name in names[1:]}
            parts = {name: tensors for name, tensors in of_weight.items() if tensors}
            dense[key] = [
                self._dense(weight, {name: tensors[i] for name, tensors in parts.items()}, module)
                for i, weight in enumerate(weights)
            ]
        return {full_layer_name: dense["weight"][0]} if "weight" in dense else dense

    def _dense(self, weight: Tensor, parts: dict[str, Tensor], module: nn.Module) -> Tensor:
        """Return one weight, dequantised. It is stored as that of a `Linear`, also where the module is a `Conv1D`."""
        if not parts:
            return weight
        import bitsandbytes as bnb
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        if "SCB" in parts:
            codes = bnb.nn.Int8Params(weight, SCB=parts["SCB"], requires_grad=False)
        else:
            codes = bnb.nn.Params4bit.from_prequantized(weight, parts, device=weight.device)
        dense = dequantize_bnb_weight(codes, state=codes)
        return dense.T if isinstance(module, Conv1D) else dense


class _Dense4Bit(Bnb4BitHfQuantizer):
    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"dequantize": _DequantiseBitsAndBytes}


class _Dense8Bit(Bnb8BitHfQuantizer):
    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"dequantize": _DequantiseBitsAndBytes}
