"""Rows of a comparison: scores of each method, with intervals from draws of test rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor

from ..methods import MergeMethod, describe_method
from ..metrics import Outcome, interval_of, normalised
from .cells import Cell


@dataclass
class Row:
    """One method's row of the report. Shares are in [0, 1]; intervals hold 95 % of a bootstrap over test rows.

    Attributes:
        label: name of the row.
        method: name and settings of the method.
        alphas: α by seed; empty for a method without α.
        tasks: score by task, mean over seeds.
        task_intervals: interval of the score by task.
        average: mean over tasks.
        normalised: mean over tasks of the score divided by the expert's score.
        interval: interval of `normalised`.
        difference: `normalised` minus that of the first row.
        difference_interval: interval of `difference`; both rows are scored on the same draws.
        by_seed: `normalised` by seed of the choice of samples.
        routing: by task, share of its rows whose likeliest task it is; empty without a router.
        confusion: `[T, T]`, share of a task's rows (first index) whose likeliest task is the second; empty without a
            router.
        alpha_scores: by seed, the mean validation score by α, if α was searched.
        seconds: time to merge, calibration and search for α included; mean over seeds.
        memory: see `Cell`; the largest over seeds.
        size: see `Cell`; the largest over seeds.
        chosen: by seed, the method that was chosen, for one that chooses.
        alpha_errors: by seed, the standard error of each of `alpha_scores`.
        alpha_default: the default α of the method, or of the chosen one by the first seed.
        choosing: by seed, the number of merged models that were scored to choose α, and the seconds of that.
    """

    label: str
    method: dict[str, Any]
    alphas: dict[int, float]
    tasks: dict[str, float]
    task_intervals: dict[str, tuple[float, float]]
    average: float
    normalised: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    by_seed: dict[int, float]
    routing: dict[str, float]
    confusion: list[list[float]]
    alpha_scores: dict[int, dict[float, float]]
    seconds: float
    memory: int
    size: int
    chosen: dict[int, str] = field(default_factory=dict)
    alpha_errors: dict[int, dict[float, float]] = field(default_factory=dict)
    alpha_default: Optional[float] = None
    choosing: dict[int, tuple[int, float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Row({self.label!r}, normalised {self.normalised:.3f}, average {self.average:.3f})"


@dataclass(frozen=True)
class _ExpertScores:
    """Scores of the experts, and draws of test rows.

    Attributes:
        draws: by task, indices of rows, `[D, N]` int64.
        scores: by task, the expert's score.
        drawn: by task, the expert's score on each draw, `[D]` float64.
        higher_is_better: whether more of the metric is better.
    """

    draws: dict[str, Tensor]
    scores: dict[str, float]
    drawn: dict[str, Tensor]
    higher_is_better: bool

    @classmethod
    def of(cls, outcomes: Mapping[str, Outcome]) -> "_ExpertScores":
        generator, draws = torch.Generator().manual_seed(0), {}
        for task, outcome in outcomes.items():
            count = len(outcome.labels)
            draws[task] = torch.randint(count, (outcome.metric.draws, count), generator=generator)
        return cls(
            draws,
            {task: outcome.score for task, outcome in outcomes.items()},
            {task: outcome.scores_of_draws(draws[task]) for task, outcome in outcomes.items()},
            next(iter(outcomes.values())).metric.higher_is_better,
        )

    def normalised(self, outcomes: Mapping[str, Outcome]) -> float:
        """Mean over tasks of the score divided by the expert's; NaN if an expert's score is not above 0."""
        scores = {task: outcomes[task].score for task in self.scores}
        share = normalised(scores, self.scores, self.higher_is_better)
        return float("nan") if share is None else share

    def drawn_scores(self, outcomes: Mapping[str, Outcome]) -> dict[str, Tensor]:
        """By task, a model's score on each draw, `[D]` float64."""
        return {task: outcomes[task].scores_of_draws(draws) for task, draws in self.draws.items()}

    def normalised_draws(self, drawn: Mapping[str, Tensor]) -> Tensor:
        """`[D]` float64: `normalised` on each draw."""
        pairs = [(drawn[task], expert) for task, expert in self.drawn.items()]
        shares = [score / expert if self.higher_is_better else expert / score for score, expert in pairs]
        return torch.stack(shares).mean(0)


