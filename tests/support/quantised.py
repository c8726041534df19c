"""Tiny quantised checkpoints of every kind that is read, and the weights that Transformers dequantises them into."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from support.architectures import ARCHITECTURES
from support.helpers import Architecture, save
from support.tiny import DECODER, GPT2, LLAMA


Tensors = dict[str, Tensor]
BLOCK = 8


def fp8(scale_dtype: torch.dtype = torch.float32) -> Callable[[str, Tensor], Optional[Tensors]]:
    """Quantise projections to float8, with a scale for every block of 8 × 8."""

    def quantise(key: str, weight: Tensor) -> Optional[Tensors]:
        if not key.endswith("proj.weight"):
            return None
        blocks = weight.float().unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK)  # [rows, columns, 8, 8]
        scale = (blocks.abs().amax((2, 3)) / 448).log2().ceil().exp2()
        codes = weight.float() / scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return {key: codes.to(torch.float8_e4m3fn), f"{key}_scale_inv": scale.to(scale_dtype)}

    return quantise


def mxfp4(key: str, weight: Tensor) -> Optional[Tensors]:
    """Give the experts of GPT-OSS random codes, two of four bits a byte, and a scale for every 32 of them."""
    if not key.endswith(("gate_up_proj", "down_proj")):
        return None
    experts, width, rows = weight.shape  # stored in blocks along the width, transposed
    shape = (experts, rows, width // 32)
    return {
        f"{key}_blocks": torch.randint(0, 256, (*shape, 16), dtype=torch.uint8),
        f"{key}_scales": torch.randint(120, 128, shape, dtype=torch.uint8),
    }


def compressed(layout: str, **weights: Any) -> Callable[[str, Tensor], Optional[Tensors]]:
    """Quantise projections as compressed-tensors does, symmetrically, with a scale for every row or group of a row."""

    def quantise(key: str, weight: Tensor) -> Optional[Tensors]:
        if not key.endswith("proj.weight"):
            return None
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        size = weights.get("group_size") or weight.shape[1]
        largest = 448 if weights["type"] == "float" else 2 ** (weights["num_bits"] - 1) - 1
        scale = weight.reshape(weight.shape[0], -1, size).abs().amax(-1) / largest
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        compressor = BaseCompressor.get_value_from_registry(layout)
        stored = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        return {f"{key.removesuffix('weight')}{name}": tensor for name, tensor in stored.items()}

    return quantise


def described(layout: str, **weights: Any) -> dict[str, Any]:
    """The `quantization_config` of what `compressed` makes."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "version": "0.15.0",
    }


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
GPT_OSS = Architecture(
    "GptOssForCausalLM",
    {**DECODER, "hidden_size": 32, "intermediate_size": 64, "num_local_experts": 2, "num_experts_per_tok": 2}
    | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
)
DEEPSEEK = Architecture(
    "DeepseekV3ForCausalLM",
    {**DECODER, "num_key_value_heads": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 16, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "q_lora_rank": 8}
    | {"kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
)


@dataclass(frozen=True)
class Quantisation:
    """A way to quantise a tiny model.

    Attributes:
        named: name of the quantisation in a plan.
        architecture: the model.
        settings: the `quantization_config` that is stored; for bitsandbytes, arguments of Transformers' own.
        quantise: returns the tensors that are stored instead of one, or None if that one is stored as it is.
        load: the config that makes Transformers dequantise the model; None for bitsandbytes.
        library: what reading needs, besides Transformers.
    """

    named: str
    architecture: Architecture
    settings: dict[str, Any]
    quantise: Optional[Callable[[str, Tensor], Optional[Tensors]]] = None
    load: Optional[Callable[[], Any]] = field(default=None)
    library: Optional[str] = None

    def save(self, model: PreTrainedModel, folder: Path) -> Path:
        """Save a model, quantised."""
        if self.library:
            pytest.importorskip(self.library, reason="`make test-extras` installs it")
        plain = save(model, folder / "plain")
        if self.quantise is None:
            settings = BitsAndBytesConfig(**self.settings)
            type(model).from_pretrained(plain, quantization_config=settings).save_pretrained(folder / "quantised")
            return folder / "quantised"
        torch.manual_seed(0)
        file = Path(plain) / "model.safetensors"
        stored = {key: self.quantise(key, weight) or {key: weight} for key, weight in load_file(file).items()}
        save_file({k: t.contiguous() for tensors in stored.values() for k, t in tensors.items()}, file)
        rewrite_config(plain, quantization_config=self.settings)
        return Path(plain)

    def dequantised(self, folder: Path, **options: Any) -> PreTrainedModel:
        """The model that Transformers dequantises, in bfloat16."""
        cls = getattr(transformers, self.architecture.model_class)
        settings = {"quantization_config": self.load()} if self.load else {}
        model = cls.from_pretrained(folder, dtype=torch.bfloat16, **settings, **options)
        return (model if self.load else model.dequantize()).eval()

    def weights(self, folder: Path) -> Tensors:
        """The weights of that model by name; Transformers leaves some in the dtype that they are stored in, and
        bitsandbytes turns the maps of GPT-2 into linear layers.
        """
        plain = self.architecture.build()
        turned = {f"{name}.weight" for name, module in plain.named_modules() if isinstance(module, Conv1D)}
        state = self.dequantised(folder).state_dict()
        return {name: (w.T if name in turned else w).to(torch.bfloat16) for name, w in state.items()}


def rewrite_config(folder: str | Path, **changes: Any) -> None:
    """Change settings in the config of a saved model."""
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def dense_fp8() -> FineGrainedFP8Config:
    return FineGrainedFP8Config(dequantize=True)


def dense_compressed() -> CompressedTensorsConfig:
    return CompressedTensorsConfig(dequantize=True)


EXTRA = pytest.mark.extras
COMPRESSED = {"load": dense_compressed, "library": "compressed_tensors"}
BITS = {"library": "bitsandbytes"}
FOUR = {"load_in_4bit": True}
KINDS = {
    "fp8": Quantisation("fp8", LLAMA, FP8, fp8(), dense_fp8),
    "fp8, scales of one byte": Quantisation(
        "fp8", LLAMA, {**FP8, "scale_fmt": "ue8m0"}, fp8(torch.float8_e8m0fnu), dense_fp8
    ),
    "fp8, a mixture": Quantisation("fp8", ARCHITECTURES["qwen3-moe"], FP8, fp8(), dense_fp8),
    "fp8, precise parts": Quantisation("fp8", DEEPSEEK, FP8, fp8(), dense_fp8),
    "mxfp4": Quantisation("mxfp4", GPT_OSS, {"quant_method": "mxfp4"}, mxfp4, lambda: Mxfp4Config(dequantize=True)),
    "compressed, packed": Quantisation(
        "compressed-tensors pack-quantized",
        LLAMA,
        described("pack-quantized", **INT4),
        compressed("pack-quantized", **INT4),
        **COMPRESSED,
    ),
    "compressed, whole numbers": Quantisation(
        "compressed-tensors int-quantized",
        LLAMA,
        described("int-quantized", **INT8),
        compressed("int-quantized", **INT8),
        **COMPRESSED,
    ),
    "compressed, float8": Quantisation(
        "compressed-tensors float-quantized",
        LLAMA,
        described("float-quantized", **FLOAT8),
        compressed("float-quantized", **FLOAT8),
        **COMPRESSED,
    ),
    "compressed, a mixture": Quantisation(
        "compressed-tensors pack-quantized",
        ARCHITECTURES["qwen3-moe"],
        described("pack-quantized", **INT4),
        compressed("pack-quantized", **INT4),
        **COMPRESSED,
    ),
    "bitsandbytes, 4 bit": Quantisation("bitsandbytes 4 bit", LLAMA, {**FOUR, "bnb_4bit_quant_type": "fp4"}, **BITS),
    "bitsandbytes, 4 bit twice": Quantisation(
        "bitsandbytes 4 bit",
        LLAMA,
        {**FOUR, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        **BITS,
    ),
    "bitsandbytes, 4 bit as bfloat16": Quantisation(
        "bitsandbytes 4 bit", LLAMA, {**FOUR, "bnb_4bit_quant_storage": "bfloat16"}, **BITS
    ),
    "bitsandbytes, 8 bit": Quantisation("bitsandbytes 8 bit", LLAMA, {"load_in_8bit": True}, **BITS),
    "bitsandbytes, 4 bit, turned": Quantisation("bitsandbytes 4 bit", GPT2, FOUR, **BITS),
    "bitsandbytes, 8 bit, turned": Quantisation("bitsandbytes 8 bit", GPT2, {"load_in_8bit": True}, **BITS),
}
EVERY_KIND = [
    pytest.param(kind, id=name, marks=EXTRA if kind.library else ())
    for name, kind in KINDS.items()
    if kind.architecture is not DEEPSEEK
]
