"""The model of one task: a head around the routed body, which all tasks share."""

from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from ..checkpoints import CONFIG_FILE, HEADS_FOLDER, attach_head
from ..errors import HfEsmError
from ..tuners.routed import Named, routing_state
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
    model.save_pretrained = partial(_refuse_saving, task)
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


def _refuse_saving(task: str, *args: Any, **kwargs: Any) -> None:
    """Replaces `save_pretrained` of a task's model, which no `from_pretrained` could load."""
    raise HfEsmError(
        f"The model of {task!r} shares the routed body, and cannot be saved by itself. Save the static model with the "
        f"task's head (`load_task_model(folder, {task!r})`), the task's expert (`export_lora`), or the whole model "
        "(`RoutedModel.save_pretrained`)."
    )
