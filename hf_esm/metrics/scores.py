"""Outcomes on one task's rows, and scores by task with those of the experts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from typing import Any, Optional

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..utils import plain_table
from .labels import LabelledSamples
from .metric import ACCURACY, Metric


@dataclass
class Outcome:
    """Outputs of a model on one task's rows, with the labels.

    Attributes:
        metric: what scores them.
        outputs: `N` outputs in the form that the kind of metric reads.
        labels: `N` labels in the form that the kind of metric reads.
        routed_to: of a routed model, `[N]` names: the likeliest task of each row.
    """

    metric: Metric
    outputs: Tensor | list[Any]
    labels: Tensor | list[Any]
    routed_to: list[str] = field(default_factory=list)

    @property
    def score(self) -> float:
        return float(self.metric.score(self.outputs, self.labels))

    def scores_of_draws(self, draws: Tensor) -> Tensor:
        """Score on each draw of rows: `[D]` float64, from indices `[D, N]` int64, which may repeat."""
        return self.metric.scores_of_draws(self.outputs, self.labels, draws)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the score, of draws of rows from a fixed seed."""
        count, generator = len(self.labels), torch.Generator().manual_seed(0)
        return interval_of(self.scores_of_draws(torch.randint(count, (self.metric.draws, count), generator=generator)))

    def routed_share(self, task: str) -> float:
        """Share of the rows whose likeliest task is `task`."""
        return self.routed_to.count(task) / len(self.routed_to)

    def as_dict(self) -> dict[str, Any]:
        """Outputs, labels and routes as plain data."""
        parts = {"outputs": self.outputs, "labels": self.labels}
        plain = {name: part.tolist() if isinstance(part, Tensor) else part for name, part in parts.items()}
        return {**plain, "tensors": isinstance(self.outputs, Tensor), "routed_to": self.routed_to}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], metric: Metric) -> "Outcome":
        """Outcome from what `as_dict` returned."""
        parts = [stored["outputs"], stored["labels"]]
        return cls(metric, *(map(torch.tensor, parts) if stored["tensors"] else parts), stored["routed_to"])

    def __repr__(self) -> str:
        return f"Outcome({self.metric.name} of {len(self.labels)} rows)"


def interval_of(draws: Tensor) -> tuple[float, float]:
    """95 % interval of the draws `[D]` float64 that have a score; NaN if none has.

    A correlation has none on rows that are all alike, nor has a share of an expert's score that is 0.
    """
    draws = torch.where(draws.isfinite(), draws, torch.nan)
    low, high = draws.nanquantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return low, high


def run(model: PreTrainedModel, data: LabelledSamples, metric: Metric = ACCURACY, batch_size: int = 32) -> Outcome:
    """Run a model on labelled samples.

    Raises:
        HfEsmError: if the metric cannot read the model's answers.
    """
    return Outcome(metric, metric.outputs(model, data, batch_size), metric.labels(data))


def accuracy(model: PreTrainedModel, data: LabelledSamples, batch_size: int = 32) -> float:
    """Share of samples whose class is right, in [0, 1]."""
    return run(model, data, ACCURACY, batch_size).score


@dataclass
class Scores:
    """Scores of a model by task, with those of the experts where they were measured.

    Attributes:
        model: score of the model by task; accuracy is in [0, 1].
        expert: score of each task's expert.
        base: score of the base on each task, with the task's head.
        routing: for a routed model, share of the task's samples whose likeliest task it is.
        metric: name of the metric.
        higher_is_better: False for errors, such as perplexity.
        outcomes: by task, the outputs that the model's scores were computed from.
    """

    model: dict[str, float]
    expert: dict[str, float]
    base: dict[str, float] = field(default_factory=dict)
    routing: dict[str, float] = field(default_factory=dict)
    metric: str = ACCURACY.name
    higher_is_better: bool = True
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def average(self) -> float:
        return sum(self.model.values()) / len(self.model)

    @property
    def normalised(self) -> Optional[float]:
        """Mean over tasks of the score divided by the expert's; for errors, the expert's divided by the score.

        None if a divisor is not above 0 or missing.
        """
        return normalised(self.model, self.expert, self.higher_is_better)

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows by task."""
        return {task: len(outcome.labels) for task, outcome in self.outcomes.items()}

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % interval of the model's score by task, of draws of its rows; see `Outcome.interval`."""
        return {task: outcome.interval for task, outcome in self.outcomes.items()}

    @property
    def below_base(self) -> list[str]:
        """Tasks on which the model is worse than the base, or has no score."""
        sign = 1 if self.higher_is_better else -1
        return [task for task, base in self.base.items() if not sign * self.model[task] >= sign * base]

    def shown(self, score: Optional[float]) -> str:
        """A score as tables show it, accuracy in percent."""
        if score is None:
            return ""
        return f"{100 * score:.1f}" if self.metric == ACCURACY.name else f"{score:.3f}"

    def shown_interval(self, task: str) -> str:
        """The interval of a task as tables show it; empty for a score without rows."""
        if task not in self.outcomes:
            return ""
        low, high = self.intervals[task]
        return f"{self.shown(low)} to {self.shown(high)}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "model": self.model,
            "expert": self.expert,
            "base": self.base,
            "rows": self.rows,
            "intervals": {
                task: list(interval) if all(map(isfinite, interval)) else None
                for task, interval in self.intervals.items()
            },
            "average": self.average,
            "normalised": self.normalised,
            **({"routing": self.routing} if self.routing else {}),
        }

    def __str__(self) -> str:
        table = [["task", f"{self.metric:>8}"], *([task, self.shown(score)] for task, score in self.model.items())]
        for name, others in (("base", self.base), ("expert", self.expert)):
            if others:
                table = _joined(table, [name, *(self.shown(others.get(task)) for task in self.model)])
        if self.rows:
            table = _joined(table, ["rows", *(str(self.rows.get(task, "")) for task in self.model)])
            table = _joined(table, ["95 %", *map(self.shown_interval, self.model)])
        if self.routing:
            shares = [f"{100 * self.routing[task]:.1f}" if task in self.routing else "" for task in self.model]
            table = _joined(table, ["task found", *shares])
        average = ["average", self.shown(self.average)]
        lines = plain_table([*table, average + [""] * (len(table[0]) - 2)])
        if self.normalised is not None:
            lines[-1] += f"  ({100 * self.normalised:.1f} % of the experts)"
        if self.below_base:
            lines.append(f"worse than the base: {', '.join(self.below_base)}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        scores = ", ".join(f"{task} {score:.4g}" for task, score in self.model.items())
        return f"Scores({self.metric}: {scores})"


def _joined(table: list[list[str]], column: list[str]) -> list[list[str]]:
    """Table with one more column."""
    return [[*row, cell] for row, cell in zip(table, column, strict=True)]


def normalised(
    model: Mapping[str, float], expert: Mapping[str, float], higher_is_better: bool = True
) -> Optional[float]:
    """See `Scores.normalised`."""
    if not all(expert.get(task, 0) > 0 and (higher_is_better or score > 0) for task, score in model.items()):
        return None
    if higher_is_better:
        return sum(score / expert[task] for task, score in model.items()) / len(model)
    return sum(expert[task] / score for task, score in model.items()) / len(model)
