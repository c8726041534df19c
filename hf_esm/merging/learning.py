"""Learns the mask and the coefficients of the Concrete methods (arXiv 2312.06173) and of AdaMerging (2310.02575) on
unlabelled samples.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor

from ..architecture import to_matrices, writes
from ..calibration import with_first_decoder_input
from ..data import Sample, batch_for
from ..errors import HfEsmError
from ..methods import LearnedMask, Stack, buffer_stack, mean_update, relaxed_mask, rescaled
from ..metrics import batches_of
from ..planning import MergePlan
from .alpha import CandidateModels
from .saved_state import SavedState


SAVE_EVERY = 100  # steps


def learn_mask(
    plan: MergePlan,
    samples: Mapping[str, list[Sample]],
    accelerator: Accelerator,
    *,
    batch_size: int = 8,
    seed: int = 0,
    folder: Optional[Path] = None,
    progress: Callable[[str], Callable[[Iterable], Iterable]] = lambda title: iter,
) -> LearnedMask:
    """Learn the mask and the coefficients of a plan's method, or the one of them that it learns.

    Every process takes its share of the tasks; gradients are summed over processes.

    Args:
        samples: unlabelled samples by task; of models that write on after what they read, prompts.
        batch_size: samples that run together, which changes memory alone; the method says how many a step takes.
        seed: of the batches and of the mask's noise. Each step has a seed of its own, so that a resumed run learns the
            same.
        folder: where the state is saved every hundred steps. If it holds the state of an interrupted run, that run is
            resumed.

    Raises:
        HfEsmError: if a task's expert neither classifies samples nor writes.
    """
    method = plan.method
    learner = _Learner(plan, samples, accelerator, batch_size, seed)
    state = learner.saved_state(folder / "concrete.safetensors") if folder is not None else None
    done = state.resume().get("step", 0) if state is not None else 0
    mask_steps = method.steps if method.masks else 0
    stages = [("Learning the mask", 0, mask_steps, learner.mask_step)] if method.masks else []
    if method.adapts:
        total = mask_steps + method.coefficient_steps
        stages.append(("Learning the coefficients", mask_steps, total, learner.coefficient_step))
    for title, start, end, take_step in stages:
        for step in progress(title)(range(max(start, done), end)):
            take_step(step)
            if state is not None and ((step + 1) % SAVE_EVERY == 0 or step + 1 == stages[-1][2]):
                state.save(step=step + 1)
    return learner.learned()


class _Learner:
    """Models around one shared body, the updates that are combined in it, and the parameters that are learned.

    Attributes:
        body: the shared parameters that are learned on, by canonical name.
        base: the base's weights by the same names, float32.
        updates: `[T, …]` by the same names, float32; `[1, …]`, the sum over tasks, if coefficients are not learned.
        logits: of the mask, by the same names; empty if none is learned.
        coefficients: `[T]` or `[1]` by the same names; one tensor under all names, unless they are per weight.
        adapted: the same after the step that precedes a step of the mask; empty unless mask and coefficients are
            learned.
    """

    def __init__(
        self,
        plan: MergePlan,
        samples: Mapping[str, list[Sample]],
        accelerator: Accelerator,
        batch_size: int,
        seed: int,
    ):
        self.plan, self.method = plan, plan.method
        self.accelerator, self.batch_size, self.seed = accelerator, batch_size, seed
        self.tasks = list(plan.experts)
        self.tasks_here = self.tasks[accelerator.process_index :: accelerator.num_processes]
        candidates = CandidateModels(plan, accelerator.device)
        self.models = candidates.by_task
        self.samples = {
            task: with_first_decoder_input(self.models[task], plan.in_merged_tokens(task, rows))
            for task, rows in samples.items()
        }
        self._average_buffers(candidates.body)
        self.body = {
            name: weight
            for name, weight in candidates.body.items()
            if isinstance(weight, torch.nn.Parameter) and name not in plan.unchanged
        }
        self._require_gradients()
        self.base, self.updates, self.logits = {}, {}, {}
        for name in self.body:
            self._read(name)
        self.coefficients = self._initial_coefficients()
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.adapted: dict[str, Tensor] = {}
        if self.method.masks:
            self.optimizers["mask"] = torch.optim.Adam(list(self.logits.values()), lr=self.method.learning_rate)
        if self.method.masks and self.method.adapts:
            self.adapted = self._initial_coefficients()
            self.optimizers["inner"] = torch.optim.Adam(self.distinct(self.adapted), lr=self.method.inner_rate)
        if self.method.adapts:
            coefficients, rate = self.distinct(self.coefficients), self.method.coefficient_rate
            self.optimizers["coefficient"] = torch.optim.Adam(coefficients, lr=rate)

    def _average_buffers(self, body: Mapping[str, Tensor]) -> None:
        """Set the buffers of the shared body, which have no gradient, to the experts' average."""
        for name, buffer in body.items():
            if not isinstance(buffer, torch.nn.Parameter):
                merged = mean_update(buffer_stack(self._stack(name)), scaled=False)
                buffer.copy_(self.plan.base.tensor(name) + merged.update)

    def _stack(self, name: str) -> Stack:
        weight = self.plan.base.tensor(name)
        updates = [expert.update(name, weight) for expert in self.plan.experts.values()]
        return Stack(name, name, updates, weights=list(self.plan.rule_of(name).weights))

    def _require_gradients(self) -> None:
        """Of the shared parameters that are learned on, and of nothing else."""
        for parameter in (p for model in self.models.values() for p in model.parameters()):
            parameter.requires_grad_(False)
        for parameter in self.body.values():
            parameter.requires_grad_(True)

    def _read(self, name: str) -> None:
        """Read the base's weight and the updates of one parameter."""
        device, weight = self.accelerator.device, self.plan.base.tensor(name)
        updates = torch.stack(self._stack(name).weighted)
        if not self.method.adapts:
            updates = updates.sum(0)[None]
        self.base[name] = weight.float().to(device)
        self.updates[name] = updates.to(device)
        if self.method.masks:
            self.logits[name] = torch.zeros_like(self.base[name])

    def _initial_coefficients(self) -> dict[str, Tensor]:
        count = len(self.tasks) if self.method.adapts else 1
        start = torch.full((count,), float(self.method.coefficient), device=self.accelerator.device)
        return {name: start.clone() if self.method.layer_wise else start for name in self.body}

    @staticmethod
    def distinct(tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Return every tensor once, even if it is under several names."""
        return list({id(tensor): tensor for tensor in tensors.values()}.values())

    def saved_state(self, path: Path) -> SavedState:
        """Return the state on disk: what is learned, each tensor once, and the optimizers."""
        tensors = {f"logits.{name}": tensor for name, tensor in self.logits.items()}
        tensors |= {f"coefficients.{i}": tensor for i, tensor in enumerate(self.distinct(self.coefficients))}
        return SavedState(path, tensors, self.optimizers, self.accelerator)

    def mask_step(self, step: int) -> None:
        """Take one step of the mask; before it, one step of the coefficients from their start, if they are learned."""
        coefficients = self.coefficients
        if self.method.adapts:
            self._adapt(step)
            coefficients = self.adapted
        self._combine(self._relaxed_masks(step), coefficients)
        self._differentiate(self._chosen(step))
        for name, uniform in self._noise(step):
            logits = self.logits[name].requires_grad_(True)
            mask = relaxed_mask(logits, uniform, self.method.temperature)
            combined = torch.tensordot(self._used(coefficients[name]), self.updates[name], dims=1)
            (gradient,) = torch.autograd.grad(mask, logits, self.body[name].grad * combined)
            logits.requires_grad_(False)
            logits.grad = gradient
        self.optimizers["mask"].step()

    def _adapt(self, step: int) -> None:
        """Take one step of the coefficients from their start, under the step's mask."""
        for adapted, start in zip(self.distinct(self.adapted), self.distinct(self.coefficients), strict=True):
            adapted.copy_(start)
        self._combine(self._relaxed_masks(step), self.adapted)
        self._differentiate(self._chosen(step, "inner"))
        self._put_coefficient_gradients(self._relaxed_masks(step), self.adapted)
        self.optimizers["inner"].step()

    def coefficient_step(self, step: int) -> None:
        """Take one step of the coefficients under the final mask."""
        self._combine(self._final_masks(), self.coefficients)
        self._differentiate(self._chosen(step))
        self._put_coefficient_gradients(self._final_masks(), self.coefficients)
        self.optimizers["coefficient"].step()

    def _noise(self, step: int) -> Iterable[tuple[str, Tensor]]:
        """Yield the step's uniform numbers by name; equal on all processes and devices."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        for name in self.body:
            yield name, torch.rand(self.logits[name].shape, generator=generator).to(self.accelerator.device)

    def _relaxed_masks(self, step: int) -> Iterable[tuple[str, Tensor]]:
        for name, uniform in self._noise(step):
            yield name, relaxed_mask(self.logits[name], uniform, self.method.temperature)

    def _final_masks(self) -> Iterable[tuple[str, Tensor]]:
        """Yield the masks that the merge ends with by name; a number that is 1 if none are learned."""
        if not self.method.masks:
            return ((name, torch.ones((), device=self.accelerator.device)) for name in self.body)
        if self.method.mask == "relaxed":
            return self._relaxed_masks(self.method.steps)  # with noise that no step of learning had
        return ((name, rescaled(logits.sigmoid())) for name, logits in self.logits.items())

    def _used(self, coefficients: Tensor) -> Tensor:
        """Return coefficients as they multiply the updates: in [0, 1], if they are learned."""
        return coefficients.clamp(0, 1) if self.method.adapts else coefficients

    @torch.no_grad()
    def _combine(self, masks: Iterable[tuple[str, Tensor]], coefficients: Mapping[str, Tensor]) -> None:
        """Write `W0 + mask ∘ Σ λ_t Δ_t` into the shared body."""
        for name, mask in masks:
            combined = torch.tensordot(self._used(coefficients[name]), self.updates[name], dims=1)
            self.body[name].copy_(self.base[name] + mask * combined)

    @torch.no_grad()
    def _put_coefficient_gradients(
        self, masks: Iterable[tuple[str, Tensor]], coefficients: Mapping[str, Tensor]
    ) -> None:
        """Set the gradients of the coefficients from those of the body's parameters."""
        for tensor in self.distinct(coefficients):
            tensor.grad = torch.zeros_like(tensor)
        for name, mask in masks:
            along_updates = (self.updates[name] * (self.body[name].grad * mask)).flatten(1).sum(1)
            free = coefficients[name] == self._used(coefficients[name])
            coefficients[name].grad += along_updates * free

    def _chosen(self, step: int, stage: str = "") -> dict[str, list[Sample]]:
        """Return the samples that a step takes of each task of this process."""
        chosen = {}
        for task in self.tasks_here:
            samples = self.samples[task]
            count = min(self.method.batch_size, len(samples))
            chosen[task] = random.Random(f"{self.seed}/{step}/{task}{stage}").sample(samples, count)
        return chosen

    def _differentiate(self, chosen: Mapping[str, list[Sample]]) -> None:
        """Set the gradients of the body's parameters to those of the entropies, summed over tasks and processes."""
        for parameter in self.body.values():
            parameter.grad = torch.zeros_like(parameter)
        for task, samples in chosen.items():
            model = self.models[task]
            kind = "tokens" if writes(model) else ""
            for group in batches_of(model, kind, samples, self.batch_size):
                together = entropies(model, [samples[i] for i in group], task)
                (together.sum() / len(samples)).backward()
        if self.accelerator.num_processes > 1:
            for parameter in self.body.values():
                parameter.grad = reduce(parameter.grad, "sum")

    def learned(self) -> LearnedMask:
        self.optimizers.clear()  # their state is larger than the masks, which are made now
        names, linear = self.plan.base.names, self.plan.base.linear
        return LearnedMask(
            {
                names[name]: to_matrices(mask.cpu().expand(self.base[name].shape), linear.get(name))
                for name, mask in self._final_masks()
            },
            {names[n]: self._used(value).cpu().expand(len(self.tasks)) for n, value in self.coefficients.items()},
        )


def entropies(model: Any, samples: list[Sample], task: str) -> Tensor:
    """Return the softmax entropy of a model's answer to each sample, `[n]`: of its classes, or of the first token that
    it writes.

    Args:
        samples: unbatched, unpadded inputs; of an encoder-decoder with one token to decode.

    Raises:
        HfEsmError: if the model neither writes nor is a classifier of two labels or more.
    """
    batch = batch_for(samples, model)
    logits = getattr(model(**batch), "logits", None)
    if logits is not None and writes(model):
        read = ["decoder_input_ids"] if model.config.is_encoder_decoder else ["input_ids", "inputs_embeds"]
        lengths = [next(len(sample[name]) for name in read if name in sample) for sample in samples]
        logits = logits[torch.arange(len(samples)), torch.tensor(lengths) - 1]
    if logits is None or logits.dim() != 2 or logits.shape[1] < 2:
        raise HfEsmError(
            f"'{task}': a {type(model).__name__} neither writes nor is a classifier of several labels. "
            "Concrete and AdaMerging learn from how sure such models are; choose another method."
        )
    log_probabilities = logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)
