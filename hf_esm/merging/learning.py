"""Learning the mask and the coefficients of Concrete merging, on unlabelled samples (arXiv 2312.06173)."""

import json
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import Accelerator
from accelerate.utils import reduce, send_to_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..architecture import to_matrices
from ..data import Sample, collate
from ..errors import HfEsmError
from ..methods import LearnedMask, final_mask, relaxed_mask
from ..planning import MergePlan
from ..utils import atomic_file
from .alpha import CandidateModels


SAVE_EVERY = 100  # steps


FORMAT = "hf_esm.concrete"


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
    """Learn what a Concrete method of `plan` needs.

    Every process takes its share of the tasks; gradients are summed over processes.

    Args:
        samples: unlabelled samples by task.
        batch_size: samples per task and step.
        seed: of the batches and of the mask's noise. Each step has its own, so that a resumed run is the same run.
        folder: where the state is kept every hundred steps; what stands there from an interrupted run is gone on from.

    Raises:
        HfEsmError: if a task has no classifier.
    """
    learner = _Learner(plan, samples, accelerator, batch_size, seed)
    method = plan.method
    state = _State(folder, learner) if folder is not None else None
    done = state.resume() if state is not None else 0
    stages = [("Learning the mask", 0, method.steps, learner.mask_step)]
    if method.adapts:
        total = method.steps + method.coefficient_steps
        stages.append(("Learning the coefficients", method.steps, total, learner.coefficient_step))
    for title, start, end, take in stages:
        for step in progress(title)(range(max(start, done), end)):
            take(step)
            if state is not None and ((step + 1) % SAVE_EVERY == 0 or step + 1 == stages[-1][2]):
                state.save(step + 1)
    return learner.learned()


