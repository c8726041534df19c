"""Chooses the method and α of a merge: by labelled rows, by agreement with the experts on samples, or by default."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf, isnan
from typing import Any, Optional

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from ..architecture import writes
from ..methods import EssentialMerge, MergeMethod, RegMean
from ..planning import MergeOptions, MergePlan
from ..utils import gather, together
from .alpha import choose_alpha
from .expert_statistics import Inputs
from .gates import RefinedWeights
from .judging import Judge, TaskAgreement
from .updates import MergedUpdates, WeightReport


STEP, FINE, LARGEST = 0.3, 0.1, 3.0  # of the search of α


def default_methods(model: PreTrainedModel) -> list[MergeMethod]:
    """Return the methods that `method="auto"` chooses from, the best guess first; the base tells the kind of model.

    Updates of classifiers add up, so that ESM is best; those of language models are large and contradict each other,
    so that a least-squares fit may be better.
    """
    return [RegMean(), EssentialMerge()] if writes(model) else [EssentialMerge()]


@dataclass(frozen=True)
class Candidate:
    """The experts merged by one method, before α.

    Attributes:
        method: the method.
        updates: the merged updates.
    """

    method: MergeMethod
    updates: MergedUpdates

    @property
    def reports(self) -> dict[str, WeightReport]:
        return self.updates.reports


def climb_alpha(score: Callable[[float], float], start: float) -> tuple[float, dict[float, float]]:
    """Search the α in 0.1, 0.2, …, 3.0 that a smooth score is highest at: uphill from `start` by steps of 0.3, then by
    steps of 0.1. NaN counts as the worst score.

    Returns α, and the scores by α.
    """
    scores: dict[float, float] = {}

    def at(alpha: float) -> float:
        alpha = round(alpha, 1)
        if not FINE <= alpha <= LARGEST:
            return -inf
        if alpha not in scores:
            value = score(alpha)
            scores[alpha] = -inf if isnan(value) else value
        return scores[alpha]

    best = round(min(max(start, FINE), LARGEST), 1)
    for step in (STEP, FINE):
        while True:
            nearest = max((best, best - step, best + step), key=at)
            if nearest == best:
                break
            best = round(nearest, 1)
    return best, dict(sorted(scores.items()))


@dataclass(frozen=True)
class Chosen:
    """The chosen method and α, and the weights of the model that is written.

    Attributes:
        candidate: the method and its merged updates.
        alpha: scale of the updates.
        weight: returns the weight of the merged model by canonical name.
        scores: score by α of the chosen method, where α was searched.
        by: what chose: `"labels"`, `"agreement"`, or `"default"` for what the caller named or is the default.
        note: one line for the user about the choice; empty by default.
        judge: measures agreement, if there are samples for it.
        rival: the mean of the updates, which the written model is never below in agreement, if methods are chosen.
        agreement: of the written model with every expert, by task; on one process alone until it is shared.
        refined: the loss on the samples that are held back by step, if the model was refined.
        adapter: the gates, if they are not folded into the weights.
    """

    candidate: Candidate
    alpha: float
    weight: Callable[[str], Tensor]
    scores: dict[float, float] = field(default_factory=dict)
    by: str = "default"
    note: str = ""
    judge: Optional[Judge] = None
    rival: Optional[Candidate] = None
    agreement: dict[str, TaskAgreement] = field(default_factory=dict)
    refined: dict[int, float] = field(default_factory=dict)
    adapter: Optional[RefinedWeights] = None

    def warnings(self) -> list[str]:
        """Return warnings of tasks, and of all tasks together, on which the base agrees more with the experts."""
        worse = [task for task, found in self.agreement.items() if not found.merged >= found.base]  # NaN, too
        warnings = [f"'{task}': the merged model agrees less with the expert than the base does." for task in worse]
        if worse and not sum(found.merged - found.base for found in self.agreement.values()) >= 0:
            models = "every merged model does; the best of these" if self.rival else "the merged model does, which"
            warnings.append(
                f"The base agrees more with the experts than {models} is written. Use the experts themselves, or "
                "route them: `method='esm++'`."
            )
        return warnings


def choose(
    plan: MergePlan,
    candidates: list[Candidate],
    inputs: Inputs,
    score_fn: Any,
    options: MergeOptions,
    accelerator: Accelerator,
    progress: Callable[[str], Callable[[Iterable], Iterable]],
) -> Chosen:
    """Return the method and α: by labels, if α is searched and there are any, else by agreement, else by default.

    The main process decides. Every process has a judge, if there are answers.
    """
    judge: Optional[Judge] = None
    found: Optional[_Found] = None
    with together(accelerator):
        if inputs.answers:
            judge = Judge(plan, inputs.answers, accelerator, options.batch_size)
        if accelerator.is_main_process:
            if options.alpha == "auto" and (inputs.labelled or score_fn is not None):
                found = _by_labels(
                    plan,
                    candidates,
                    inputs,
                    score_fn,
                    options,
                    accelerator=accelerator,
                    progress=progress,
                    judge=judge,
                )
            elif judge is not None and (options.alpha == "auto" or len(candidates) > 1):
                found = _by_agreement(candidates, judge, options.alpha)
            else:
                given = options.alpha not in (None, "auto")
                found = _Found(0, float(options.alpha) if given else candidates[0].method.default_alpha)
    found = gather(accelerator, found)[0]
    candidate = candidates[found.index]
    return Chosen(
        candidate,
        found.alpha,
        partial(candidate.updates.weight, alpha=found.alpha),
        found.scores,
        found.by,
        found.note,
        judge,
        next((candidate for candidate in candidates if not candidate.method.tunable), None),
    )


@dataclass(frozen=True)
class _Found:
    """Index of a candidate, its α, the scores by α, what chose them, and a line for the user."""

    index: int
    alpha: float
    scores: dict[float, float] = field(default_factory=dict)
    by: str = "default"
    note: str = ""


def _by_agreement(candidates: list[Candidate], judge: Judge, alpha: Optional[float | str]) -> _Found:
    """Choose the candidate, and its α unless that is given, whose model agrees most with the experts."""
    found = []
    for candidate in candidates:
        score, tunable = partial(judge.score, candidate.updates), candidate.method.tunable
        if tunable and alpha in (None, "auto"):
            found.append(climb_alpha(score, candidate.method.default_alpha))
        else:
            fixed = float(alpha) if tunable else candidate.method.default_alpha
            found.append((fixed, {fixed: score(fixed)}))
    best = max(range(len(candidates)), key=lambda i: found[i][1][found[i][0]])
    values = ", ".join(
        f"{candidate.method.name} {scores[chosen]:.3f} at alpha {chosen:g}"
        for candidate, (chosen, scores) in zip(candidates, found, strict=True)
    )
    return _Found(best, *found[best], "agreement", f"by agreement with the experts, without labels: {values}")


def _by_labels(
    plan: MergePlan,
    candidates: list[Candidate],
    inputs: Inputs,
    score_fn: Any,
    options: MergeOptions,
    *,
    accelerator: Accelerator,
    progress: Callable[[str], Callable[[Iterable], Iterable]],
    judge: Optional[Judge],
) -> _Found:
    """Choose the candidate and its α with the best score on labelled rows, or by the caller's function."""
    found = []
    for candidate in (candidate for candidate in candidates if candidate.method.tunable):
        found.append(
            choose_alpha(
                replace(plan, method=candidate.method),
                candidate.updates,
                inputs.labelled,
                score_fn,
                accelerator,
                options,
                progress("Choosing alpha"),
            )
        )
    best = max(range(len(found)), key=lambda i: found[i][1][found[i][0]])
    note = "by " + ("labelled rows" if score_fn is None else "the given function")
    if judge is not None:
        other = _by_agreement(candidates, judge, None)
        same = other.index == best and abs(other.alpha - found[best][0]) < 0.15
        chosen = f"{candidates[other.index].method.name} at alpha {other.alpha:g}"
        note += "; agreement with the experts chooses the same" if same else f"; agreement would choose {chosen}"
    return _Found(best, *found[best], "labels", note)
