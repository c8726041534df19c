"""Methods that add the updates up, entry by entry."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .stack import Merged, MergeMethod, Stack, mean_update


@dataclass
class Mean(MergeMethod):
    """The average of the experts' weights ("model soup", arXiv 2203.05482)."""

    name: ClassVar[str] = "mean"
    tunable: ClassVar[bool] = False

    def merge(self, stack: Stack) -> Merged:
        return mean_update(stack, scaled=True)


@dataclass
class TaskArithmetic(MergeMethod):
    """The sum of the updates, times α (arXiv 2212.04089; α = 0.3 is the published setting)."""

    name: ClassVar[str] = "task-arithmetic"
    default_alpha: ClassVar[float] = 0.3

    def merge(self, stack: Stack) -> Merged:
        return Merged(torch.stack(stack.updates).sum(0), "sum")