def interval_of_share(outcomes: Mapping[str, Outcome], expert_outcomes: Mapping[str, Outcome]) -> tuple[float, float]:
    """95 % interval of the share of the experts' scores that a model has, such as the base; NaN if it has none."""
    experts = _ExpertScores.of(expert_outcomes)
    return interval_of(experts.normalised_draws(experts.drawn_scores(outcomes)))


def summarise(
    methods: Mapping[str, MergeMethod],
    cells: Mapping[str, Mapping[int, Cell]],
    expert_outcomes: Mapping[str, Outcome],
) -> list[Row]:
    """Rows of the report, in the order of `methods`.

    A method whose router decides has a second row, in which the task of every test row is given.

    Args:
        methods: methods by label.
        cells: by label and seed.
        expert_outcomes: outcome of each task's expert on the same test rows.
    """
    experts = _ExpertScores.of(expert_outcomes)
    rows: list[Row] = []
    first: Optional[tuple[float, Tensor]] = None
    for label, method in methods.items():
        by_seed = cells[label]
        variants = {label: {seed: cell.outcomes for seed, cell in by_seed.items()}}
        if all(cell.oracle_outcomes for cell in by_seed.values()):
            variants[f"{label}, tasks given"] = {seed: cell.oracle_outcomes for seed, cell in by_seed.items()}
        for name, outcomes in variants.items():
            shares = {seed: experts.normalised(by_task) for seed, by_task in outcomes.items()}
            value = sum(shares.values()) / len(shares)
            drawn = [experts.drawn_scores(by_task) for by_task in outcomes.values()]
            draws = torch.stack([experts.normalised_draws(scores) for scores in drawn]).mean(0)
            first = first or (value, draws)
            rows.append(
                Row(
                    label=name,
                    method=describe_method(method),
                    normalised=value,
                    interval=interval_of(draws),
                    difference=value - first[0],
                    difference_interval=interval_of(draws - first[1]),
                    by_seed=shares,
                    task_intervals={
                        task: interval_of(torch.stack([scores[task] for scores in drawn]).mean(0)) for task in drawn[0]
                    },
                    **_scores(outcomes),
                    **_routes(outcomes),
                    **_costs(method, by_seed),
                )
            )
    return rows


def _scores(outcomes: Mapping[int, Mapping[str, Outcome]]) -> dict[str, Any]:
    tasks = next(iter(outcomes.values()))
    scores = {task: sum(by_task[task].score for by_task in outcomes.values()) / len(outcomes) for task in tasks}
    return {"tasks": scores, "average": sum(scores.values()) / len(scores)}


def _routes(outcomes: Mapping[int, Mapping[str, Outcome]]) -> dict[str, Any]:
    """Confusion of the router, mean over seeds; empty without a router that decided."""
    if not all(outcome.routed_to for by_task in outcomes.values() for outcome in by_task.values()):
        return {"routing": {}, "confusion": []}
    tasks = list(next(iter(outcomes.values())))
    confusion = [
        [sum(by_task[task].routed_share(taken) for by_task in outcomes.values()) / len(outcomes) for taken in tasks]
        for task in tasks
    ]
    return {"routing": {task: confusion[i][i] for i, task in enumerate(tasks)}, "confusion": confusion}


def _costs(method: MergeMethod, cells: Mapping[int, Cell]) -> dict[str, Any]:
    return {
        "alphas": {seed: cell.alpha for seed, cell in cells.items()} if method.tunable else {},
        "alpha_scores": {seed: cell.alpha_scores for seed, cell in cells.items() if cell.alpha_scores},
        "alpha_errors": {seed: cell.alpha_errors for seed, cell in cells.items() if cell.alpha_errors},
        "alpha_default": next(iter(cells.values())).alpha_default,
        "choosing": {
            seed: (cell.evaluations, cell.seconds.get("choosing", 0.0))
            for seed, cell in cells.items()
            if cell.evaluations
        },
        "seconds": sum(sum(cell.seconds.values()) for cell in cells.values()) / len(cells),
        "memory": max(cell.memory for cell in cells.values()),
        "size": max(cell.size for cell in cells.values()),
        "chosen": {seed: cell.chosen for seed, cell in cells.items() if cell.chosen},
    }
