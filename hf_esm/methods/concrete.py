"""Concrete subspace learning (arXiv 2312.06173): task arithmetic and AdaMerging (2310.02575) under a learned mask."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Optional

import torch
from torch import Tensor

from ..errors import HfEsmError
from .stack import Merged, MergeMethod, Stack, WholeUpdates, mean_update


def rescaled(mask: Tensor) -> Tensor:
    """Scale the mask of one weight to mean 1; a mask of zeros stays zero."""
    return mask / mask.mean().clamp_min(torch.finfo(mask.dtype).tiny)


def relaxed_mask(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """`σ((log u − log(1 − u) + logit) / τ)`, scaled to mean 1: a differentiable sample of a binary mask."""
    uniform = uniform.clamp(1e-6, 1 - 1e-6)
    return rescaled(torch.sigmoid((uniform.log() - (1 - uniform).log() + logits) / temperature))


def final_mask(logits: Tensor, expected: bool) -> Tensor:
    """`logits > 0`, or the expectation `σ(logits)`, scaled to mean 1."""
    return rescaled(torch.sigmoid(logits) if expected else (logits > 0).float())


@dataclass
class LearnedMask:
    """A mask over all weights, and the coefficients of the updates.

    Attributes:
        logits: logits of the mask by the parameter's name in the base model: a list with one tensor per matrix that
            the parameter holds, or with one of the parameter's shape.
        coefficients: `[T]` by the same names.
    """

    logits: Mapping[str, list[Tensor]]
    coefficients: Mapping[str, Tensor]

    def of(self, name: str, part: int = 0) -> Optional[tuple[Tensor, Tensor]]:
        """Return logits and coefficients of one matrix or parameter, or None if none were learned."""
        return (self.logits[name][part], self.coefficients[name]) if name in self.logits else None


@dataclass
class ConcreteTaskArithmetic(MergeMethod):
    """Task arithmetic under a mask over all weights, learned so that the heads are sure of unlabelled samples.

    The mask has one logit per weight, shared by all tasks. Adam minimises the sum of the tasks' mean softmax
    entropies, one batch of calibration samples per task and step. Classifiers only. Memory while learning: seven
    bodies in float32 (base, merged, its gradient, the summed updates, logits and Adam's two moments), and all heads.
    """

    name: ClassVar[str] = "concrete-task-arithmetic"
    needs_samples: ClassVar[bool] = True
    counts_embeddings: ClassVar[bool] = False  # the mask was learned on the sum of their updates
    adapts: ClassVar[bool] = False  # whether coefficients are learned; the next three say how
    layer_wise: ClassVar[bool] = False
    coefficient_steps: ClassVar[int] = 0
    coefficient_rate: ClassVar[float] = 1.0
    learned: ClassVar[Optional[LearnedMask]] = None  # set on the instance by `prepare`

    coefficient: float = field(
        default=0.3, metadata={"help": "of every update; if coefficients are learned, their start"}
    )
    steps: int = field(default=2000, metadata={"help": "steps of learning the mask", "least": 1})
    learning_rate: float = field(default=1e-3, metadata={"help": "of the mask's logits (Adam)", "above": 0})
    temperature: float = field(default=0.5, metadata={"help": "of the relaxed mask", "above": 0})
    expected_mask: bool = field(
        default=False, metadata={"help": "end with the mask's expectation instead of logits > 0"}
    )

    def bodies_to_learn(self, tasks: int) -> int:
        return 6 + tasks if self.adapts else 7

    def prepare(self, whole: WholeUpdates) -> list[float]:
        """Learn the mask, and the coefficients if they are learned, on the calibration samples."""
        self.learned = whole.learn_mask()
        return []

    def merge(self, stack: Stack) -> Merged:
        if self.learned is None:
            raise HfEsmError(f"{self.name}: the mask has not been learned. `merge_models` learns it.")
        learned = self.learned.of(stack.name, stack.part)
        if learned is None:  # a buffer, which has no gradient
            return mean_update(stack, scaled=True)
        logits, coefficients = learned
        mask = final_mask(logits, self.expected_mask).to(stack.updates[0].device)
        merged = sum(c * update for c, update in zip(coefficients.tolist(), stack.weighted, strict=True))
        return Merged(merged * mask, self.name)


@dataclass
class ConcreteAdaMerging(ConcreteTaskArithmetic):
    """Concrete task arithmetic with learned coefficients, per task, or per task and weight.

    While the mask is learned, each of its steps is preceded by one step of Adam that the coefficients take from their
    start. The gradient of the mask is taken at the coefficients after that step, which is not differentiated. Then the
    mask is fixed, and the coefficients are learned. Memory while learning: six bodies in float32, and one per task.
    """

    name: ClassVar[str] = "concrete-adamerging"
    adapts: ClassVar[bool] = True

    layer_wise: bool = field(default=True, metadata={"help": "a coefficient per task and weight, not per task"})
    coefficient_steps: int = field(default=1000, metadata={"help": "steps of learning the coefficients", "least": 0})
    coefficient_rate: float = field(
        default=1e-3, metadata={"help": "learning rate of the coefficients (Adam)", "above": 0}
    )
