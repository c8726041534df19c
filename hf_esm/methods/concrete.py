"""AdaMerging (arXiv 2310.02575), and Concrete subspace learning (2312.06173): AdaMerging or task arithmetic under a
learned mask.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Optional

import torch
from torch import Tensor

from ..errors import HfEsmError
from .stack import Merged, MergeMethod, Stack, WholeUpdates, mean_update


def rescaled(mask: Tensor) -> Tensor:
    """Scale the mask of one parameter to mean 1."""
    return mask / mask.mean().clamp_min(torch.finfo(mask.dtype).tiny)


def relaxed_mask(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """`σ((log u − log(1 − u) + logit) / τ)`, scaled to mean 1: a differentiable sample of a binary mask."""
    uniform = uniform.clamp(torch.finfo(uniform.dtype).eps, 1 - torch.finfo(uniform.dtype).eps)
    return rescaled(torch.sigmoid((uniform.log() - (1 - uniform).log() + logits) / temperature))


@dataclass
class LearnedMask:
    """A mask over all weights, and the coefficients of the updates.

    Attributes:
        masks: by the parameter's name in the base model: a list with one tensor per matrix that the parameter holds,
            or with one of the parameter's shape. The mean over the parameter is 1.
        coefficients: `[T]` by the same names.
    """

    masks: Mapping[str, list[Tensor]]
    coefficients: Mapping[str, Tensor]

    def of(self, name: str, part: int = 0) -> Optional[tuple[Tensor, Tensor]]:
        """Return mask and coefficients of one matrix or parameter, or None if none were learned."""
        return (self.masks[name][part], self.coefficients[name]) if name in self.masks else None


@dataclass
class LearnedMerge(MergeMethod):
    """Base of the methods that learn on unlabelled samples how sure the merged models are of their answers."""

    needs_samples: ClassVar[bool] = True
    counts_embeddings: ClassVar[bool] = False  # what is learned is learned on the sum of their updates
    masks: ClassVar[bool] = True  # whether a mask is learned
    adapts: ClassVar[bool] = False  # whether coefficients are learned
    learned: ClassVar[Optional[LearnedMask]] = None  # set on the instance by `prepare`

    def prepare(self, whole: WholeUpdates) -> list[Any]:
        """Learn the mask, and the coefficients if they are learned, on the calibration samples."""
        self.learned = whole.learn_mask()
        return []

    def merge(self, stack: Stack) -> Merged:
        if self.learned is None:
            learned = "the mask has" if self.masks else "the coefficients have"
            raise HfEsmError(f"{self.name}: {learned} not been learned. `merge_models` learns.")
        learned = self.learned.of(stack.name, stack.part)
        if learned is None:  # a buffer, which has no gradient
            return mean_update(stack, scaled=True)
        mask, coefficients = learned
        merged = sum(c * update for c, update in zip(coefficients.tolist(), stack.weighted, strict=True))
        return Merged(merged * mask.to(stack.updates[0].device), self.name)


@dataclass
class AdaMerging(LearnedMerge):
    """AdaMerging: task arithmetic with coefficients in [0, 1], learned per task, or per task and weight.

    Adam minimises the sum of the tasks' mean softmax entropies, one batch of calibration samples per task and step: of
    a classifier's answer, or of the first token that a model that writes answers a prompt with, as in the published
    settings of Concrete for Flan-T5. Memory while learning: three bodies in float32 (base, merged, its gradient), one
    per task, and all heads.

    Deviations from the published code: samples are the caller's, where the paper takes the whole test split, and every
    step draws its batches anew. As published, coefficients beyond [0, 1] count as 0 or 1.
    """

    name: ClassVar[str] = "adamerging"
    papers: ClassVar[tuple[str, ...]] = ("2310.02575",)
    masks: ClassVar[bool] = False
    adapts: ClassVar[bool] = True

    granularity: str = field(
        default="layer",
        metadata={
            "help": "a coefficient per task and weight (layer), or per task (task)",
            "choices": ("layer", "task"),
        },
    )
    coefficient: float = field(default=0.3, metadata={"help": "start of every coefficient", "least": 0, "most": 1})
    steps: int = field(default=500, metadata={"help": "steps of learning; published: 500", "least": 0})
    learning_rate: float = field(
        default=1e-3, metadata={"help": "of the coefficients (Adam); published: 0.001", "above": 0}
    )
    batch_size: int = field(default=16, metadata={"help": "samples per task and step", "least": 1})

    @property
    def layer_wise(self) -> bool:
        """Whether there is a coefficient per task and weight."""
        return self.granularity == "layer"

    @property
    def coefficient_steps(self) -> int:
        """Steps of learning the coefficients: all."""
        return self.steps

    @property
    def coefficient_rate(self) -> float:
        """Learning rate of the coefficients."""
        return self.learning_rate

    def bodies_to_learn(self, tasks: int) -> int:
        return 3 + tasks


@dataclass
class ConcreteTaskArithmetic(LearnedMerge):
    """Task arithmetic under a mask over all weights, learned so that the models are sure of unlabelled samples.

    The mask has one logit per weight, shared by all tasks. Adam minimises the sum of the tasks' mean softmax
    entropies, one batch of calibration samples per task and step: of a classifier's answer, or of the first token that
    a model that writes answers a prompt with. Samples of language models are prompts: ready ones with `labels` are cut
    where the answer begins. Memory while learning: seven bodies in float32 (base, merged, its gradient, the summed
    updates, logits and Adam's two moments), and all heads.

    Deviations from the published code: the merge ends with the mask's expectation `σ(logit)`, which needs no seed, and
    which without a step gives task arithmetic (`mask: relaxed` is the published end, one more draw, here by seed).
    Samples are the caller's, where the paper takes the whole test split. Every step draws its batches anew. No dropout
    while learning.
    """

    name: ClassVar[str] = "concrete-task-arithmetic"
    papers: ClassVar[tuple[str, ...]] = ("2312.06173",)
    gone: ClassVar[Mapping[str, str]] = {
        "expected_mask": "Leave it out: the mask's expectation is the default; `mask: relaxed` is the published draw."
    }
    of_classifiers: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-3, "batch_size": 16}  # CLIP's
    of_writers: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-4, "batch_size": 8}  # Flan-T5's
    layer_wise: ClassVar[bool] = False

    coefficient: float = field(default=0.3, metadata={"help": "of every update"})
    steps: int = field(default=2000, metadata={"help": "steps of learning the mask", "least": 0})
    learning_rate: Optional[float] = field(
        default=None,
        metadata={
            "help": "of the mask's logits (Adam); by default 0.0001 for models that write, else 0.001",
            "above": 0,
        },
    )
    batch_size: Optional[int] = field(
        default=None,
        metadata={"help": "samples per task and step; by default 8 for models that write, else 16", "least": 1},
    )
    temperature: float = field(default=0.5, metadata={"help": "of the relaxed mask", "above": 0})
    mask: str = field(
        default="expected",
        metadata={
            "help": "what the learned logits end in: expected, σ(logit); relaxed, one more relaxed draw, as published",
            "choices": ("expected", "relaxed"),
        },
    )

    def for_model(self, reads_prompts: bool, writes: bool = False) -> "ConcreteTaskArithmetic":
        """Return the method with the published rates and batch size of the kind of model, where none are set."""
        published = self.of_writers if writes else self.of_classifiers
        return replace(self, **{name: value for name, value in published.items() if getattr(self, name) is None})

    def bodies_to_learn(self, tasks: int) -> int:
        return 6 + tasks if self.adapts else 7


@dataclass
class ConcreteAdaMerging(ConcreteTaskArithmetic):
    """Concrete task arithmetic with learned coefficients in [0, 1], per task, or per task and weight.

    While the mask is learned, each of its steps is preceded by one step of Adam that the coefficients take from their
    start, on samples of its own, with the moments of the steps before. The gradient of the mask is taken at the
    coefficients after that step, which is not differentiated. Then the mask is fixed, and the coefficients are learned
    from their start. Memory while learning: six bodies in float32, and one per task.

    Deviations from the published code, besides those of `ConcreteTaskArithmetic`: the inner step's gradient is taken
    at the start, where the published loops still hold the model of the step before. Where the two published codes
    differ: both gradients of a step see one mask, which is drawn once more before the coefficients are learned, as in
    fusion_bench; coefficients beyond [0, 1] count as 0 or 1, as in subspace_fusion.
    """

    name: ClassVar[str] = "concrete-adamerging"
    papers: ClassVar[tuple[str, ...]] = ("2312.06173", "2310.02575")
    adapts: ClassVar[bool] = True
    of_classifiers: ClassVar[Mapping[str, Any]] = {
        **ConcreteTaskArithmetic.of_classifiers,
        "inner_rate": 1.0,
        "coefficient_rate": 1e-3,
    }
    of_writers: ClassVar[Mapping[str, Any]] = {
        **ConcreteTaskArithmetic.of_writers,
        "inner_rate": 0.1,
        "coefficient_rate": 1e-4,
    }

    coefficient: float = field(default=0.3, metadata={"help": "start of every coefficient", "least": 0, "most": 1})
    layer_wise: bool = field(default=True, metadata={"help": "a coefficient per task and weight, not per task"})
    inner_rate: Optional[float] = field(
        default=None,
        metadata={
            "help": "of the coefficients' step before each step of the mask (Adam); by default 0.1 for models that "
            "write, else 1",
            "above": 0,
        },
    )
    coefficient_steps: int = field(default=1000, metadata={"help": "steps of learning the coefficients", "least": 0})
    coefficient_rate: Optional[float] = field(
        default=None,
        metadata={
            "help": "of the coefficients under the fixed mask (Adam); by default 0.0001 for models that write, else "
            "0.001",
            "above": 0,
        },
    )
