"""The best of several merges: candidates are halved while the rows that they are scored on grow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil, inf, isnan
from typing import Optional

import torch
from torch import Tensor


FINE = 0.1  # the step of α
SHARES = (0.25, 0.5)  # of the rows, in the rounds before the last
SCALES = (0.5, 1.0, 1.5)  # of a method's default α, in the first round
FINALISTS = 2
FEWEST = 8  # rows of a task in the first round
DRAWS = 1000  # of the bootstrap


@dataclass(frozen=True)
class Scored:
    """A model's score on the first rows of every task; higher is better.

    Attributes:
        rows: number of rows by task; empty if the score is not one of rows.
        of_draws: returns the mean score over all tasks on each draw of rows, `[D]` float64, higher is better, from
            indices by task, `[D, N]` int64.
        higher_is_better: False if `of_draws` negates errors, such as perplexity.
    """

    rows: Mapping[str, int]
    of_draws: Callable[[Mapping[str, Tensor]], Tensor]
    higher_is_better: bool = True

    @cached_property
    def score(self) -> float:
        """The mean score over all tasks; NaN counts as the worst."""
        return self.on(self.rows)

    def on(self, rows: Mapping[str, int]) -> float:
        """Return the score on the first rows of every task."""
        value = float(self.of_draws({task: torch.arange(count)[None] for task, count in rows.items()}))
        return -inf if isnan(value) else value

    def behind(self, best: "Scored") -> tuple[float, float, float]:
        """Return how far the score is behind that of another model on the same rows, and the 95 % interval of that.

        Both are scored on the same draws of rows. Where the score is not one of rows, the interval is the number.
        """
        generator = torch.Generator().manual_seed(0)
        draws = {t: torch.randint(max(n, 1), (DRAWS, n), generator=generator) for t, n in self.rows.items()}
        differences = best.of_draws(draws) - self.of_draws(draws)
        known = differences[differences.isfinite()]
        low, high = known.quantile(torch.tensor([0.025, 0.975]).double()).tolist() if len(known) else (inf, inf)
        return best.on(self.rows) - self.score, low, high


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


@dataclass
class Entrant:
    """A candidate in the rounds before the last.

    Attributes:
        index: of the candidate.
        alphas: values of α to try in the next round.
        alpha: the best of those that were tried.
        scored: the score at `alpha` in the last round that the candidate took part in; None before the first.
    """

    index: int
    alphas: list[float]
    alpha: float
    scored: Optional[Scored] = None


def first_alphas(default: float, largest: float) -> list[float]:
    """Return the values of α to try first: the method's default, and less and more of it."""
    scaled = (round(min(max(scale * default, FINE), largest), 1) for scale in SCALES)
    return list(dict.fromkeys([default, *scaled]))


def halve(
    entrants: list[Entrant], score: Callable[[int, float, float], Scored], rows: Mapping[str, int]
) -> list[Entrant]:
    """Score all candidates at several α on a quarter of the rows, the better half of them on half of the rows, and
    return the best two, or all if there are fewer, with the α that was best for them.

    Without rows, or with fewer than eight of a task in a quarter, nothing is scored and all are returned.

    Args:
        entrants: changed in place: `alpha` and `scored` are those of the last round of each.
        score: returns the score of a candidate by its index, at an α, on the first share of every task's rows.
        rows: number of rows by task.
    """
    left = entrants
    if len(left) < 2 or not rows or min(rows.values()) * SHARES[0] < FEWEST:
        return left
    for share in SHARES:
        for entrant in left:
            found = {alpha: score(entrant.index, alpha, share) for alpha in entrant.alphas}
            entrant.alpha = max(found, key=lambda alpha: found[alpha].score)
            entrant.scored, entrant.alphas = found[entrant.alpha], [entrant.alpha]
        left = sorted(left, key=lambda entrant: -entrant.scored.score)[: max(ceil(len(left) / 2), FINALISTS)]
        if len(left) <= FINALISTS:
            break
    return left[:FINALISTS]