class _Learner:
    """Models around one shared body, the updates that are combined in it, and what is learned."""

    def __init__(
        self,
        plan: MergePlan,
        samples: Mapping[str, list[Sample]],
        accelerator: Accelerator,
        batch_size: int,
        seed: int,
    ):
        self.plan, self.method = plan, plan.method
        self.samples, self.accelerator, self.batch_size, self.seed = samples, accelerator, batch_size, seed
        models = CandidateModels(plan, accelerator.device)
        self.tasks = list(plan.experts)
        self.own = self.tasks[accelerator.process_index :: accelerator.num_processes]
        self.models = models.by_task
        parameters = {name: held for name, held in models.body.items() if isinstance(held, torch.nn.Parameter)}
        self.body = {name: held for name, held in parameters.items() if name not in plan.unchanged}
        for name in models.body.keys() - parameters.keys():  # buffers are averaged, whatever is learned
            weight = plan.base.tensor(name)
            deltas = [expert.update(name, weight) for expert in plan.experts.values()]
            models.body[name].copy_(weight + torch.stack(deltas).mean(0))
        self.names = list(self.body)
        for parameter in (p for model in self.models.values() for p in model.parameters()):
            parameter.requires_grad_(False)
        self.base, self.updates, self.logits = {}, {}, {}
        for name, parameter in self.body.items():
            parameter.requires_grad_(True)
            weight = plan.base.tensor(name)
            deltas = [expert.update(name, weight) for expert in plan.experts.values()]
            deltas = torch.stack(deltas if self.method.adapts else [torch.stack(deltas).sum(0)])
            self.base[name] = weight.float().to(accelerator.device)
            self.updates[name] = deltas.to(accelerator.device)
            self.logits[name] = torch.zeros_like(self.base[name])
        shared = not self.method.layer_wise
        count = len(self.tasks) if self.method.adapts else 1
        start = torch.full((count,), float(self.method.coefficient), device=accelerator.device)
        self.coefficients = {name: start if shared else start.clone() for name in self.names}
        self.mask_optimizer = torch.optim.Adam(list(self.logits.values()), lr=self.method.learning_rate)
        self.coefficient_optimizer = torch.optim.Adam(
            self._distinct(self.coefficients), lr=self.method.coefficient_rate
        )

    @staticmethod
    def _distinct(tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return list({id(tensor): tensor for tensor in tensors.values()}.values())

    def mask_step(self, step: int) -> None:
        """One step of the mask; before it, one step of fresh coefficients, if they are learned."""
        coefficients, batches = self.coefficients, self._batches(step)
        if self.method.adapts:
            start = {id(tensor): tensor.clone() for tensor in self._distinct(coefficients)}
            fresh = {name: start[id(tensor)] for name, tensor in coefficients.items()}
            self._combine(self._masks(step), fresh)
            self._differentiate(batches)
            inner = torch.optim.Adam(list(start.values()), lr=self.method.coefficient_rate)
            self._put_coefficient_gradients(self._masks(step), fresh)
            inner.step()
            coefficients = fresh
        self._combine(self._masks(step), coefficients)
        self._differentiate(batches)
        for name, uniform in self._noise(step):
            logits = self.logits[name].requires_grad_(True)
            mask = relaxed_mask(logits, uniform, self.method.temperature)
            combined = torch.tensordot(coefficients[name], self.updates[name], dims=1)
            (gradient,) = torch.autograd.grad(mask, logits, self.body[name].grad * combined)
            logits.requires_grad_(False)
            logits.grad = gradient
        self.mask_optimizer.step()

    def coefficient_step(self, step: int) -> None:
        """One step of the coefficients under the final mask."""
        masks = ((name, final_mask(self.logits[name], self.method.expected_mask)) for name in self.names)
        self._combine(masks, self.coefficients)
        self._differentiate(self._batches(step))
        masks = ((name, final_mask(self.logits[name], self.method.expected_mask)) for name in self.names)
        self._put_coefficient_gradients(masks, self.coefficients)
        self.coefficient_optimizer.step()

    def _noise(self, step: int) -> Iterable[tuple[str, Tensor]]:
        """The step's uniform numbers, the same on every process and device."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        for name in self.names:
            yield name, torch.rand(self.logits[name].shape, generator=generator).to(self.accelerator.device)

    def _masks(self, step: int) -> Iterable[tuple[str, Tensor]]:
        for name, uniform in self._noise(step):
            yield name, relaxed_mask(self.logits[name], uniform, self.method.temperature)

    @torch.no_grad()
    def _combine(self, masks: Iterable[tuple[str, Tensor]], coefficients: Mapping[str, Tensor]) -> None:
        """`W0 + mask ∘ Σ λ_t Δ_t` into the shared body."""
        for name, mask in masks:
            combined = torch.tensordot(coefficients[name], self.updates[name], dims=1)
            self.body[name].copy_(self.base[name] + mask * combined)

    @torch.no_grad()
    def _put_coefficient_gradients(
        self, masks: Iterable[tuple[str, Tensor]], coefficients: Mapping[str, Tensor]
    ) -> None:
        for tensor in self._distinct(coefficients):
            tensor.grad = torch.zeros_like(tensor)
        for name, mask in masks:
            along = (self.updates[name] * (self.body[name].grad * mask)).flatten(1).sum(1)
            coefficients[name].grad += along

    def _batches(self, step: int) -> dict[str, dict[str, Tensor]]:
        """The step's batch of each task of this process."""
        found = {}
        for task in self.own:
            rows = self.samples[task]
            chosen = random.Random(f"{self.seed}/{step}/{task}").sample(rows, min(self.batch_size, len(rows)))
            found[task] = send_to_device(collate(chosen, self.models[task].config), self.accelerator.device)
        return found

    def _differentiate(self, batches: Mapping[str, dict[str, Tensor]]) -> None:
        """The gradient of the summed entropies into the body's parameters, over all processes."""
        for parameter in self.body.values():
            parameter.grad = torch.zeros_like(parameter)
        for task, batch in batches.items():
            entropy(self.models[task], batch, task).backward()
        if self.accelerator.num_processes > 1:
            for parameter in self.body.values():
                parameter.grad = reduce(parameter.grad, "sum")

    def learned(self) -> LearnedMask:
        names, linear = self.plan.base.names, self.plan.base.linear
        return LearnedMask(
            {names[name]: to_matrices(tensor.cpu(), linear.get(name)) for name, tensor in self.logits.items()},
            {names[name]: tensor.cpu().expand(len(self.tasks)) for name, tensor in self.coefficients.items()},
        )


def entropy(model: Any, batch: Mapping[str, Tensor], task: str) -> Tensor:
    """The mean softmax entropy of a classifier's answers."""
    logits = getattr(model(**batch), "logits", None)
    if logits is None or logits.dim() != 2 or logits.shape[1] < 2:
        raise HfEsmError(
            f"'{task}': a {type(model).__name__} is no classifier of several labels, so that no mask can be learned "
            "from how sure it is. Choose another method."
        )
    found = logits.log_softmax(-1)
    return -(found.exp() * found).sum(-1).mean()


class _State:
    """What is learned, on disk."""

    def __init__(self, folder: Path, learner: _Learner):
        self.path, self.learner = folder / "concrete.safetensors", learner

    def _tensors(self) -> dict[str, Tensor]:
        """Everything by name; what is shared stands once."""
        found = {f"logits.{name}": tensor for name, tensor in self.learner.logits.items()}
        for i, tensor in enumerate(self.learner._distinct(self.learner.coefficients)):
            found[f"coefficients.{i}"] = tensor
        for kind in ("mask", "coefficient"):
            optimizer = getattr(self.learner, f"{kind}_optimizer")
            for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
                for name, value in optimizer.state.get(parameter, {}).items():
                    found[f"{kind}.{i}.{name}"] = value
        return found

    def save(self, step: int) -> None:
        if self.learner.accelerator.is_main_process:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors().items()}
            with atomic_file(self.path) as partial:
                save_file(tensors, partial, {"format": FORMAT, "header": json.dumps({"step": step})})
        self.learner.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Take up what stands in the folder; returns how many steps it has seen."""
        if not self.path.is_file():
            return 0
        try:
            with safe_open(self.path, "pt") as file:
                header = json.loads((file.metadata() or {})["header"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise HfEsmError(f"{self.path}: cannot be gone on from ({error}). Remove it to start again.") from None
        learner = self.learner
        for name, tensor in learner.logits.items():
            tensor.copy_(tensors[f"logits.{name}"])
        for i, tensor in enumerate(learner._distinct(learner.coefficients)):
            tensor.copy_(tensors[f"coefficients.{i}"])
        for kind in ("mask", "coefficient"):
            optimizer = getattr(learner, f"{kind}_optimizer")
            for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
                prefix = f"{kind}.{i}."
                if found := {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}:
                    moved = {n: t if n == "step" else t.to(parameter.device) for n, t in found.items()}
                    optimizer.state[parameter] = moved
        return header["step"]
