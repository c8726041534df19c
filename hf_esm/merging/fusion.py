"""Several tasks' essential components fused into one adapter, inside a live model."""

from collections.abc import Sequence
from typing import Optional

import torch
from peft import PeftModel
from torch import Tensor

from ..checkpoints.lora_export import rank_settings
from ..errors import HfEsmError
from ..linalg import truncated_svd
from ..methods.essential import EssentialMerge, fuse_with_singular_values, part_taken_off
from ..tuners.essential.config import EssentialComponentsConfig
from ..tuners.essential.layer import EssentialComponentsLayer


@torch.no_grad()
def fuse_components(model: PeftModel, adapter_names: Sequence[str], new_name: str) -> None:
    """Add an adapter that is the ESM merge (arXiv 2602.20208) of loaded adapters of essential components.

    Per linear map, as `EssentialMerge` does by default: the leading components of each of the `T` adapters,
    orthogonalised against each other, with their singular values, scaled, and a part of the updates' sum taken off. No
    update is ever built; the new adapter's rank is at most the sum of the ranks. It is not made active; saved modules
    such as heads stay with the adapters that brought them.

    Raises:
        HfEsmError: on fewer than two adapters, one that is not there or of another kind, or a name that is taken.
    """
    _check_names(model, adapter_names, new_name)
    factors = {}
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, EssentialComponentsLayer):
            held = [name for name in adapter_names if name in layer.essential_components_E]
            updates = [(layer.essential_components_E[name], layer.essential_components_C[name]) for name in held]
            fused = _fuse(updates, len(adapter_names))
            if fused is not None:
                factors[path] = fused
    rank, pattern = rank_settings({path: len(coordinates) for path, (_, coordinates) in factors.items()})
    first = model.peft_config[adapter_names[0]]
    config = EssentialComponentsConfig(
        r=rank,
        rank_pattern=pattern,
        target_modules=list(factors),
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        inference_mode=first.inference_mode,
    )
    model.add_adapter(new_name, config)
    for path, (directions, coordinates) in factors.items():
        layer = model.get_base_model().get_submodule(path)
        layer.essential_components_E[new_name].copy_(directions)
        layer.essential_components_C[new_name].copy_(coordinates)


def _check_names(model: PeftModel, adapter_names: Sequence[str], new_name: str) -> None:
    if not isinstance(model, PeftModel):
        raise HfEsmError(f"Fusing components takes a PeftModel that holds the adapters, not a {type(model).__name__}.")
    if isinstance(adapter_names, str) or len(set(adapter_names)) != len(adapter_names) or len(adapter_names) < 2:
        raise HfEsmError(f"Fusing components takes two adapters or more, each once; got {adapter_names!r}.")
    for name in adapter_names:
        if name not in model.peft_config:
            raise HfEsmError(f"The model has no adapter {name!r}; it has {', '.join(model.peft_config)}.")
        if not isinstance(model.peft_config[name], EssentialComponentsConfig):
            kind = model.peft_config[name].peft_type.value
            raise HfEsmError(f"Adapter {name!r} is a {kind} adapter; only essential components are fused.")
    if not isinstance(new_name, str) or not new_name or "." in new_name:
        raise HfEsmError(f"An adapter's name is a string without dots, not {new_name!r}. Choose another new_name.")
    if new_name in model.peft_config:
        raise HfEsmError(f"The model already has an adapter {new_name!r}. Choose another name.")


def _fuse(updates: list[tuple[Tensor, Tensor]], tasks: int) -> Optional[tuple[Tensor, Tensor]]:
    """The fusion of one map's updates `E_t C_t` as such a pair: E orthonormal, the strongest component first. None
    where no adapter changes the map.
    """
    method = EssentialMerge()
    directions, coordinates, wholes = [], [], []
    for e, c in updates:
        basis, triangle = torch.linalg.qr(e.cpu().double())  # training leaves E neither orthonormal nor independent
        whole = triangle @ c.cpu().double()
        kept = max(int(min(len(e), c.shape[1]) * method.rank_share) // tasks, 1)
        directions.append(basis[:, :kept])
        coordinates.append(whole[:kept])
        wholes.append((basis, whole))
    if not any(found.any() for found in coordinates):
        return None
    left, right = fuse_with_singular_values(directions, coordinates)
    norm = torch.stack([whole.norm() for _, whole in wholes]).norm()
    scale = method.factor * norm / torch.linalg.qr(left, mode="r").R.matmul(right).norm()
    total = torch.cat([basis for basis, _ in wholes], dim=1), torch.cat([whole for _, whole in wholes])
    size = torch.linalg.qr(total[0], mode="r").R.matmul(total[1]).norm()
    less = part_taken_off(method.sum_subtracted, size, norm)
    left, right = torch.cat([left * scale, -less * total[0]], dim=1), torch.cat([right, total[1]])
    basis, triangle = torch.linalg.qr(left)
    turn, values, right = truncated_svd(triangle @ right, len(triangle))
    return basis @ turn, values[:, None] * right
