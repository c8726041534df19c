"""Each task's head on disk: saved, loaded, attached to a shared body."""

import copy
import os
from pathlib import Path
from typing import Any, Optional

import torch
import transformers
from accelerate.hooks import add_hook_to_module
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from ..architecture import body_prefix
from ..errors import HfEsmError
from .base import Checkpoint, quiet_loading
from .layout import HEAD_WEIGHTS, HEADS_FOLDER
from .sources import Access, ModelSource, resolve_class, whole_folder


def save_head(folder: Path, task: str, expert: Checkpoint, own: list[str]) -> None:
    """Store what one task keeps to itself: its config (class, labels) and its own weights, by live name."""
    place = folder / HEADS_FOLDER / task
    place.mkdir(parents=True, exist_ok=True)
    config = expert.config.to_dict()
    config["architectures"] = [type(expert.skeleton).__name__]
    type(expert.config).from_dict(config).save_pretrained(place)
    if own:
        save_file(
            {expert.names[name]: expert.tensor(name).contiguous() for name in own},
            place / HEAD_WEIGHTS,
            {"format": "pt"},
        )


def load_task_model(
    model: str | os.PathLike, task: str, *, revision: Optional[str] = None, token: Any = None, **kwargs: Any
) -> PreTrainedModel:
    """The merged body with the head of one task: an ordinary `…ForSequenceClassification`, or what the expert was.

    Args:
        model: folder or Hub id that `merge_models` wrote.
        task: name of the expert.
        kwargs: passed to the class's `from_pretrained` (`dtype`, `device_map`, `trust_remote_code`, …); its dtype is
            by default that of the merged body.

    Raises:
        HfEsmError: if there is no such task, or weights are missing from both body and head.
    """
    folder = whole_folder(model, str(model), revision, token)
    tasks = sorted(path.name for path in (folder / HEADS_FOLDER).glob("*") if (path / "config.json").is_file())
    if task not in tasks:
        known = f"It has {', '.join(tasks)}." if tasks else "It was not written by merge_models."
        raise HfEsmError(f"{model}: no task {task!r}. {known}")
    place = folder / HEADS_FOLDER / task
    trusted = bool(kwargs.get("trust_remote_code"))
    config, model_class = resolve_class(
        ModelSource(f"head of '{task}'", folder=place, access=Access(trust_remote_code=trusted))
    )
    # The expert's config says what its own weights were; these are the merged body's.
    config.dtype = AutoConfig.from_pretrained(folder, trust_remote_code=trusted).dtype
    head = load_file(place / HEAD_WEIGHTS) if (place / HEAD_WEIGHTS).is_file() else {}
    with quiet_loading():  # the head's weights are loaded below, they are not "newly initialized"
        loaded, report = model_class.from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    unset = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])} - set(head)
    if unset:
        raise HfEsmError(f"{model}: neither body nor head of {task!r} holds {sorted(unset)[:3]}. Merge again.")
    if away := [name for name, tensor in loaded.state_dict().items() if name in head and tensor.is_meta]:
        raise HfEsmError(
            f"{model}: with this device_map, {', '.join(sorted(away)[:3])} of the head would not stand on a device. "
            "Give one that keeps the head there, or the whole model: device_map={'': 0}."
        )
    unknown = loaded.load_state_dict(head, strict=False).unexpected_keys
    if unknown:
        raise HfEsmError(
            f"{place / HEAD_WEIGHTS}: {model_class.__name__} has no place for {unknown[:3]}. Merge again."
        )
    return loaded.eval()


def attach_head(model: PreTrainedModel, folder: Path, task: str) -> PreTrainedModel:
    """A task's model around the modules of a loaded one: what is the task's own is its own, all else is shared.

    Args:
        model: the merged model, with or without adapters in it.
        folder: where `merge_models` wrote it.
    """
    place = folder / HEADS_FOLDER / task
    config = AutoConfig.from_pretrained(place)
    head = load_file(place / HEAD_WEIGHTS) if (place / HEAD_WEIGHTS).is_file() else {}
    with torch.device("meta"):
        fresh = getattr(transformers, config.architectures[0])(config)
    if type(fresh) is type(model):
        found = _graft(model, fresh, list(head))
        settings = {name: value for name, value in vars(fresh).items() if not name.startswith("_")}
        settings.pop("generation_config", None)  # the merged model's own, as its folder has it
        vars(found).update(settings)  # config, num_labels
    else:
        prefix, found = body_prefix(fresh), fresh
        own = [name.removeprefix(prefix) for name in head if name.startswith(prefix)]
        body = getattr(model, prefix.rstrip(".")) if body_prefix(model) else model
        setattr(found, prefix.rstrip("."), _graft(body, getattr(fresh, prefix.rstrip(".")), own))
    weight = next(model.parameters())
    head = {name: tensor.to(weight.device, weight.dtype) for name, tensor in head.items()}
    found.load_state_dict(head, strict=False, assign=True)
    if empty := [name for name, tensor in found.state_dict().items() if tensor.is_meta]:
        raise HfEsmError(f"{place}: neither the merged model nor the head holds {empty[:3]}. Merge again.")
    return found.eval()


def _graft(shared: torch.nn.Module, fresh: torch.nn.Module, own: list[str]) -> Any:
    """A copy of `shared` that holds its very modules, but for those on the way to the weights named in `own`."""
    copied = copy.copy(shared)
    copied._modules, copied._parameters = dict(shared._modules), dict(shared._parameters)
    if hook := vars(copied).pop("_hf_hook", None):  # Accelerate's: the forward that it put there is the original's
        del copied.forward, copied._old_forward
        add_hook_to_module(copied, hook)
    for child in dict.fromkeys(name.partition(".")[0] for name in own):
        vars(copied).pop(child, None)  # a module that the shared model was built without is None there
        below = [name.partition(".")[2] for name in own if name.partition(".")[0] == child]
        if child in fresh._parameters:
            copied._parameters[child] = fresh._parameters[child]
        elif child in shared._modules and set(dict(fresh._modules[child].named_parameters())) - set(below):
            copied._modules[child] = _graft(shared._modules[child], fresh._modules[child], below)
        else:
            copied._modules[child] = fresh._modules[child]
    return copied
