"""The head of each task: saved, loaded, attached to a shared body."""

import copy
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
import transformers
from accelerate.hooks import add_hook_to_module
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architecture import body_prefix, untie
from ..errors import HfEsmError
from ..utils import check_known, device_of, is_offloaded, read_tensors
from .adapter_settings import read_settings
from .base import Checkpoint, build_skeleton, quiet_loading, quiet_peft
from .configs import buildable, read_config
from .conversion import written_config
from .embedding import with_modules
from .layout import ADAPTER_CONFIG, BODY_WEIGHTS, CONFIG_FILE, HEAD_WEIGHTS, HEADS_FOLDER
from .repositories import whole_folder
from .sources import Access, ModelSource, open_checkpoint, resolve_class
from .stored import TensorFiles


def save_head(folder: Path, task: str, expert: Checkpoint, names: list[str]) -> None:
    """Write the head of one task: a config with its class and labels, and the weights that the task keeps for itself.

    Args:
        folder: folder of the merged model.
        task: task of the expert.
        expert: the expert.
        names: canonical names of the weights that are not merged.
    """
    head_folder = folder / HEADS_FOLDER / task
    head_folder.mkdir(parents=True, exist_ok=True)
    config = written_config(expert).to_dict()
    config["architectures"] = [type(expert.skeleton).__name__]
    type(expert.config).from_dict(config).save_pretrained(head_folder)
    if names:
        tensors = {expert.names[name]: expert.tensor(name).contiguous() for name in names}
        save_file(tensors, head_folder / HEAD_WEIGHTS, {"format": "pt"})


def _load_head(head_folder: Path) -> dict[str, Tensor]:
    """Read the weights of a head, by live name; a head may have none."""
    return read_tensors(head_folder / HEAD_WEIGHTS) if (head_folder / HEAD_WEIGHTS).is_file() else {}


