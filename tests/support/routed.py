"""Adapters of routed experts over tiny models, made of tasks that can be told apart, and batches that mix them."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_esm import HfEsmError
from hf_esm.architecture import canonical_names
from hf_esm.calibration.collection import pooled_inputs
from hf_esm.routing.experts import RoutedExperts
from hf_esm.tuners.routed import Decision, Route
from hf_esm.tuners.routed.layer import RoutedExpertsLayer
from hf_esm.tuners.routed.model import recording
from support.architectures import DECODER, ENCODER, GPT
from support.helpers import VOCABULARY, Architecture, Samples, perturbed, save, token_inputs


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


def linear_maps(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Those of the body."""
    head = model.get_output_embeddings()
    maps = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
    return {name: module for name, module in maps.items() if "classifier" not in name}


@torch.no_grad()
def save_adapter(
    model: PreTrainedModel,
    architecture: Architecture,
    folder: Path,
    router: str,
    base_name: Optional[str] = None,
    seed: int = 0,
    depth: float = 1 / 3,
    **settings: Any,
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
    experts = RoutedExperts(list(TASKS), factors, prototypes, features, router, depth, settings)
    experts.save(folder, model)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base_name}))
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
    """Per decision, every sample's likeliest expert, None for those that get none."""
    return {key: [next(iter(given), None) for given in shares(decision.route)] for key, decision in decisions.items()}


def shares(route: Route) -> list[dict[int, float]]:
    """Every sample's experts, the likeliest first, and how much of each is added."""
    experts = route.experts.reshape(len(route.experts), -1)
    weights = torch.ones(experts.shape) if route.weights is None else route.weights.reshape(experts.shape)
    rows = zip(experts.tolist(), weights.tolist(), strict=True)
    return [{e: w for e, w in zip(*row, strict=True) if w} for row in rows]


def rebuilt(architecture: Architecture, **settings: Any) -> PreTrainedModel:
    """Random weights, none zero: the padding token has an embedding, too."""
    return perturbed(architecture.build(**settings), 0.1, 7)


KINDS = {
    "bert": (
        Architecture("BertForSequenceClassification", {**ENCODER, "num_hidden_layers": 3}),
        "SequenceClassification",
    ),
    "gpt2": (Architecture("GPT2LMHeadModel", GPT), "CausalLM"),
    "llama": (Architecture("LlamaForCausalLM", DECODER), "CausalLM"),
}


def write_cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    """Per architecture a base on disk, an adapter of each router over it, and a batch of all tasks."""
    made = {}
    for name, (architecture, auto) in KINDS.items():
        folder, base = tmp_path_factory.mktemp(name), rebuilt(architecture)
        at = save(base, folder / "base")
        written = {
            router: save_adapter(base, architecture, folder / router, router, at, i, depth=0.4)
            for i, router in enumerate(ROUTERS)
        }
        samples = [task_samples(architecture, (TASKS * 2)[i], seed=3)[i] for i in range(5)]
        samples.append({"input_ids": torch.cat([s["input_ids"] for s in samples[:2]])})  # of two tasks
        samples.append({"input_ids": torch.tensor([0, 0, 59])})  # of none
        batch = padded(base, samples)
        batch["attention_mask"] = batch["attention_mask"].bool()
        made[name] = SimpleNamespace(
            folder=folder, base=base, at=at, auto=f"AutoModelFor{auto}", samples=samples, batch=batch, written=written
        )
    return made


def fresh(case: SimpleNamespace, **options: Any) -> PreTrainedModel:
    return type(case.base).from_pretrained(case.at, **options).eval()


def loaded(case: SimpleNamespace, *names: str, **options: Any) -> PeftModel:
    """The base with these adapters on it, the first one active."""
    model = PeftModel.from_pretrained(fresh(case), case.folder / names[0], adapter_name=names[0], **options)
    for name in names[1:]:
        model.load_adapter(case.folder / name, adapter_name=name, **options)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, case: SimpleNamespace) -> Tensor:
    return model(**case.batch).logits


def layers(model: nn.Module) -> list[RoutedExpertsLayer]:
    return [module for module in model.modules() if isinstance(module, RoutedExpertsLayer)]


def refused(says: str, call: Callable, *arguments: Any, **options: Any) -> None:
    with pytest.raises(HfEsmError) as caught:
        call(*arguments, **options)
    assert says in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


@torch.no_grad()
def passed(model: nn.Module, case: SimpleNamespace, modules: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """What modules read and give in a pass over the batch, float64."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: found.update({name: (args[0].double(), output.double())})
        )
        for name in modules
    ]
    model(**case.batch)
    for handle in handles:
        handle.remove()
    return found


def pooled(rows: Tensor, mask: Tensor) -> Tensor:
    """`[B, d]`, one sample at a time; what is pooled already as it is."""
    return rows if rows.dim() == 2 else torch.stack([sample[real].mean(0) for sample, real in zip(rows, mask)])
