"""Low-rank updates written as ordinary adapters, which PEFT, Transformers and inference servers load."""

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
    replaced: Optional[Mapping[str, Mapping[str, Tensor]]] = None,
) -> Path:
    """Write updates `Δ = B A` of a model's linear maps as a plain LoRA adapter, which loads without hf_esm.

    Args:
        folder: folder to write. It must not exist yet, and appears when it is complete.
        factors: `(A [r, d_in], B [d_out, r])` of each module, by its full name in the model. The rank may differ from
            module to module; modules of rank 0 are left out.
        base_model_name: id or folder of the model that the adapter belongs to, for `AutoPeftModel`.
        fan_in_fan_out: whether the maps are `Conv1D`.
        base_revision: commit of that model on the Hub.
        base_class: class of that model, for `AutoPeftModel`.
        replaced: tensors of modules that the adapter replaces (`modules_to_save`), by the full name of the module and
            by the tensor's name in it.

    Returns:
        The path of the folder.

    Raises:
        HfEsmError: if the folder exists, or no module has an update.
    """
    factors = {module: (a, b) for module, (a, b) in factors.items() if len(a)}
    rank, pattern = rank_settings({module: len(a) for module, (a, _) in factors.items()})
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),  # so that the scaling alpha / r is 1 in every module
        target_modules=list(factors),
        bias="none",
        fan_in_fan_out=fan_in_fan_out,
        modules_to_save=list(replaced) if replaced else None,
        inference_mode=True,
        base_model_name_or_path=base_model_name,
        revision=base_revision,
    )
    tensors = {f"{module}.lora_A.weight": a for module, (a, _) in factors.items()}
    tensors |= {f"{module}.lora_B.weight": b for module, (_, b) in factors.items()}
    for module, parts in (replaced or {}).items():
        tensors |= {f"{module}.{name}": tensor for name, tensor in parts.items()}
    return write_adapter(folder, config, tensors, base_class)


def rank_settings(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """Return the `r` and the `rank_pattern` of PEFT that give each module its rank.

    Args:
        ranks: rank of each module, by its full name.

    Returns:
        The largest rank, and a pattern for each module with a smaller one. A pattern applies to every module whose
        name ends with it, and the first one that fits counts; a leading `^` ties it to one module.

    Raises:
        HfEsmError: if there are no modules.
    """
    if not ranks:
        raise HfEsmError("The adapter would be empty: nothing changes a calibrated linear map.")
    largest = max(ranks.values())
    return largest, {f"^{module}": rank for module, rank in ranks.items() if rank != largest}


def write_adapter(
    folder: str | os.PathLike, config: PeftConfig, tensors: Mapping[str, Tensor], base_class: Optional[type] = None
) -> Path:
    """Write the folder of an adapter, which appears when it is complete.

    Args:
        folder: folder to write, which must not exist yet.
        config: settings of the adapter.
        tensors: tensors of the adapter, by their names in the base model.
        base_class: class of the base model, for `AutoPeftModel`.
    """
    folder = new_folder(folder)
    config.target_modules = sorted(config.target_modules)  # a set would be written in another order each time
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