def load_task_model(
    model: str | os.PathLike,
    task: str,
    *,
    revision: Optional[str] = None,
    token: Optional[str | bool] = None,
    allow_pickle: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load the merged body with the head of one task: an ordinary `…ForSequenceClassification`, or whatever class the
    expert has. Of a model of compressed experts (`tsv-c`), the compressed expert of the task.

    Args:
        model: folder or Hub id that `merge_models` wrote.
        task: name of the task.
        revision: branch, tag or commit on the Hub.
        token: access token for the Hub; by default the one that `hf auth login` stored.
        allow_pickle: read a body in `.bin` files, which can run code when they are read.
        kwargs: arguments of the class's `from_pretrained` (`dtype`, `device_map`, `trust_remote_code`, …). The dtype
            is by default that of the merged body.

    Returns:
        The model, in evaluation mode.

    Raises:
        HfEsmError: if there is no such task, or weights are missing from both body and head.

    Example:
        >>> from hf_esm import load_task_model
        >>> model = load_task_model("merged", "sst2")
        >>> type(model).__name__, model.config.id2label
        ('BertForSequenceClassification', {0: 'negative', 1: 'positive'})
    """
    folder = whole_folder(model, str(model), revision, token)
    tasks = sorted(path.parent.name for path in (folder / HEADS_FOLDER).glob(f"*/{CONFIG_FILE}"))
    if not tasks:
        raise HfEsmError(f"{model}: there are no tasks in it. Give a folder or Hub id that merge_models wrote.")
    check_known([task], tasks, "task", str(model))
    if (folder / ADAPTER_CONFIG).is_file():
        return attach_head(_load_adapted(folder, token, kwargs), folder, task)
    head_folder = folder / HEADS_FOLDER / task
    trusted = bool(kwargs.get("trust_remote_code"))
    access = Access(allow_pickle=allow_pickle, trust_remote_code=trusted)
    config, model_class = resolve_class(ModelSource(f"head of '{task}'", folder=head_folder, access=access))
    # The head's config states the dtype of the expert, not that of the merged body.
    config.dtype = read_config(folder, str(model), trusted).dtype
    head = _load_head(head_folder)
    stored = TensorFiles.open(folder, str(model), allow_pickle).headers
    _check_size(model_class, config, [*(shape for shape, _ in stored.values()), *(t.shape for t in head.values())])
    with buildable(str(model)), quiet_loading():  # the weights that it would report as new are the head's
        loaded, report = model_class.from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    unset = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])} - set(head)
    if unset:
        raise HfEsmError(f"{model}: neither body nor head of {task!r} holds {sorted(unset)[:3]}. Merge again.")
    if offloaded := [name for name, tensor in loaded.state_dict().items() if name in head and tensor.is_meta]:
        raise HfEsmError(
            f"{model}: this device_map offloads {', '.join(sorted(offloaded)[:3])} of the head, which must be on a "
            "device. Give a map that keeps the head there, or the whole model: device_map={'': 0}."
        )
    untie(loaded, head)
    with buildable(str(head_folder)):
        unknown = loaded.load_state_dict(head, strict=False).unexpected_keys
    if unknown:
        raise _no_place(head_folder, model_class, unknown)
    if (head_folder / BODY_WEIGHTS).is_file():
        if any(weight.is_meta for weight in loaded.state_dict().values()):
            raise HfEsmError(
                f"{model}: this device_map offloads weights of a compressed expert, which must be on a device. Give a "
                "map that keeps all of them there: device_map={'': 0}."
            )
        source = ModelSource(f"'{task}' of {model}", folder=folder, access=access, task=task)
        open_checkpoint(source).put_on(loaded)
    return with_modules(loaded.eval(), folder)


def _no_place(head_folder: Path, model_class: type, names: list[str]) -> HfEsmError:
    name = model_class.__name__
    return HfEsmError(f"{head_folder / HEAD_WEIGHTS}: {name} has no place for {names[:3]}. Merge again.")


def _check_size(model_class: type[PreTrainedModel], config: Any, stored: list[Sequence[int]]) -> None:
    """Raise if a head's config describes far more numbers than there are, before memory is taken for them.

    Args:
        stored: shapes of all stored weights.
    """
    asked = sum(weight.numel() for weight in build_skeleton(model_class, config).parameters())
    held = sum(map(math.prod, stored))
    if asked > 2 * held + 1_000_000:
        raise HfEsmError(
            f"{config.name_or_path}: its {CONFIG_FILE} describes {asked:,} weights, but the model and the head hold "
            f"{held:,}. Merge again."
        )


def load_base_with_head(base: Checkpoint, folder: Path, task: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load the body of a base with the head that a task has in a merged model: what the merge started from.

    Args:
        base: the base, whose vocabulary may be smaller than that of the merged model.
        folder: folder that `merge_models` wrote.
        task: name of the task.
        trust_remote_code: run code that comes with the head.
    """
    head_folder = folder / HEADS_FOLDER / task
    access = Access(trust_remote_code=trust_remote_code)
    config, model_class = resolve_class(ModelSource(f"head of '{task}'", folder=head_folder, access=access))
    if hasattr(base.config, "vocab_size"):
        config.vocab_size = base.config.vocab_size
    model = base.load_model_as(model_class, config)
    state = model.state_dict()
    for name, tensor in _load_head(head_folder).items():
        state[name].copy_(tensor)
    return with_modules(model.eval(), folder)


def _load_adapted(folder: Path, token: Optional[str | bool], kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load the base of a merged adapter, with the adapter merged into its weights."""
    adapter = read_settings(folder, str(folder))
    model_class = getattr(transformers, adapter.auto_mapping["base_model_class"])
    base = model_class.from_pretrained(
        adapter.base_model_name_or_path, revision=adapter.revision, token=token, **kwargs
    )
    with quiet_peft():
        return PeftModel.from_pretrained(base, str(folder)).merge_and_unload()


def attach_head(model: PreTrainedModel, folder: Path, task: str) -> PreTrainedModel:
    """Build the model of one task around a loaded merged model. Only the head's weights are new; all other modules are
    shared with `model`.

    Args:
        model: the merged model, with or without adapters.
        folder: folder that `merge_models` wrote.
        task: name of the task.

    Raises:
        HfEsmError: if weights are missing from both the merged model and the head.
    """
    head_folder = folder / HEADS_FOLDER / task
    config, model_class = resolve_class(ModelSource(f"head of '{task}'", folder=head_folder))
    head = _load_head(head_folder)
    with buildable(str(head_folder)), torch.device("meta"):
        fresh = model_class(config)
    if unknown := [name for name in head if name not in fresh.state_dict()]:
        raise _no_place(head_folder, model_class, unknown)
    if type(fresh) is type(model):
        attached = _graft(model, fresh, list(head))
        settings = {name: value for name, value in vars(fresh).items() if not name.startswith("_")}
        settings.pop("generation_config", None)  # the merged model's stays
        vars(attached).update(settings)  # config, num_labels
    else:
        prefix, attached = body_prefix(fresh), fresh
        in_body = [name.removeprefix(prefix) for name in head if name.startswith(prefix)]
        body = getattr(model, prefix.rstrip(".")) if body_prefix(model) else model
        setattr(attached, prefix.rstrip("."), _graft(body, getattr(fresh, prefix.rstrip(".")), in_body))
    device, dtype = device_of(model), next(model.parameters()).dtype
    head = {name: tensor.to(device, dtype) for name, tensor in head.items()}
    with buildable(str(head_folder)):
        attached.load_state_dict(head, strict=False, assign=True)
    places = [place for place, module in attached.named_modules() if not is_offloaded(module)]
    tensors = [name for name, tensor in attached.state_dict().items() if tensor.is_meta]
    if empty := [name for name in tensors if name.rpartition(".")[0] in places]:
        raise HfEsmError(f"{head_folder}: neither the merged model nor the head holds {empty[:3]}. Merge again.")
    return with_modules(attached.eval(), folder)


def _graft(shared: nn.Module, fresh: nn.Module, weights: list[str]) -> Any:
    """Return a copy of `shared` with the same submodules, except for those of `weights`, which come from `fresh`."""
    copied = copy.copy(shared)
    copied._modules, copied._parameters = dict(shared._modules), dict(shared._parameters)
    if hook := vars(copied).pop("_hf_hook", None):  # the forward that Accelerate put there is bound to the original
        del copied.forward, copied._old_forward
        add_hook_to_module(copied, hook)
    for child in dict.fromkeys(name.partition(".")[0] for name in weights):
        vars(copied).pop(child, None)  # a submodule that the shared model was built without is an attribute, None
        below = [name.partition(".")[2] for name in weights if name.partition(".")[0] == child]
        if child in fresh._parameters:
            copied._parameters[child] = fresh._parameters[child]
        elif child in shared._modules and set(dict(fresh._modules[child].named_parameters())) - set(below):
            copied._modules[child] = _graft(shared._modules[child], fresh._modules[child], below)
        else:
            copied._modules[child] = fresh._modules[child]
    return copied
