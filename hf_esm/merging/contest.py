"""The best of several merges: candidates are halved while the rows that they are scored on grow."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, inf, isnan
from typing import Any

import torch
from torch import Tensor


COARSE, FINE, LARGEST = 0.3, 0.1, 3.0  # steps of α, and how far it is searched
SHARE = 0.25  # of the rows, in the first round
SCALES = (0.6, 1.0)  # of a method's default α, in the first round
FINALISTS = 2
FEWEST = 8  # rows of a task in the first round, if not all rows are taken
DRAWS = 1000  # of the bootstrap
ERROR_DRAWS = 100  # for the standard error of one score


@dataclass(frozen=True)
class Scored:
    """A model's score on the first rows of every task; higher is better.

    Attributes:
        rows: number of rows by task; empty if the score is not one of rows.
        of_draws: returns the mean score over all tasks on each draw of rows, `[D]` float64, higher is better, from
            indices by task, `[D, N]` int64.
        higher_is_better: False if `of_draws` negates errors, such as perplexity.
        measured: what the scorer measured, by task, if that serves later.
        error_draws: number of draws for `error`; fewer for scores that take long.
    """

    rows: Mapping[str, int]
    of_draws: Callable[[Mapping[str, Tensor]], Tensor]
    higher_is_better: bool = True
    measured: Mapping[str, Any] = field(default_factory=dict)
    error_draws: int = ERROR_DRAWS

    @cached_property
    def score(self) -> float:
        """The mean score over all tasks; NaN counts as the worst."""
        return self.on(self.rows)

    @property
    def error(self) -> float:
        """The standard error of the score, over draws of its rows; 0 if no two draws have a score."""
        known = self.of_draws(self._draws(self.error_draws))
        known = known[known.isfinite()]
        return float(known.std()) if len(known) > 1 else 0.0

    def _draws(self, count: int) -> dict[str, Tensor]:
        """Return indices of rows by task, `[count, N]` int64, the same for every model."""
        generator = torch.Generator().manual_seed(0)
        return {t: torch.randint(max(n, 1), (count, n), generator=generator) for t, n in self.rows.items()}

    def on(self, rows: Mapping[str, int]) -> float:
        """Return the score on the first rows of every task."""
        value = float(self.of_draws({task: torch.arange(count)[None] for task, count in rows.items()}))
        return -inf if isnan(value) else value

    def differences(self, best: "Scored") -> Tensor:
        """Return how far the score is behind that of another model on draws of the same rows, `[D]` float64."""
        draws = self._draws(DRAWS)
        differences = best.of_draws(draws) - self.of_draws(draws)
        return differences[differences.isfinite()]

    def behind(self, best: "Scored") -> tuple[float, float, float]:
        """Return how far the score is behind that of another model on the same rows, and the 95 % interval of that.

        Where the score is not one of rows, the interval is the number.
        """
        known = self.differences(best)
        low, high = known.quantile(torch.tensor([0.025, 0.975]).double()).tolist() if len(known) else (inf, inf)
        return best.on(self.rows) - self.score, low, high

    def leads(self, other: "Scored") -> bool:
        """Return whether the score is higher than that of another model on the same rows."""
        return self.score > other.on(self.rows)

    def as_good_as(self, best: "Scored", errors: float = 1.0) -> bool:
        """Return whether the score is at most so many standard errors behind that of another on the same rows."""
        known = self.differences(best)
        error = float(known.std()) if len(known) > 1 else 0.0
        return self.score == best.on(self.rows) or best.on(self.rows) - self.score <= errors * error


STANDING_COLUMNS = ("candidate", "at", "score", "rows", "behind (95 %)")


@dataclass(frozen=True)
class Standing:
    """One candidate's place in the choice.

    Attributes:
        method: name of the method; `"base"` for the base itself.
        scales: α in words; empty for a method without α.
        score: mean score over all tasks: the share of the expert's answers or of its gain over the base, or the score
            on labelled rows.
        rows: number of rows that the score is of, of all tasks; 0 if it is not one of rows.
        behind: how far the score is behind that of the chosen model on the same rows.
        low, high: 95 % interval of `behind`, over draws of rows.
    """

    method: str
    scales: str
    score: float
    rows: int
    behind: float
    low: float
    high: float

    @classmethod
    def of(cls, method: str, scales: str, scored: Scored, best: Scored) -> "Standing":
        """Return the place of a candidate, where `best` is the score of the chosen model on all rows."""
        score = scored.score if scored.higher_is_better else -scored.score
        return cls(method, scales, score, sum(scored.rows.values()), *scored.behind(best))

    @property
    def cells(self) -> tuple[str, ...]:
        """The place as cells of a table; see `STANDING_COLUMNS`."""
        behind = f"{self.behind:.3f}" + (f" ({self.low:.3f} to {self.high:.3f})" if self.rows else "")
        behind = "" if self.behind == self.high == 0 else behind  # the best one itself
        return self.method, self.scales, f"{self.score:.3f}", str(self.rows or ""), behind


def first_rows(rows: Mapping[str, int], share: float) -> dict[str, int]:
    """Return the number of rows of each task in the first share of them."""
    return {task: ceil(share * count) for task, count in rows.items()}


def first_share(rows: Mapping[str, int]) -> float:
    """Return the share of the rows that the first round takes: a quarter, or all if they are few or there are none."""
    return SHARE if rows and min(rows.values()) * SHARE >= FEWEST else 1.0


def first_alphas(default: float, largest: float) -> list[float]:
    """Return the values of α to try first: the method's default, and less of it."""
    scaled = (round(min(max(scale * default, FINE), largest), 1) for scale in SCALES)
    return list(dict.fromkeys([default, *scaled]))


