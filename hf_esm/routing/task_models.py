"""The model of one task: a head around the routed body, which all tasks share."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Optional

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from ..checkpoints import CONFIG_FILE, HEADS_FOLDER, attach_head
from ..errors import HfEsmError
from ..tuners.routed import Named, RoutedExpertsModel, routing_state
from ..utils import device_of
from .prompts import compile_with_routes


def build_task_model(routed: PeftModel, folder: Path, task: str) -> PreTrainedModel:
    """See `RoutedModel.task_model`.

    Args:
        routed: the static model with its routed adapter.
        folder: folder of the merged model.
    """
    if not (folder / HEADS_FOLDER / task / CONFIG_FILE).is_file():
        raise HfEsmError(f"{folder} has no head of {task!r}. Merge again, or download the whole model.")
    model = attach_head(routed.get_base_model(), folder, task).train(routed.training)
    model.register_forward_pre_hook(partial(_check_one_head, task, routed), with_kwargs=True)
    model.save_pretrained = partial(_save_trained, task, model, routed)
    model.load_state_dict = partial(_load_trained, model, routed)
    model.compile = partial(compile_with_routes, model, routing_state(routed))
    return model


def follow(routed: PeftModel, model: PreTrainedModel) -> PreTrainedModel:
    """Move and cast the head of a task's model as the routed body was since the head was attached, or moved last."""
    placed = device_of(routed), routed.get_base_model().dtype
    if vars(model).setdefault("_hf_esm_placed", placed) != placed:
        shared = {id(tensor) for tensor in (*routed.parameters(), *routed.buffers())}
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in shared and not tensor.is_meta:
                tensor.data = tensor.data.to(placed[0], placed[1] if tensor.is_floating_point() else None)
        model._hf_esm_placed = placed
    return model


def _check_one_head(task: str, model: PeftModel, head: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a task's model: refuse a loss over samples of several heads."""
    forced = routing_state(model).local.forced
    if kwargs.get("labels") is None or not isinstance(forced, Named) or isinstance(forced.names, str):
        return
    if others := sorted(set(forced.names) - {task, "static"}):
        raise HfEsmError(
            f"Samples of {others[0]!r} are routed through the head of {task!r}, but a loss needs samples of one head. "
            "Run the samples of each task through its own `task_model`."
        )


def _save_trained(
    task: str,
    model: PreTrainedModel,
    routed: PeftModel,
    folder: str | os.PathLike,
    *,
    is_main_process: Optional[bool] = None,
    state_dict: Optional[Mapping[str, Tensor]] = None,
    **options: Any,
) -> None:
    """Replaces `save_pretrained` of a task's model, which no `from_pretrained` could load.

    A training loop, which says whether its process is the main one, gets a checkpoint: all weights but those of the
    static model that are frozen.

    Args:
        task: its task.
        model: the task's model.
        routed: the static model with its routed adapter.
        folder: gets `model.safetensors`.
        is_main_process: whether this process writes.
        state_dict: weights of the model; by default its own.
        options: are not used.

    Raises:
        HfEsmError: if no training loop saves.
    """
    if is_main_process is None:
        raise HfEsmError(
            f"The model of {task!r} shares the routed body, and cannot be saved by itself. Save the static model with "
            f"the task's head (`load_task_model(folder, {task!r})`), the task's expert (`export_lora`), or the whole "
            "model (`RoutedModel.save_pretrained`)."
        )
    if not is_main_process:
        return
    state = model.state_dict() if state_dict is None else state_dict
    tensors = {name: state[name].detach().cpu().clone() for name in _kept(model, routed) & state.keys()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / SAFE_WEIGHTS_NAME, {"format": "pt"})


def _load_trained(
    model: PreTrainedModel,
    routed: PeftModel,
    state_dict: Mapping[str, Tensor],
    strict: bool = True,
    assign: bool = False,
) -> Any:
    """Replaces `load_state_dict` of a task's model, which a checkpoint of `_save_trained` need not hold in full."""
    found = nn.Module.load_state_dict(model, state_dict, strict, assign)
    found.missing_keys[:] = sorted(_kept(model, routed) & set(found.missing_keys))
    return found


def _kept(model: PreTrainedModel, routed: PeftModel) -> set[str]:
    """Names of the weights in a checkpoint: without frozen weights of the static model, each of tied weights once."""
    shared = {id(weight) for name, weight in routed.named_parameters() if RoutedExpertsModel.prefix not in name}
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    kept = {name for name, weight in model.named_parameters() if weight.requires_grad or id(weight) not in shared}
    return model.state_dict().keys() - weights | kept
