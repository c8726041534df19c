"""Low-rank updates as ordinary adapter folders, which PEFT, Transformers and inference servers load."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Optional

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..errors import HfEsmError
from ..utils import new_folder, publish_folder, staging_folder


def write_lora_adapter(
    folder: str | os.PathLike,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    base_model_name: Optional[str] = None,
    *,
    fan_in_fan_out: bool = False,
    base_revision: Optional[str] = None,
    base_class: Optional[type] = None,
) -> Path:
    """Write updates `Δ = B A` of a model's linear maps as a plain LoRA adapter, which needs no hf_esm to load.

    Args:
        folder: to write; it must not exist yet, and appears when it is whole.
        factors: `(A [r, d_in], B [d_out, r])` by the full name of the module. The rank may differ by module; modules
            of rank 0 are left out.
        base_model_name: id or folder of the model that the adapter belongs to, from which `AutoPeftModel…` loads it.
        fan_in_fan_out: the maps are `Conv1D`.
        base_revision: the commit of that model on the Hub.
        base_class: the model's class, for `AutoPeftModel`.

    Raises:
        HfEsmError: if the folder exists, or no module has an update.
    """
    factors = {module: (a, b) for module, (a, b) in factors.items() if len(a)}
    rank, pattern = rank_settings({module: len(a) for module, (a, _) in factors.items()})
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),  # with it the scaling is alpha / r = 1 in every module
        target_modules=list(factors),
        bias="none",
        fan_in_fan_out=fan_in_fan_out,
        inference_mode=True,
        base_model_name_or_path=base_model_name,
        revision=base_revision,
    )
    tensors = {f"{module}.lora_A.weight": a for module, (a, _) in factors.items()}
    tensors |= {f"{module}.lora_B.weight": b for module, (_, b) in factors.items()}
    return write_adapter(folder, config, tensors, base_class)


def rank_settings(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """`r` and `rank_pattern` that give every module its rank: the largest, and what is smaller by module.

    A pattern holds for every module whose name ends with it, and the first that fits decides: `^` ties each to one.
    """
    if not ranks:
        raise HfEsmError("The adapter would be empty: nothing changes a calibrated linear map.")
    largest = max(ranks.values())
    return largest, {f"^{module}": rank for module, rank in ranks.items() if rank != largest}


def write_adapter(
    folder: str | os.PathLike, config: PeftConfig, tensors: Mapping[str, Tensor], base_class: Optional[type] = None
) -> Path:
    """Write an adapter folder, atomically, from its config and its tensors by their names in the base model."""
    folder = new_folder(folder)
    config.target_modules = sorted(config.target_modules)  # PEFT's set is written in another order each time
    mapping = base_class and {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    with staging_folder(folder) as staging:
        config.save_pretrained(str(staging), auto_mapping_dict=mapping)
        stored = {
            f"base_model.model.{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        save_file(stored, staging / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
        publish_folder(staging, folder)
    return folder
