"""Outcomes on one task's rows, and scores by task with those of the experts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .labels import LabelledSamples
from .metric import ACCURACY, Metric


@dataclass(repr=False)
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
    """A model's scores by task, beside the expert's own where it was measured.

    Attributes:
        model: score of the model; accuracy is in [0, 1].
        expert: of each task's own expert.
        routing: of a routed model, the share of the task's samples that the router took for it.
        metric: name of the metric.
        higher_is_better: whether more of it is better.
        outcomes: what the model's scores were computed from.
    """

    model: dict[str, float]
    expert: dict[str, float]
    routing: dict[str, float] = field(default_factory=dict)
    metric: str = ACCURACY.name
    higher_is_better: bool = True
    outcomes: dict[str, Outcome] = field(default_factory=dict, repr=False)

    @property
    def average(self) -> float:
        return sum(self.model.values()) / len(self.model)

    @property
    def normalised(self) -> Optional[float]:
        """Mean over tasks of the score divided by the expert's (the other way round where less is better); None where
        what it is divided by is not above 0 in every task.
        """
        return normalised(self.model, self.expert, self.higher_is_better)

    def shown(self, score: Optional[float]) -> str:
        """A score as tables show it: accuracy in percent."""
        if score is None:
            return ""
        return f"{100 * score:.1f}" if self.metric == ACCURACY.name else f"{score:.3f}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "model": self.model,
            "expert": self.expert,
            "average": self.average,
            "normalised": self.normalised,
            **({"routing": self.routing} if self.routing else {}),
        }

    def __str__(self) -> str:
        width = max(len(task) for task in [*self.model, "average"])
        title = max(len(self.metric), 8)
        lines = [
            f"{'task':{width}}  {self.metric:>{title}}"
            + ("  expert" if self.expert else "")
            + ("  task found" if self.routing else "")
        ]
        for task, score in self.model.items():
            beside = f"  {self.shown(self.expert[task]):>6}" if task in self.expert else ""
            found = f"  {100 * self.routing[task]:10.1f}" if task in self.routing else ""
            lines.append(f"{task:{width}}  {self.shown(score):>{title}}{beside}{found}")
        lines.append(f"{'average':{width}}  {self.shown(self.average):>{title}}")
        if self.normalised is not None:
            lines[-1] += f"  ({100 * self.normalised:.1f} % of the experts)"
        return "\n".join(lines)


def normalised(
    model: Mapping[str, float], expert: Mapping[str, float], higher_is_better: bool = True
) -> Optional[float]:
    """See `Scores.normalised`."""
    if not all(expert.get(task, 0) > 0 and (higher_is_better or score > 0) for task, score in model.items()):
        return None
    if higher_is_better:
        return sum(score / expert[task] for task, score in model.items()) / len(model)
    return sum(expert[task] / score for task, score in model.items()) / len(model)
