"""Which weights are merged, and which every task keeps as its head."""

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..architecture import body_key, body_prefix
from ..checkpoints import Checkpoint, LoraCheckpoint
from ..errors import HfEsmError


logger = logging.getLogger(__name__)


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
