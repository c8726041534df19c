"""Concrete subspace learning (arXiv 2312.06173): task arithmetic and AdaMerging (2310.02575) under a learned mask."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Optional

import torch
from torch import Tensor

from ..errors import HfEsmError
from .stack import Merged, MergeMethod, Stack, WholeUpdates, mean_update


def rescaled(mask: Tensor) -> Tensor:
    """A mask of one weight brought to mean 1; zeros where it is zero."""
    return mask / mask.mean().clamp_min(torch.finfo(mask.dtype).tiny)


def relaxed_mask(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """`σ((log u − log(1 − u) + logit) / τ)`, brought to mean 1: a differentiable sample of a binary mask."""
    uniform = uniform.clamp(1e-6, 1 - 1e-6)
    return rescaled(torch.sigmoid((uniform.log() - (1 - uniform).log() + logits) / temperature))


def final_mask(logits: Tensor, expected: bool) -> Tensor:
    """`logits > 0`, or the expectation `σ(logits)`, brought to mean 1."""
    return rescaled(torch.sigmoid(logits) if expected else (logits > 0).float())


@dataclass
class LearnedMask:
    """A learned mask over all weights, and the coefficients of the task vectors.

    Attributes:
        logits: of the mask, by the parameter's name in the base model: of each matrix that it holds, or of itself.
        coefficients: `[T]` by the same names.
    """

    logits: Mapping[str, list[Tensor]]
    coefficients: Mapping[str, Tensor]

    def of(self, name: str, part: int = 0) -> Optional[tuple[Tensor, Tensor]]:
        """Logits and coefficients of one matrix or parameter; None if nothing was learned of it."""
        return (self.logits[name][part], self.coefficients[name]) if name in self.logits else None


@dataclass
class ConcreteTaskArithmetic(MergeMethod):
    """Task arithmetic under a mask over all weights, learned so that the heads are sure of unlabelled samples.

    The mask, one logit per weight shared by all tasks, is learned by Adam on the sum of the tasks' mean softmax
    entropies, one batch of calibration samples per task and step. Classifiers only. Memory while learning: seven
    bodies in float32 (base, merged, its gradient, the summed updates, logits and Adam's two moments), and all heads.
    """

    name: ClassVar[str] = "concrete-task-arithmetic"
    needs_samples: ClassVar[bool] = True
    adapts: ClassVar[bool] = False  # the coefficients
    layer_wise: ClassVar[bool] = False
    coefficient_steps: ClassVar[int] = 0
    coefficient_rate: ClassVar[float] = 1.0
    learned: ClassVar[Optional[LearnedMask]] = None  # set on the instance by `prepare`

    coefficient: float = field(default=0.3, metadata={"help": "of every task vector; where it is learned, its start"})
    steps: int = field(default=2000, metadata={"help": "steps of learning the mask"})
    learning_rate: float = field(default=1e-3, metadata={"help": "of the mask's logits (Adam)"})
    temperature: float = field(default=0.5, metadata={"help": "of the relaxed mask"})
    expected_mask: bool = field(default=False, metadata={"help": "end with its expectation, not logits > 0"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting in ("learning_rate", "temperature"):
            if getattr(self, setting) <= 0:
                raise HfEsmError(f"{self.name}: {setting} must be above 0, not {getattr(self, setting)}.")
        if self.steps < 1:
            raise HfEsmError(f"{self.name}: steps must be 1 or more, not {self.steps}.")

    def prepare(self, whole: WholeUpdates) -> list[float]:
        """Learn the mask, and the coefficients if they are learned, on the samples."""
        self.learned = whole.learn_mask()
        return []

    def bodies_to_learn(self, tasks: int) -> int:
        return 6 + tasks if self.adapts else 7

    def merge(self, stack: Stack) -> Merged:
        if self.learned is None:
            raise HfEsmError(f"{self.name}: no mask has been learned; `merge_models` does it.")
        found = self.learned.of(stack.name, stack.part)
        if found is None:  # a buffer: nothing can be learned of it
            return mean_update(stack, scaled=True)
        mask = final_mask(found[0], self.expected_mask).to(stack.deltas[0].device)
        coefficients = found[1].tolist()
        merged = sum(one * delta for one, delta in zip(coefficients, stack.deltas, strict=True))
        return Merged(merged * mask, self.name)


@dataclass
class ConcreteAdaMerging(ConcreteTaskArithmetic):
    """Concrete task arithmetic whose coefficients are learned, too: per task, or per task and weight.

    While the mask is learned, the coefficients take one step of Adam from their start before each of its steps (the
    mask's gradient is that at the coefficients it leads to; the step itself is not differentiated). Then the mask is
    kept, and the coefficients are learned. Memory while learning: six bodies in float32 and one per task.
    """

    name: ClassVar[str] = "concrete-adamerging"
    adapts: ClassVar[bool] = True

    layer_wise: bool = field(default=True, metadata={"help": "a coefficient per task and weight, not per task"})
    coefficient_steps: int = field(default=1000, metadata={"help": "steps of learning the coefficients"})
    coefficient_rate: float = field(default=1e-3, metadata={"help": "learning rate of the coefficients (Adam)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coefficient_rate <= 0:
            raise HfEsmError(f"{self.name}: coefficient_rate must be above 0, not {self.coefficient_rate}.")
        if self.coefficient_steps < 0:
            raise HfEsmError(f"{self.name}: coefficient_steps must be 0 or more, not {self.coefficient_steps}.")
