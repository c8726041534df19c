"""The structure of a live model: linear maps, blocks, towers, names. Works on the meta device; reads no values."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


# What a weight can be, as `weight_kinds` names it.
KINDS = ("attention", "mlp", "norm", "embedding", "head", "bias")


# The module of a live model that holds what follows its body in a Sentence Transformers model.
SENTENCE_MODULES = "sentence_modules"


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
    """Return every linear map of `model` by the name of its weight, without weights that are tied to another one."""
    untied = {name for name, _ in model.named_parameters()}
    maps = {}
    for module_name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            kinds = {"weight": LinearMap("", "", isinstance(module, Conv1D))}
        else:
            kinds = {
                name: LinearMap("", "", getattr(module, "is_transposed", False), parameter.shape[0])
                for name, parameter in module.named_parameters(recurse=False)
                if parameter.dim() == 3 and _holds_experts(module, parameter)
            }
        for name, kind in kinds.items():
            weight = f"{module_name}.{name}" if module_name else name
            if weight in untied:
                maps[weight] = LinearMap(weight, module_name, kind.transposed, kind.slices)
    return maps


def embeddings(model: nn.Module) -> dict[str, str]:
    """Return the module of every embedding of `model` by the name of its weight, each weight once."""
    untied = {name for name, _ in model.named_parameters()}
    modules = {f"{name}.weight": name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return {weight: module for weight, module in modules.items() if weight in untied}


def _holds_experts(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a three-dimensional parameter is a stack of matrices, judged by the attributes of its module."""
    return hasattr(module, "is_transposed") or getattr(module, "num_experts", None) == parameter.shape[0]


