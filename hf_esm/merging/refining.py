"""Trains gates until a merged model answers as the experts do on unlabelled samples.

The loss is the divergence from the experts' answers. As coefficients per layer and task in Expert Merging (ICLR 2026)
and SAMerging (arXiv 2512.21288), gates are trained by distillation from the experts; there is one per essential
direction (arXiv 2602.20208) instead of one per update.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Optional

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..architecture import block_depths, canonical_names
from ..metrics import ROUNDING, ExpertAnswers, agreement_of, divergence
from ..planning import RefineSettings
from ..tuners.essential import EssentialComponentsConfig, EssentialComponentsLayer, EssentialComponentsModel
from ..utils import gather
from .gates import ComponentFactors, Factors, adapter_config
from .saved_state import SavedState


SAVE_EVERY = 20  # steps


EVALUATE_EVERY = 10  # steps


ADAPTER = "gates"


@dataclass(frozen=True)
class Refined:
    """Trained gates.

    Attributes:
        gates: by the canonical name of the weight, `[r]` float32 on the CPU; those of the step with the least loss.
        history: loss on the samples that are held back, by number of steps taken. Step 0 is the merged model.
        best_step: number of steps after which that loss was least.
    """

    gates: dict[str, Tensor]
    history: dict[int, float]
    best_step: int


def refine(
    models: PreTrainedModel | Mapping[str, PreTrainedModel],
    factors: Mapping[str, Factors],
    learn: Mapping[str, ExpertAnswers],
    held_back: Mapping[str, ExpertAnswers],
    base_divergence: Mapping[str, float],
    settings: RefineSettings,
    accelerator: Accelerator,
    *,
    seed: int = 0,
    folder: Optional[Path] = None,
    progress: Callable[[str], Callable[[Iterable], Iterable]] = lambda title: iter,
) -> Refined:
    """Train the gates of a merged model, whose weights stay as they are.

    The loss is the mean over tasks of the divergence from the expert's answers, each divided by the base's. A step
    draws `batch_size` samples of each task; processes share them, and gradients are summed over processes. Every ten
    steps, the loss on the samples that are held back is computed; training stops when it has not fallen for a third of
    the steps. The gates with the least such loss are returned, zeros if none is below the merged model's own. Given a
    seed, the result is the same each time.

    Args:
        models: the merged model; or a model per task, with a head of its own, around one shared body. They are in
            memory, on the accelerator's device, in any floating-point dtype, and are given back as they were.
        factors: what gates multiply, by the canonical name of the weight; see `build_gates`.
        learn: every expert's answers on the samples that are learned from, by task.
        held_back: its answers on other samples.
        base_divergence: divergence of the base's answers on samples of the task.
        folder: where the state is saved every twenty steps. If it holds the state of an interrupted run, that run is
            resumed.
    """
    tasks = list(learn)
    by_task = dict(models) if isinstance(models, Mapping) else dict.fromkeys(tasks, models)
    distinct = list({id(model): model for model in by_task.values()}.values())
    with ExitStack() as stack:
        gates = stack.enter_context(gates_on(distinct, factors, list(by_task)))
        if settings.gradient_checkpointing:
            for model in distinct:
                stack.enter_context(_checkpointed(model))
        loss = RefiningLoss(by_task, learn, held_back, _scales(base_divergence, tasks), accelerator)
        return _train(gates, loss, settings, seed, folder, progress("Refining"))


def _scales(base_divergence: Mapping[str, float], tasks: list[str]) -> dict[str, float]:
    """Return what each task's divergence is divided by: the base's; the mean of the others' if the base answers as the
    expert does.
    """
    positive = {task: base_divergence[task] for task in tasks if base_divergence[task] > ROUNDING}
    mean = sum(positive.values()) / len(positive) if positive else 1.0
    return {task: positive.get(task, mean) for task in tasks}


@contextmanager
def gates_on(
    models: list[PreTrainedModel], factors: Mapping[str, Factors], tasks: list[str]
) -> Iterator[dict[str, nn.Parameter]]:
    """Put gates on the linear maps of all models, which share them; they are zero, and alone require gradients.

    Yields the gates by the canonical name of the weight. Afterwards the models are as they were.
    """
    device = models[0].device
    gates = {name: nn.Parameter(part.zero_gates().to(device)) for name, part in factors.items()}
    components = {name: part for name, part in factors.items() if isinstance(part, ComponentFactors)}
    tensors = {
        name: {"E": _frozen(part.directions, device), "C": _frozen(part.coordinates, device), "gates": gates[name]}
        for name, part in components.items()
    }
    modes = [(module, module.training) for model in models for module in model.modules()]
    trained = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
    try:
        with ExitStack() as stack:
            for model in models:
                model.eval().requires_grad_(False)
                modules = {name: live.removesuffix(".weight") for name, live in canonical_names(model).items()}
                if components:
                    config = adapter_config({modules[name]: part for name, part in components.items()}, tasks)
                    layers = stack.enter_context(_adapter_on(model, config))
                    for name, parameters in tensors.items():
                        layers[modules[name]].set_tensors(ADAPTER, parameters)
                for name in factors.keys() - components.keys():
                    weight = model.get_submodule(modules[name]).weight
                    for module in [m for m in model.modules() if getattr(m, "weight", None) is weight]:
                        stack.enter_context(_coefficients_on(module, factors[name].updates.to(device), gates[name]))
            yield gates
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)


def _frozen(tensor: Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(tensor.to(device), requires_grad=False)


@contextmanager
def _adapter_on(
    model: PreTrainedModel, config: EssentialComponentsConfig
) -> Iterator[dict[str, EssentialComponentsLayer]]:
    """Put an adapter without values on a model inside the block; yields its layers by the name of the module."""
    adapted = EssentialComponentsModel(model, config, ADAPTER, low_cpu_mem_usage=True)
    try:
        yield {name: layer for name, layer in model.named_modules() if isinstance(layer, EssentialComponentsLayer)}
    finally:
        adapted.unload()


class _Coefficients(nn.Module):
    """A weight as a function of coefficients: `W + Σ_t coefficients_t Δ_t`."""

    def __init__(self, updates: Tensor, coefficients: nn.Parameter):
        super().__init__()
        self.coefficients = coefficients
        self.register_buffer("updates", updates, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.tensordot(self.coefficients, self.updates, dims=1).to(weight.dtype)


@contextmanager
def _coefficients_on(module: nn.Module, updates: Tensor, coefficients: nn.Parameter) -> Iterator[None]:
    """Add updates `[T, d_out, d_in]` to the weight of a linear map inside the block, times their coefficients."""
    updates = updates.transpose(1, 2) if isinstance(module, Conv1D) else updates
    parametrize.register_parametrization(module, "weight", _Coefficients(updates, coefficients))
    try:
        yield
    finally:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


@contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Keep no activations inside the model's blocks: each block runs again in the backward pass.

    Transformers checkpoints in training mode alone, in which dropout would make answers random.
    """
    blocks = [model.get_submodule(name) for name in block_depths(model)]
    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "use_cache")}
    caching = [(config, config.use_cache) for config in configs.values()]
    for config, _ in caching:
        config.use_cache = False  # a block that runs again would extend its cache again
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
        for config, before in caching:
            config.use_cache = before


