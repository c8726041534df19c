"""What a routed model says of a sample: its task and label, and why."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor

from ..tuners.routed import Decision, Route, RoutedExpertsConfig


@dataclass
class Prediction:
    """What a routed model says of one sample.

    Attributes:
        task: the task that it was taken for, or that was given.
        label: that task's label.
        score: the label's probability; of a task with several labels per sample, the likeliest one's own; of a task
            with one value, the value.
        sure: whether the task was given, or is likely enough to count as found.
    """

    task: str
    label: str
    score: float
    sure: bool


@dataclass
class Explanation:
    """Why a sample was routed as it was.

    Attributes:
        task: the likeliest task, or "none" where the sample is too far from all.
        probabilities: by task; for a prototype router, the share of layers that voted for it.
        distance: in units of what is still believed to be one of the tasks; None if the router knows none.
        layers: the task that every deciding module chose. Where these are two, in the towers of a model such as CLIP,
            `probabilities` and `weights` are means over both, and `distance` is the larger.
        sure: whether `likeliest` is likely enough to count as found, and the sample near enough to the tasks.
        weights: by task, in steps of 1/256, how much of its expert is added; the rest to one is the static model's.
            A prototype router's experts are in `layers`.
    """

    task: str
    probabilities: dict[str, float]
    distance: Optional[float]
    layers: dict[str, str]
    sure: bool = True
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def likeliest(self) -> str:
        """The likeliest task, even if none is likely."""
        return max(self.probabilities, key=self.probabilities.get)


def vote(
    config: RoutedExpertsConfig, records: list[tuple[str, str, Decision]]
) -> tuple[Optional[Decision], list[str]]:
    """The one decision of a discriminant router, or, of a prototype router's many, the task of most layers."""
    if config.router == "discriminant":
        (decision,) = (found for _, _, found in records)
        return decision, [config.tasks[i] for i in decision.probabilities.argmax(-1)]
    votes = torch.stack([found.route.experts for _, _, found in records]).mode(0).values
    return None, [config.tasks[i] for i in votes]


def explanation(config: RoutedExpertsConfig, records: list[tuple[str, str, Decision]], row: int) -> Explanation:
    """Why one sample of a batch was routed as it was."""
    layers = {module: config.tasks[int(found.probabilities[row].argmax())] for _, module, found in records}
    if config.router == "prototype":
        counts = {task: list(layers.values()).count(task) / len(layers) for task in config.tasks}
        return Explanation(max(counts, key=counts.get), counts, None, layers)
    decisions = [found for _, _, found in records]
    mean = torch.stack([found.probabilities[row] for found in decisions]).mean(0)
    likely = dict(zip(config.tasks, mean.tolist(), strict=True))
    known = [float(found.distance[row]) for found in decisions if found.distance is not None]
    distance = max(known, default=None)
    task = "none" if distance is not None and distance > 1 else max(likely, key=likely.get)
    weights: Counter[str] = Counter()
    for experts, shares in (found.route for found in decisions):
        for expert, weight in zip(experts[row].tolist(), shares[row].tolist(), strict=True):
            weights[config.tasks[expert]] += weight / len(decisions)
    sure = all(is_sure(config, found, row) for found in decisions)
    return Explanation(task, likely, distance, layers, sure, {t: weight for t, weight in weights.items() if weight})


def is_sure(config: RoutedExpertsConfig, decision: Decision, row: int) -> bool:
    """Whether a discriminant router found the sample's task."""
    near = decision.distance is None or bool(decision.distance[row] <= 1)
    return near and bool(decision.probabilities[row].max() >= config.confidence)


def take(decision: Decision, rows: list[int]) -> Decision:
    """The decision on some of a batch's samples."""
    weights = None if decision.route.weights is None else decision.route.weights[rows]
    distance = None if decision.distance is None else decision.distance[rows]
    return Decision(Route(decision.route.experts[rows], weights), decision.probabilities[rows], distance)


def probabilities(logits: Tensor, config: Any) -> Tensor:
    """What a head says of its labels `[B, labels]`, as Transformers' own pipeline takes it."""
    if logits.shape[1] == 1:
        return logits
    return logits.sigmoid() if config.problem_type == "multi_label_classification" else logits.softmax(-1)
