"""What of a task model is its own readout, and what is the body that all tasks share."""

import copy
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
import transformers
from accelerate.hooks import add_hook_to_module
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ..architecture import body_key, body_prefix
from ..checkpoints import Checkpoint, LoraCheckpoint, ModelSource, resolve_class, whole_folder
from ..checkpoints.stored import quiet_loading
from ..errors import HfEsmError


logger = logging.getLogger(__name__)

FOLDER = "heads"
WEIGHTS = "head.safetensors"


@dataclass
class HeadPlan:
    """Which weights are merged, and which every task keeps.

    Attributes:
        shared: canonical names of the weights that are merged.
        own: per task, canonical names of the weights that it keeps to itself.
        kept_from_base: canonical names of weights of the base that no merge touches.
        warnings: what the user should know.
    """

    shared: list[str]
    own: dict[str, list[str]]
    kept_from_base: list[str]
    warnings: list[str] = field(default_factory=list)


def plan_heads(base: Checkpoint, experts: dict[str, Checkpoint], heads: str | Iterable[str] = "auto") -> HeadPlan:
    """Decide for every weight whether it is merged, kept per task, or left as the base has it.

    A weight outside the model's body is merged where the base and all experts have it in one shape and predict the
    same (tokens of a vocabulary, or labels of the same names; LABEL_0 is no name, and adapters name none), and is the
    task's own otherwise.
    With a head of its own, a task also keeps those weights of the body that feed nothing but that head, such as
    BERT's pooler: see `readouts`.

    Args:
        heads: `"auto"` for the above; `"merge"` to merge all that base and experts share; `"keep"` to let every task
            keep its head even where heads agree; or the names of the modules that each task keeps
            (`["pooler", "classifier"]`, names as inside the body).
    """
    listed = not isinstance(heads, str) and isinstance(heads, Iterable)
    if not listed and heads not in ("auto", "merge", "keep"):
        raise HfEsmError(f"heads must be 'auto', 'merge', 'keep' or a list of module names, not {heads!r}.")
    common = [name for name in base.names if all(name in expert.names for expert in experts.values())]
    warnings: list[str] = []
    if not isinstance(heads, str):
        kept = _named_modules(list(heads), experts)
    elif heads == "merge":
        kept = set()
    else:
        kept = set()
        agree = heads == "auto" and _labels_agree(base, experts.values())
        known: dict[str, Optional[set[str]]] = {}
        for expert in experts.values():
            head = [name for name in expert.names if not _in_body(expert, name)]
            own = [name for name in head if not (agree and name in common and _one_shape(name, base, experts))]
            kept.update(own)
            if own:
                body = body_key(expert.skeleton)
                found = known[body] if body in known else known.setdefault(body, readouts(expert.skeleton))
                if found is None:
                    warnings.append(
                        f"{expert.title}: could not tell which weights of its body feed only its head (no dummy input "
                        "runs through it); all of the body is merged. Pass `heads=[…]` to name modules to keep."
                    )
                kept.update(found or ())
    shared = [name for name in common if name not in kept]
    merged = set(shared)
    own = {task: [name for name in expert.names if name not in merged] for task, expert in experts.items()}
    return HeadPlan(shared, own, [name for name in base.names if name not in merged], warnings)


def readouts(model: PreTrainedModel) -> Optional[set[str]]:
    """Canonical names of the weights of the model's body that its hidden states do not depend on.

    The body is run once on a dummy input; a weight with a path in the autograd graph to one of the body's outputs but
    none to the first (the hidden states) feeds only what a head reads out, like BERT's and ViT's pooler. It runs on
    the meta device, or, where the model's code looks at values, with one layer on the CPU. None where neither runs.
    """
    prefix = body_prefix(model)
    if not prefix:
        return set()
    for device, prepare in (("meta", copy.deepcopy), ("cpu", _shallow)):
        try:
            config = prepare(model.config)
            with torch.device(device):
                body = getattr(type(model)(config).eval(), prefix.rstrip("."))
                return _unread(body)
        except Exception as error:
            logger.debug("no dummy input runs through %s on %s: %s", type(model).__name__, device, error)
    return None


def _unread(body: PreTrainedModel) -> set[str]:
    """Names of the parameters that some output of the body depends on, but not the first."""
    parameters = {name: p.requires_grad_() for name, p in body.named_parameters() if p.is_floating_point()}
    with torch.enable_grad():
        outputs = [t for t in body(**_dummy_inputs(body), return_dict=True).values() if isinstance(t, Tensor)]

    def reached(outputs: list[Tensor]) -> set[str]:
        waiting, seen = [t.grad_fn for t in outputs], {None}
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += [below for below, _ in node.next_functions]
        leaves = {id(node.variable) for node in seen if hasattr(node, "variable")}
        return {name for name, parameter in parameters.items() if id(parameter) in leaves}

    return reached(outputs) - reached(outputs[:1])