@dataclass(frozen=True)
class RefiningLoss:
    """The loss of the gates: the mean over tasks of scaled divergences from the experts' answers.

    Attributes:
        models: by task.
        learn: experts' answers to learn from, by task.
        held_back: experts' answers to stop by, by task.
        scales: number that the divergence of each task is divided by.
    """

    models: Mapping[str, PreTrainedModel]
    learn: Mapping[str, ExpertAnswers]
    held_back: Mapping[str, ExpertAnswers]
    scales: Mapping[str, float]
    accelerator: Accelerator

    def differentiate(self, drawn: Mapping[str, list[int]], gates: Iterable[nn.Parameter]) -> None:
        """Set the gradients of the gates to those of the loss on some samples of each task, summed over processes."""
        gates, rank, size = list(gates), self.accelerator.process_index, self.accelerator.num_processes
        for gate in gates:
            gate.grad = torch.zeros_like(gate)
        pairs = [(task, i) for task, indices in drawn.items() for i in indices]
        for task, indices in drawn.items():
            counts = {i: len(self.learn[task].answers[i]["positions"]) for i in indices}
            here = [i for other, i in pairs[rank::size] if other == task and counts[i]]
            if here:  # a divergence is a mean over answers
                share = sum(counts[i] for i in here) / sum(counts.values())
                part = divergence(self.models[task], self.learn[task], here)
                (part * (share / self.scales[task] / len(drawn))).backward()
        if size > 1:
            summed = reduce(torch.cat([gate.grad for gate in gates]), "sum")
            for gate, gradient in zip(gates, summed.split([len(gate) for gate in gates]), strict=True):
                gate.grad = gradient.clone()

    def on_held_back(self, batch_size: int) -> float:
        """Return the loss on the samples that are held back; each process computes that of its tasks."""
        tasks = list(self.held_back)
        total = torch.zeros((), dtype=torch.float64)
        for task in tasks[self.accelerator.process_index :: self.accelerator.num_processes]:
            agreement = agreement_of(self.models[task], self.held_back[task], batch_size=batch_size)
            total += agreement.divergence / self.scales[task] / len(tasks)
        if self.accelerator.num_processes > 1:
            total = torch.tensor(sum(gather(self.accelerator, float(total))))
        return float(total)


def _train(
    gates: Mapping[str, nn.Parameter],
    loss: RefiningLoss,
    settings: RefineSettings,
    seed: int,
    folder: Optional[Path],
    progress: Callable[[Iterable], Iterable],
) -> Refined:
    """Train gates from where they are, or from a saved state."""
    best = {name: gate.detach().clone() for name, gate in gates.items()}
    optimizer = torch.optim.Adam(list(gates.values()), lr=settings.learning_rate)
    tensors = {f"gates.{name}": gate for name, gate in gates.items()}
    tensors |= {f"best.{name}": gate for name, gate in best.items()}
    state = (
        SavedState(folder / "refining.safetensors", tensors, {"adam": optimizer}, loss.accelerator) if folder else None
    )
    saved = state.resume() if state else {}
    history = {int(step): value for step, value in saved.get("history", [])}
    best_step = saved.get("best_step", 0)
    for step in progress(range(saved.get("step", 0), settings.steps + 1)):
        if step not in history and (step % EVALUATE_EVERY == 0 or step == settings.steps):
            history[step] = loss.on_held_back(settings.batch_size)
            if history[step] < history[best_step]:
                best_step = step
                for name, gate in gates.items():
                    best[name].copy_(gate.detach())
        if step == settings.steps or step - best_step >= max(settings.steps / 3, EVALUATE_EVERY):
            break
        drawn = {
            task: random.Random(f"{seed}/{step}/{task}").sample(
                range(len(answers.samples)), min(settings.batch_size, len(answers.samples))
            )
            for task, answers in loss.learn.items()
        }
        loss.differentiate(drawn, gates.values())
        optimizer.step()
        if state and (step + 1) % SAVE_EVERY == 0:
            state.save(step=step + 1, history=list(history.items()), best_step=best_step)
    return Refined({name: gate.cpu() for name, gate in best.items()}, history, best_step)
