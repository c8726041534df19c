"""Methods that add the updates up, entry by entry."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ..errors import HfEsmError
from .stack import Merged, MergeMethod, Stack, mean_update, weighted_sum, weights_cancel


@dataclass
class Mean(MergeMethod):
    """The average of the experts' weights ("model soup", arXiv 2203.05482), weighted by the tasks' weights."""

    name: ClassVar[str] = "mean"
    papers: ClassVar[tuple[str, ...]] = ("2203.05482",)
    tunable: ClassVar[bool] = False
    keeps_span: ClassVar[bool] = True

    def merge(self, stack: Stack) -> Merged:
        return mean_update(stack, scaled=True)

    def check_weights(self, weights: Iterable[float]) -> None:
        """Raise an error if the weights of the tasks sum to 0."""
        if weights_cancel(weights := list(weights)):
            raise HfEsmError(
                f"Method {self.name!r}: the weights {', '.join(f'{weight:g}' for weight in weights)} sum to 0, so "
                "there is no mean. Change `weights`, or use 'task-arithmetic'."
            )


@dataclass
class TaskArithmetic(MergeMethod):
    """The sum of the updates, times α (arXiv 2212.04089; α = 0.3 is the published setting)."""

    name: ClassVar[str] = "task-arithmetic"
    papers: ClassVar[tuple[str, ...]] = ("2212.04089",)
    default_alpha: ClassVar[float] = 0.3
    keeps_span: ClassVar[bool] = True

    def merge(self, stack: Stack) -> Merged:
        return Merged(weighted_sum(stack), "sum")
