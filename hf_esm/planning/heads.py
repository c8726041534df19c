"""Which weights are merged, and which each task keeps as its head."""

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..architecture import body_key, body_prefix
from ..checkpoints import AdapterCheckpoint, Checkpoint
from ..errors import HfEsmError
from ..utils import closest_name


logger = logging.getLogger(__name__)


@dataclass
class HeadPlan:
    """Which weights are merged, and which every task keeps.

    Attributes:
        shared: canonical names of the weights that are merged.
        by_task: per task, canonical names of the weights of its head: all that its model keeps for itself.
        kept_from_base: canonical names of the weights that the merged model takes from the base unchanged.
        warnings: messages for the user.
    """

    shared: list[str]
    by_task: dict[str, list[str]]
    kept_from_base: list[str]
    warnings: list[str] = field(default_factory=list)


def plan_heads(base: Checkpoint, experts: dict[str, Checkpoint], heads: str | Iterable[str] = "auto") -> HeadPlan:
    """Decide for every weight whether it is merged, kept per task, or taken from the base.

    A weight outside the model's body is merged if the base and all experts have it in one shape and predict the same
    things (tokens of a vocabulary, or labels of the same names; `LABEL_0` is not a name, and adapters name none).
    Otherwise it belongs to the task's head. The head also includes the weights of the body that feed nothing but the
    head, such as BERT's pooler: see `readouts`.

    Args:
        heads: `"auto"` for the rule above; `"merge"` to merge every weight that the base and all experts share;
            `"keep"` to keep every head per task, even where heads agree; or names of the modules that each task keeps
            (`["pooler", "classifier"]`, named as inside the body).

    Raises:
        HfEsmError: if `heads` is of another kind, or names a module that no expert has.
    """
    if heads not in ("auto", "merge", "keep") if isinstance(heads, str) else not isinstance(heads, Iterable):
        raise HfEsmError(f"`heads` must be 'auto', 'merge', 'keep' or a list of module names, not {heads!r}.")
    common = [name for name in base.names if all(name in expert.names for expert in experts.values())]
    warnings: list[str] = []
    if not isinstance(heads, str):
        of_tasks = _weights_of_modules(list(heads), experts)
    elif heads == "merge":
        of_tasks = set()
    else:
        mergeable = set(common) if heads == "auto" and _labels_agree(base, experts.values()) else set()
        mergeable = {name for name in mergeable if _one_shape(name, base, experts)}
        of_tasks = _weights_of_heads(experts.values(), mergeable, warnings)
    shared = [name for name in common if name not in of_tasks]
    merged = set(shared)
    by_task = {task: [name for name in expert.names if name not in merged] for task, expert in experts.items()}
    return HeadPlan(shared, by_task, [name for name in base.names if name not in merged], warnings)


def _weights_of_heads(experts: Iterable[Checkpoint], mergeable: set[str], warnings: list[str]) -> set[str]:
    """Return the weights outside the bodies that are not mergeable, and those of the bodies that feed only them."""
    of_heads: set[str] = set()
    for expert in experts:
        head = {name for name in expert.names if not _in_body(expert, name)} - mergeable
        of_heads |= head
        if not head:
            continue
        feeding = readouts(expert.skeleton)
        if feeding is None:
            warnings.append(
                f"{expert.title}: could not tell which weights of its body feed only its head (no dummy input runs "
                "through it), so all of the body is merged. To keep modules per task, name them: `heads=[…]`."
            )
        of_heads |= feeding or set()
    return of_heads


_known_readouts: dict[tuple[type, str], Optional[frozenset[str]]] = {}


def readouts(model: PreTrainedModel) -> Optional[frozenset[str]]:
    """Return canonical names of the weights of the model's body that its hidden states do not depend on.

    The body is run once on a dummy input. A weight with a path in the autograd graph to one of the body's outputs but
    none to the first output (the hidden states) feeds only the head, like BERT's and ViT's pooler. The body runs on
    the meta device, or, where the model's code looks at values, with one layer on the CPU. The result is None if it
    runs on neither. One run per architecture and process; later calls return its result.
    """
    architecture = (type(model), body_key(model))
    if architecture not in _known_readouts:
        _known_readouts[architecture] = _find_readouts(model)
    return _known_readouts[architecture]


def _find_readouts(model: PreTrainedModel) -> Optional[frozenset[str]]:
    prefix = body_prefix(model)
    if not prefix:
        return frozenset()
    for device, prepare in (("meta", copy.deepcopy), ("cpu", _shallow)):
        try:
            config = prepare(model.config)
            with torch.device(device):
                body = getattr(type(model)(config).eval(), prefix.rstrip("."))
                return frozenset(_unread(body))
        except Exception as error:
            logger.debug("no dummy input runs through %s on %s: %s", type(model).__name__, device, error)
    return None


def _unread(body: PreTrainedModel) -> set[str]:
    """Return names of the parameters that some output of the body depends on, but the first output does not."""
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
    """Copy a config with one layer instead of many, and with one entry in each list that has an entry per layer."""
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
    """Return small inputs of zeros of the kind that the body takes, by argument name."""
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
    """Whether the base and the experts have the same labels, or none.

    Default names (`LABEL_0`) do not show that two classifiers are of one task. Neither do the labels of an adapter
    that changes its head: it stores no labels and takes the names of the base.
    """
    checkpoints = [base, *experts]
    adapted = any(
        isinstance(c.stored, AdapterCheckpoint) and any(c.changes(name) for name in c.names if not _in_body(c, name))
        for c in checkpoints
    )
    maps = {tuple(sorted((c.config.id2label or {}).items())) for c in checkpoints}
    unnamed = len(checkpoints) > 2 and (adapted or all(name == f"LABEL_{i}" for i, name in next(iter(maps))))
    classifies = any(word in type(base.skeleton).__name__ for word in ("Classification", "MultipleChoice"))
    return len(maps) == 1 and not (unnamed and classifies)


def _weights_of_modules(modules: list[str], experts: dict[str, Checkpoint]) -> set[str]:
    """Return the weights inside the modules that the user named, by canonical or live name."""
    weights: set[str] = set()
    for module in modules:
        inside = {
            name
            for expert in experts.values()
            for name, live in expert.names.items()
            if name.startswith(f"{module}.") or live.startswith(f"{module}.") or module in (name, live)
        }
        if not inside:
            modules_of = {part for expert in experts.values() for name in expert.names for part in _modules(name)}
            meant = f" Did you mean {closest!r}?" if (closest := closest_name(module, modules_of)) else ""
            raise HfEsmError(f"`heads`: no expert has a module named {module!r}.{meant}")
        weights |= inside
    return weights


def _modules(name: str) -> list[str]:
    """Return names of all modules that hold a weight: `encoder`, `encoder.layer`, …"""
    parts = name.split(".")[:-1]
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
