"""The linear maps of a live model: names, orientation, slices, types. Works on the meta device, reads no values."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LinearMap:
    """A linear map inside a model, or a stack of them held as one three-dimensional parameter.

    Attributes:
        weight: name of the parameter.
        module: name of the module that holds it.
        transposed: the parameter is stored as `[d_in, d_out]` (`Conv1D`, some mixture-of-experts weights).
        slices: 0 for a single matrix, else the number of experts in a `[slices, …, …]` parameter.
    """

    weight: str
    module: str
    transposed: bool = False
    slices: int = 0


def linear_maps(model: nn.Module) -> dict[str, LinearMap]:
    """Every linear map of `model` by the name of its weight, weights that are tied to another one left out."""
    own = {name for name, _ in model.named_parameters()}
    maps = {}
    for module_name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            found = {"weight": LinearMap("", "", isinstance(module, Conv1D))}
        else:
            found = {
                name: LinearMap("", "", getattr(module, "is_transposed", False), parameter.shape[0])
                for name, parameter in module.named_parameters(recurse=False)
                if parameter.dim() == 3 and _holds_experts(module, parameter)
            }
        for name, kind in found.items():
            weight = f"{module_name}.{name}" if module_name else name
            if weight in own:
                maps[weight] = LinearMap(weight, module_name, kind.transposed, kind.slices)
    return maps


def _holds_experts(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a three-dimensional parameter is a stack of matrices, by what its module says of itself."""
    return hasattr(module, "is_transposed") or getattr(module, "num_experts", None) == parameter.shape[0]


def without_labels(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config's settings but those of the head and of where the model comes from."""
    dropped = ("id2label", "label2id", "problem_type", "_name_or_path")
    return {name: value for name, value in settings.items() if name not in dropped}


def body_key(model: PreTrainedModel) -> str:
    """The same for models of one class on bodies that are built alike."""
    return repr((type(model), without_labels(model.config.to_dict())))


def matrix_names(weight: str, linear: LinearMap) -> list[str]:
    """Names of the matrices that a weight holds, as `to_matrices` lists them: its own, or one for every slice."""
    return [f"{weight}.{i}" for i in range(linear.slices)] if linear.slices else [weight]


def width_of(shape: torch.Size, linear: LinearMap) -> int:
    """`d_in` of a linear map, or of each in a stack, whose weight is of this shape."""
    return shape[-2 if linear.transposed else -1]


def is_routable(name: str, linear: LinearMap | None) -> bool:
    """Whether experts can be routed beside a linear map: not where it reads only some of a sample's tokens, as the
    experts of a mixture do.
    """
    return linear is not None and not linear.slices and ".experts." not in name


def to_matrices(tensor: Tensor, linear: LinearMap | None) -> list[Tensor]:
    """A parameter as the matrices `[d_out, d_in]` that it holds; a parameter of another kind as it is."""
    if linear is None:
        return [tensor]
    slices = list(tensor) if linear.slices else [tensor]
    return [matrix.T for matrix in slices] if linear.transposed else slices


def from_matrices(matrices: list[Tensor], linear: LinearMap | None) -> Tensor:
    """The inverse of `to_matrices`."""
    if linear is None:
        return matrices[0]
    matrices = [matrix.T for matrix in matrices] if linear.transposed else matrices
    return torch.stack(matrices) if linear.slices else matrices[0].contiguous()


def layer_type(name: str) -> str:
    """The name with its integers removed: weights of one type stand in different layers at the same place."""
    return ".".join(part for part in name.split(".") if not re.fullmatch(r"\d+", part))


def block_depths(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return, by the module's name, the index of every block and the number of blocks it is one of.

    A block is an element of an outermost `nn.ModuleList`: a Transformer layer, or a stage of layers. Encoder and
    decoder, or two towers, are numbered separately.
    """
    depths: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and depth_of(name, depths) is None:
            depths |= {f"{name}.{i}": (i, len(module)) for i in range(len(module))}
    return depths


def depth_of(name: str, depths: Mapping[str, tuple[int, int]]) -> tuple[int, int] | None:
    """Return the depth (see `block_depths`) of the block that a weight or module is in, or None outside of blocks."""
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((depths[prefix] for prefix in prefixes if prefix in depths), None)


def body_prefix(model: PreTrainedModel) -> str:
    """What stands before the names of the shared body's weights, as `"bert."` in a task model; empty for a body."""
    prefix = model.base_model_prefix
    return f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def towers(model: nn.Module) -> tuple[str, ...]:
    """The two encoders of a model that compares texts with something else, such as CLIP, by name, that of texts first:
    each reads samples of its own, and nothing but a projection stands behind it. None of any other model.
    """
    parts = {name: part for name, part in model.named_children() if next(part.parameters(), None) is not None}
    found = [name for name, part in parts.items() if isinstance(part, PreTrainedModel)]
    beside = all(name in found or name.endswith("_projection") for name in parts)
    if not hasattr(model, "get_text_features") or len(found) != 2 or "text_model" not in found or not beside:
        return ()
    return tuple(sorted(found, key=lambda name: name != "text_model"))


def tower_of(module: str, names: Sequence[str]) -> str:
    """The tower that a module is in, or projects from; empty without towers."""
    if not names:
        return ""
    return next((name for name in names if module.startswith(f"{name}.")), names[not module.startswith("text_")])


def canonical_names(model: PreTrainedModel) -> dict[str, str]:
    """`{canonical: own name}` of every weight that `save_pretrained` writes.

    The canonical name of a weight of the body is its name inside the body, so that it is the same in a bare body and
    in every task model built on it; that of any other weight is its own name.
    """
    prefix = body_prefix(model)
    unsaved = {*(getattr(model, "all_tied_weights_keys", None) or ()), *(model._keys_to_ignore_on_save or ())}
    names = [name for name in model.state_dict() if name not in unsaved]
    return {name.removeprefix(prefix): name for name in names}
