"""Predictions and explanations of a routed model's samples, as data, and how they follow from decisions."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..tuners.routed import Decision, Route, RoutedExpertsConfig


# As `hf_esm.tuners.recording` lists decisions: adapter, module that decided, decision.
Records = list[tuple[str, str, Decision]]


@dataclass
class Prediction:
    """A routed model's answer to one sample.

    Attributes:
        task: the task that the router decided on, or that was given.
        label: label of that task.
        score: probability of the label. For a task with several labels per sample, the label's own probability; for a
            task with one value, the value.
        sure: whether the task was given, or the router is sure of it.
        probabilities: by label, the probability of each (of a task with one value, the value), if asked for.
    """

    task: str
    label: str
    score: float
    sure: bool
    probabilities: dict[str, float] = field(default_factory=dict)


@dataclass
class Explanation:
    """Why a sample was routed as it was.

    Attributes:
        task: the likeliest task, or "none" if the sample is too far from all tasks.
        probabilities: by task; for a prototype router, the share of layers that voted for the task.
        distance: distance from all tasks, as a multiple of the largest distance at which a sample still belongs to one
            of them; None if the router has no threshold.
        layers: the likeliest task by deciding module. Where two modules decide, in the towers of a model such as CLIP,
            `probabilities` and `weights` are means over both, and `distance` is the larger one.
        sure: whether `likeliest` is likely enough, and the sample near enough to the tasks.
        weights: by task, the weight with which its expert is added, in steps of 1/256; the rest to 1 is the static
            model's. Empty for a prototype router, whose experts are in `layers`.
    """

    task: str
    probabilities: dict[str, float]
    distance: Optional[float]
    layers: dict[str, str]
    sure: bool = True
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def likeliest(self) -> str:
        """The likeliest task, even if the sample is too far from all tasks."""
        return max(self.probabilities, key=self.probabilities.get)


def vote(config: RoutedExpertsConfig, records: Records) -> tuple[Optional[Decision], list[str]]:
    """The decision on a batch, and the task of each sample.

    A discriminant router makes one decision. A prototype router makes one in each layer: the decision is then None,
    and the tasks are those of most layers.
    """
    if config.router == "discriminant":
        ((_, _, decision),) = records
        return decision, [config.tasks[i] for i in decision.probabilities.argmax(-1)]
    tasks = torch.stack([decision.route.experts for _, _, decision in records]).mode(0).values
    return None, [config.tasks[i] for i in tasks]


def explanation(config: RoutedExpertsConfig, records: Records, row: int) -> Explanation:
    """Why one sample of a batch was routed as it was.

    Args:
        records: decisions on the batch.
        row: index of the sample.
    """
    layers = {module: config.tasks[int(decision.probabilities[row].argmax())] for _, module, decision in records}
    if config.router == "prototype":
        votes = {task: list(layers.values()).count(task) / len(layers) for task in config.tasks}
        return Explanation(max(votes, key=votes.get), votes, None, layers)
    decisions = [decision for _, _, decision in records]
    mean = torch.stack([decision.probabilities[row] for decision in decisions]).mean(0)
    by_task = dict(zip(config.tasks, mean.tolist(), strict=True))
    distances = [float(decision.distance[row]) for decision in decisions if decision.distance is not None]
    distance = max(distances, default=None)
    task = "none" if distance is not None and distance > 1 else max(by_task, key=by_task.get)
    weights: Counter[str] = Counter()
    for experts, shares in (decision.route for decision in decisions):
        for expert, weight in zip(experts[row].tolist(), shares[row].tolist(), strict=True):
            weights[config.tasks[expert]] += weight / len(decisions)
    sure = all(is_sure(config, decision, row) for decision in decisions)
    return Explanation(task, by_task, distance, layers, sure, {t: weight for t, weight in weights.items() if weight})


def is_sure(config: RoutedExpertsConfig, decision: Decision, row: int) -> bool:
    """Whether a discriminant router is sure of a sample's task: the task is likely, and the sample near."""
    near = decision.distance is None or bool(decision.distance[row] <= 1)
    return near and bool(decision.probabilities[row].max() >= config.confidence)


def take(decision: Decision, rows: list[int]) -> Decision:
    """The decision on some samples of a batch."""
    weights = None if decision.route.weights is None else decision.route.weights[rows]
    distance = None if decision.distance is None else decision.distance[rows]
    route = Route(decision.route.experts[rows], weights)
    return Decision(route, decision.probabilities[rows], distance, decision.before)


def probabilities(logits: Tensor, config: PretrainedConfig) -> Tensor:
    """Probabilities of a head's labels `[B, labels]`, computed as Transformers' own pipeline does.

    The logits themselves where the head gives one value.
    """
    if logits.shape[1] == 1:
        return logits
    return logits.sigmoid() if config.problem_type == "multi_label_classification" else logits.softmax(-1)
