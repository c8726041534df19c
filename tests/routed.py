"""Adapters of routed experts over tiny models, made of tasks that can be told apart, and batches that mix them."""

import inspect
from pathlib import Path
from typing import Any, Optional

import torch
from helpers import VOCABULARY, Architecture, Samples, perturbed, token_inputs
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_esm.calibration import pooled_inputs
from hf_esm.experts import RoutedExperts
from hf_esm.tuners.routed import Decision, recording
from hf_esm.weights import canonical_names


TASKS = ["left", "middle", "right"]
RANK = 3
ROUTERS = ("prototype", "discriminant")


def task_samples(architecture: Architecture, task: str, seed: int = 0) -> Samples:
    """Samples of the architecture's kind, with a part of the vocabulary, or a pattern, of the task's own."""
    place = TASKS.index(task)
    share = (VOCABULARY - 3) // len(TASKS)
    found = []
    for sample in architecture.samples(10 * seed + place):
        own = {}
        for name, value in sample.items():
            if value.is_floating_point():
                pattern = torch.randn(value.shape, generator=torch.Generator().manual_seed(place))
                own[name] = value + 1.5 * pattern
            else:
                own[name] = 3 + place * share + value % share
        if "labels" in own:
            targets = own.pop("labels")
            own["decoder_input_ids"] = torch.cat([torch.tensor([2]), targets[:-1]])
        found.append(own)
    return found


def linear_maps(model: nn.Module, architecture: Optional[Architecture] = None) -> dict[str, nn.Module]:
    """Those of the body."""
    heads = {id(model.get_output_embeddings())}
    maps = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and id(m) not in heads}
    return {n: m for n, m in maps.items() if "classifier" not in n and "position_proj" not in n}


@torch.no_grad()
def save_adapter(
    model: PreTrainedModel,
    architecture: Architecture,
    folder: Path,
    router: str,
    confidence: float = 0.5,
    base_name: Optional[str] = None,
    seed: int = 0,
) -> RoutedExperts:
    """Write an adapter of random experts; its router is made from the tasks' samples. Returns what was written."""
    samples = {task: [s for k in (0, 1) for s in task_samples(architecture, task, k)] for task in TASKS}
    live = {name: at.removesuffix(".weight") for name, at in canonical_names(model).items()}
    features = {
        task: {live[name]: rows for name, rows in pooled_inputs(model, own, progress=False).items()}
        for task, own in samples.items()
    }
    inputs = [token_inputs(model, samples[task][::3], architecture) for task in TASKS]
    generator = torch.Generator().manual_seed(seed)
    factors, prototypes = {}, {}
    for name in linear_maps(model):
        if f"{name}.weight" not in inputs[0]:
            continue
        width = inputs[0][f"{name}.weight"].shape[1]
        height = model.get_submodule(name).weight.numel() // width
        a = torch.randn(len(TASKS), RANK, width, generator=generator) * width**-0.5
        factors[name] = a, torch.randn(len(TASKS), height, RANK, generator=generator) * 0.3
        prototypes[name] = torch.stack([F.normalize(x[f"{name}.weight"].mean(0), dim=0).float() for x in inputs])
    experts = RoutedExperts(list(TASKS), factors, prototypes, features, router, confidence=confidence)
    experts.save(folder, model, base_name)
    return experts


def padded(model: PreTrainedModel, samples: Samples, side: str = "right") -> dict[str, Tensor]:
    """The samples as a batch with masks."""
    model = getattr(model, "get_base_model", lambda: model)()
    names = inspect.signature(model.forward).parameters
    pad = getattr(model.config, "pad_token_id", None) or 0
    batch: dict[str, Tensor] = {}
    for name in samples[0]:
        rows = [sample[name] for sample in samples]
        if rows[0].is_floating_point():
            batch[name] = torch.stack(rows)
            continue
        mask = pad_rows([torch.ones_like(row) for row in rows], 0, "right" if "decoder" in name else side)
        batch[name] = pad_rows(rows, pad, "right" if "decoder" in name else side)
        batch["decoder_attention_mask" if "decoder" in name else "attention_mask"] = mask
    if "position_ids" in names and side == "left" and model.config.model_type not in ("roberta", "mpnet"):
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return batch


def pad_rows(rows: list[Tensor], value: int, side: str) -> Tensor:
    length = max(len(row) for row in rows)
    gaps = [(0, length - len(row)) if side == "right" else (length - len(row), 0) for row in rows]
    return torch.stack([F.pad(row, gap, value=value) for row, gap in zip(rows, gaps)])


@torch.no_grad()
def recorded(model: nn.Module, **inputs: Any) -> tuple[Any, dict[tuple[str, str], Decision]]:
    """The output, and the decisions by adapter and module."""
    with recording(model) as records:
        output = model(**inputs)
    found = {(adapter, module): decision for adapter, module, decision in records}
    assert len(found) == len(records), "something was decided twice"
    return output, found


def chosen(decisions: dict[tuple[str, str], Decision]) -> dict[tuple[str, str], list]:
    """Per decision, every sample's expert, None for those that get none."""
    found = {}
    for key, decision in decisions.items():
        experts, weights = decision.route
        weights = torch.ones(len(experts)) if weights is None else weights
        found[key] = [expert if weight else None for expert, weight in zip(experts.tolist(), weights.tolist())]
    return found


def rebuilt(architecture: Architecture, **settings: Any) -> PreTrainedModel:
    """Random weights, none zero: the padding token has an embedding, too."""
    return perturbed(architecture.build(**settings), 0.1, 7)