def without_labels(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's settings without those of the head and the name of the checkpoint."""
    dropped = ("id2label", "label2id", "problem_type", "_name_or_path")
    return {name: value for name, value in settings.items() if name not in dropped}


def body_key(model: PreTrainedModel) -> str:
    """Return a key that is equal for models of one class whose bodies have equal configs."""
    return repr((type(model), without_labels(model.config.to_dict())))


def matrix_names(weight: str, linear: LinearMap) -> list[str]:
    """Return the names of the matrices that a weight holds, in the order of `to_matrices`: one, or one per slice."""
    return [f"{weight}.{i}" for i in range(linear.slices)] if linear.slices else [weight]


def width_of(shape: torch.Size, linear: LinearMap) -> int:
    """Return `d_in` of a linear map, or of each map in a stack, from the shape of its weight."""
    return shape[-2 if linear.transposed else -1]


def is_routable(name: str, linear: LinearMap | None) -> bool:
    """Whether routed experts can be added to a linear map: not if it reads only some of a sample's tokens, as the
    experts of a mixture do, or is a dense module after the model.
    """
    apart = ".experts." in name or name.startswith(f"{SENTENCE_MODULES}.")
    return linear is not None and not linear.slices and not apart


def to_matrices(tensor: Tensor, linear: LinearMap | None) -> list[Tensor]:
    """Return the matrices `[d_out, d_in]` that a parameter holds; a parameter of another kind as it is."""
    if linear is None:
        return [tensor]
    slices = list(tensor) if linear.slices else [tensor]
    return [matrix.T for matrix in slices] if linear.transposed else slices


def from_matrices(matrices: list[Tensor], linear: LinearMap | None) -> Tensor:
    """Return the parameter that holds these matrices: the inverse of `to_matrices`."""
    if linear is None:
        return matrices[0]
    matrices = [matrix.T for matrix in matrices] if linear.transposed else matrices
    return torch.stack(matrices) if linear.slices else matrices[0].contiguous()


def weight_kinds(model: PreTrainedModel) -> dict[str, str]:
    """Return what every parameter of `model` is, one of `KINDS`, by name; empty for one that is none of them.

    A norm's scale and shift are of the norm, biases elsewhere are biases. The head is all that is not in the body, and
    matrices after the blocks; a matrix that is tied to the embeddings is an embedding. In a block, matrices that do
    not belong to attention are of the MLP.
    """
    prefix, depths = body_prefix(model), block_depths(model)
    kinds: dict[str, str] = {}
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{leaf}" if module_name else leaf
            kinds[name] = _kind(name, module, parameter, name.startswith(prefix), depth_of(name, depths) is not None)
    return kinds


def _kind(name: str, module: nn.Module, parameter: Tensor, in_body: bool, in_block: bool) -> str:
    words, matrix = name.lower(), parameter.dim() in (2, 3)
    kinds = {
        "norm": "Norm" in type(module).__name__,
        "embedding": isinstance(module, nn.Embedding),
        "head": not in_body,
        "bias": words.endswith("bias"),
        "attention": in_block and ("attn" in words or "attention" in words),
        "mlp": in_block and matrix,
    }
    outside = "" if in_block else "embedding" if "embed" in words else "head" if matrix else ""
    return next((kind for kind, found in kinds.items() if found), outside)


def layer_type(name: str) -> str:
    """Return the name without its integers: weights of one type are at the same place in different layers."""
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
    """Return the prefix of the body's weights in a task model, such as `"bert."`; empty for a bare body."""
    prefix = model.base_model_prefix
    return f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def writes(model: PreTrainedModel) -> bool:
    """Return whether a model writes: a language model, or an encoder-decoder whose decoder predicts tokens."""
    return model.can_generate()


def reads_prompts(model: PreTrainedModel) -> bool:
    """Return whether a model writes on after the text that it reads: a language model without an encoder."""
    return writes(model) and not model.config.is_encoder_decoder


def towers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the two encoders of a model such as CLIP, which compares texts with other inputs.

    Each encoder reads its own samples and is followed by nothing but a projection. The encoder of texts comes first.
    Empty for any other model.
    """
    parts = {name: part for name, part in model.named_children() if next(part.parameters(), None) is not None}
    encoders = [name for name, part in parts.items() if isinstance(part, PreTrainedModel)]
    complete = all(name in encoders or name.endswith("_projection") for name in parts)
    if not hasattr(model, "get_text_features") or len(encoders) != 2 or "text_model" not in encoders or not complete:
        return ()
    return tuple(sorted(encoders, key=lambda name: name != "text_model"))


def tower_of(module: str, names: Sequence[str]) -> str:
    """Return the tower that a module belongs to, or projects from; empty without towers."""
    if not names:
        return ""
    return next((name for name in names if module.startswith(f"{name}.")), names[not module.startswith("text_")])


def ties(model: PreTrainedModel) -> dict[str, str]:
    """Return the name of the weight that each tied weight of `model` shares, by name of the tied one.

    Weights whose config ties them, but which a checkpoint holds apart, are not tied.
    """
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: source for name, source in declared.items() if not _apart(model, name, source)}


def _apart(model: PreTrainedModel, name: str, source: str) -> bool:
    """Whether two weights are different ones on one device, as where a caller or PEFT has put a new one."""
    try:
        one, other = model.get_parameter_or_buffer(name), model.get_parameter_or_buffer(source)
    except AttributeError:
        return False
    return not one.is_meta and one.device == other.device and one.data_ptr() != other.data_ptr()


def untie(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Give every tied weight among `names` a parameter of its own in `model`, with the value that it shares."""
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    # Resizing ties again what the config ties, and does not declare it.
    known, apart = declared | model.get_expanded_tied_weights_keys(all_submodels=True), set(names)
    for name in apart & known.keys():
        owner, _, leaf = name.rpartition(".")
        weight = model.get_parameter_or_buffer(name)
        if weight is model.get_parameter_or_buffer(known[name]):
            setattr(model.get_submodule(owner), leaf, nn.Parameter(weight.detach().clone(), weight.requires_grad))
        declared.pop(name, None)


def canonical_names(model: PreTrainedModel) -> dict[str, str]:
    """Return the name in `model` of every weight that `save_pretrained` writes, by its canonical name.

    The canonical name of a weight of the body is its name inside the body, equal in a bare body and in every task
    model built on it. Any other weight is named as in `model`.
    """
    prefix = body_prefix(model)
    unsaved = {*ties(model), *(model._keys_to_ignore_on_save or ())}
    names = [name for name in model.state_dict() if name not in unsaved]
    return {name.removeprefix(prefix): name for name in names}