def finalists(scored: Sequence[Scored]) -> list[int]:
    """Return the indices of the two candidates that are scored on all rows: the best ones, of which the first
    candidate is one if it is at most two standard errors behind the best, as one of few rows may be by chance.
    """
    order = sorted(range(len(scored)), key=lambda i: -scored[i].score)
    kept = [0] if scored[0].as_good_as(scored[order[0]], errors=2.0) else []
    return sorted([*kept, *(i for i in order if i not in kept)][:FINALISTS])


def winner_of(scored: Sequence[Scored]) -> int:
    """Return the index of the first candidate that is as good as the best one, so that a candidate is left for a later
    one only if the rows tell the difference.
    """
    best = max(scored, key=lambda candidate: candidate.score)
    return next(i for i, candidate in enumerate(scored) if candidate.as_good_as(best))


def climb_alpha(
    score: Callable[[float], float], start: float, largest: float = LARGEST
) -> tuple[float, dict[float, float]]:
    """Search the α in 0.1, 0.2, …, `largest` that a smooth score is highest at: uphill from `start` by steps of 0.3,
    then by steps of 0.1. NaN counts as the worst score.

    Returns α, and the scores by α.
    """
    scores: dict[float, float] = {}

    def at(alpha: float) -> float:
        alpha = round(alpha, 1)
        if not FINE <= alpha <= largest:
            return -inf
        if alpha not in scores:
            value = score(alpha)
            scores[alpha] = -inf if isnan(value) else value
        return scores[alpha]

    best = round(min(max(start, FINE), largest), 1)
    for step in (COARSE, FINE):
        while True:
            nearest = max((best, best - step, best + step), key=at)
            if nearest == best:
                break
            best = round(nearest, 1)
    return best, dict(sorted(scores.items()))


def search_nearby(score: Callable[[float], float], start: float, largest: float) -> tuple[float, dict[float, float]]:
    """Search the α that a score is highest at, uphill from a good guess by steps of 0.2; see `climb_alpha`."""
    scores: dict[float, float] = {}

    def at(alpha: float) -> float:
        if alpha not in scores:
            scores[alpha] = score(alpha) if FINE <= alpha <= largest else -inf
        return scores[alpha]

    best, nearest = start, None
    while nearest != best:
        nearest = best
        best = max((best, round(best - 2 * FINE, 2), round(best + 2 * FINE, 2)), key=at)
    return best, {alpha: value for alpha, value in sorted(scores.items()) if FINE <= alpha <= largest}


def nearest_as_good(scored: Mapping[float, Scored], default: float) -> float:
    """Return the α nearest to the default that is as good as the best one."""
    best = max(scored.values(), key=lambda one: one.score)
    return min((alpha for alpha, one in scored.items() if one.as_good_as(best)), key=lambda a: (abs(a - default), a))