def _shallow(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the same model with one layer, and one entry in what it lists by layer."""
    config = copy.deepcopy(config)
    for name in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
        depth = getattr(config, name, None)
        if isinstance(depth, int):
            for listed, values in list(vars(config).items()):
                if isinstance(values, list) and len(values) == depth:
                    setattr(config, listed, values[:1])
            setattr(config, name, 1)
    return config


def _dummy_inputs(body: PreTrainedModel) -> dict[str, Tensor]:
    """The smallest input that the body takes, by its main input's name."""
    config, name = body.config, body.main_input_name
    if name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return {name: torch.zeros(1, getattr(config, "num_channels", 3), height, width)}
    if name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 50)
        inputs = {name: torch.zeros(1, getattr(config, "num_mel_bins", 80), frames)}
    elif name == "input_values":
        inputs = {name: torch.zeros(1, 4000)}
    else:
        inputs = {name: torch.zeros(1, 8, dtype=torch.long)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.zeros(1, 4, dtype=torch.long)
    return inputs


def _in_body(checkpoint: Checkpoint, name: str) -> bool:
    prefix = body_prefix(checkpoint.skeleton)
    return not prefix or checkpoint.names[name] == prefix + name


def _one_shape(name: str, base: Checkpoint, experts: dict[str, Checkpoint]) -> bool:
    return all(expert.shape(name) == base.shape(name) for expert in experts.values())


def _labels_agree(base: Checkpoint, experts: Iterable[Checkpoint]) -> bool:
    """Whether base and experts, where they have labels at all, have the same ones.

    Two experts are not of one task because both have Transformers' default names, nor because an adapter with a head
    of its own has the base's names, as it stores none; but this matters to classifiers alone.
    """
    checkpoints = [base, *experts]
    adapted = any(
        isinstance(c, LoraCheckpoint) and any(c.changes(name) for name in c.names if not _in_body(c, name))
        for c in checkpoints
    )
    maps = {tuple(sorted((c.config.id2label or {}).items())) for c in checkpoints}
    unnamed = len(checkpoints) > 2 and (adapted or all(name == f"LABEL_{i}" for i, name in next(iter(maps))))
    classifies = any(word in type(base.skeleton).__name__ for word in ("Classification", "MultipleChoice"))
    return len(maps) == 1 and not (unnamed and classifies)


def _named_modules(modules: list[str], experts: dict[str, Checkpoint]) -> set[str]:
    """The weights inside the modules that the user named, by canonical or live name."""
    found: set[str] = set()
    for module in modules:
        hits = {
            name
            for expert in experts.values()
            for name, live in expert.names.items()
            if name.startswith(f"{module}.") or live.startswith(f"{module}.") or module in (name, live)
        }
        if not hits:
            raise HfEsmError(f"heads: no expert has a module named {module!r}.")
        found |= hits
    return found


def save_head(folder: Path, task: str, expert: Checkpoint, own: list[str]) -> None:
    """Store what one task keeps to itself: its config (class, labels) and its own weights, by live name."""
    place = folder / FOLDER / task
    place.mkdir(parents=True, exist_ok=True)
    config = expert.config.to_dict()
    config["architectures"] = [type(expert.skeleton).__name__]
    type(expert.config).from_dict(config).save_pretrained(place)
    if own:
        save_file(
            {expert.names[name]: expert.tensor(name).contiguous() for name in own}, place / WEIGHTS, {"format": "pt"}
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
    tasks = sorted(path.name for path in (folder / FOLDER).glob("*") if (path / "config.json").is_file())
    if task not in tasks:
        known = f"It has {', '.join(tasks)}." if tasks else "It was not written by merge_models."
        raise HfEsmError(f"{model}: no task {task!r}. {known}")
    place = folder / FOLDER / task
    trusted = bool(kwargs.get("trust_remote_code"))
    config, model_class = resolve_class(ModelSource(f"head of '{task}'", folder=place, trust_remote_code=trusted))
    # The expert's config says what its own weights were; these are the merged body's.
    config.dtype = AutoConfig.from_pretrained(folder, trust_remote_code=trusted).dtype
    head = load_file(place / WEIGHTS) if (place / WEIGHTS).is_file() else {}
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
        raise HfEsmError(f"{place / WEIGHTS}: {model_class.__name__} has no place for {unknown[:3]}. Merge again.")
    return loaded.eval()


def attach_head(model: PreTrainedModel, folder: Path, task: str) -> PreTrainedModel:
    """A task's model around the modules of a loaded one: what is the task's own is its own, all else is shared.

    Args:
        model: the merged model, with or without adapters in it.
        folder: where `merge_models` wrote it.
    """
    place = folder / FOLDER / task
    config = AutoConfig.from_pretrained(place)
    head = load_file(place / WEIGHTS) if (place / WEIGHTS).is_file() else {}
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
