"""Chooses the method and α of a merge: by labelled rows, by agreement with the experts on samples, or by default."""

from collections.abc import Callable, Iterable, Mapping
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
from .alpha import COARSE, FINE, LARGEST, LabelScore, TaskScore, search_alpha
from .expert_statistics import Inputs
from .gates import RefinedWeights
from .judging import Judge, TaskAgreement
from .spans import Span
from .updates import FactoredUpdates, MergedUpdates, WeightReport


ROUNDS = 2  # of the search by kind of weight


# Returns the best α of a score, from where the search starts and as far as it may go, and the scores by α.
Search = Callable[[Callable[[float], float], float, float], tuple[float, dict[float, float]]]


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


@dataclass(frozen=True)
class Chosen:
    """The chosen method and α, and the weights of the model that is written.

    Attributes:
        candidate: the method and its merged updates.
        alpha: scale of the updates.
        by_kind: other scales of some kinds of weights.
        weight: returns the weight of the merged model by canonical name.
        scores: score by α of the chosen method, where α was searched.
        by: what chose: `"labels"`, `"agreement"`, or `"default"` for what the caller named or is the default.
        note: one line for the user about the choice; empty by default.
        judge: measures agreement, if there are samples for it.
        rival: the mean of the updates, which the written model is never below in agreement, if methods are chosen.
        agreement: of the written model with every expert, by task; on one process alone until it is shared.
        scores_by_task: scores on the labelled rows, or by the caller's function, if these chose α.
        refined: the loss on the samples that are held back by step, if the model was refined.
        gated: the gates, if the model was refined.
    """

    candidate: Candidate
    alpha: float
    by_kind: Mapping[str, float]
    weight: Callable[[str], Tensor]
    scores: dict[float, float] = field(default_factory=dict)
    by: str = "default"
    note: str = ""
    judge: Optional[Judge] = None
    rival: Optional[Candidate] = None
    agreement: dict[str, TaskAgreement] = field(default_factory=dict)
    scores_by_task: dict[str, TaskScore] = field(default_factory=dict)
    refined: dict[int, float] = field(default_factory=dict)
    gated: Optional[RefinedWeights] = None

    @property
    def adapter(self) -> Optional[RefinedWeights]:
        """The gates, if they are not folded into the weights."""
        return None if self.gated is None or self.gated.folded else self.gated

    def core(self, name: str, span: Span) -> Tensor:
        """Return the update of a linear map that is written, in the basis of a span, `[s, d_in]` float64."""
        updates = self.candidate.updates
        assert isinstance(updates, FactoredUpdates)  # as in every merge that is written as one adapter
        core = updates.core(name) * updates.reports[name].scale(self.alpha, self.by_kind)
        if self.gated is None or name not in self.gated.factors:
            return core
        return core + span.basis.T @ self.gated.factors[name].update(self.gated.gates[name]).cpu().double()

    def warnings(self) -> list[str]:
        """Return warnings of tasks on which the base scores higher, or agrees more with the expert, and of all tasks
        together.
        """
        worse = [task for task, found in self.agreement.items() if not found.merged >= found.base]  # NaN, too
        warnings = [
            f"'{task}': the merged model scores less than its base: {score.metric} {score}."
            for task, score in self.scores_by_task.items()
            if score.below_base
        ]
        warnings += [f"'{task}': the merged model agrees less with the expert than the base does." for task in worse]
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
            if options.searches_alpha and (inputs.labelled or score_fn is not None):
                labels = LabelScore(plan, inputs.labelled, score_fn, accelerator, options)
                found = _by_labels(candidates, labels, options, judge, progress("Choosing alpha"))
            elif judge is not None and (options.searches_alpha or len(candidates) > 1):
                found = _by_agreement(candidates, judge, options)
            else:
                found = _Found(0, *_given_scale(candidates[0].method, options))
    found = gather(accelerator, found)[0]
    candidate = candidates[found.index]
    return Chosen(
        candidate,
        found.alpha,
        found.by_kind,
        partial(candidate.updates.weight, alpha=found.alpha, by_kind=found.by_kind),
        found.scores,
        found.by,
        found.note,
        judge,
        next((candidate for candidate in candidates if not candidate.method.tunable), None),
    )


@dataclass(frozen=True)
class _Found:
    """Index of a candidate, its scales, its score, the scores by α, what chose them, and a line for the user."""

    index: int
    alpha: float
    by_kind: dict[str, float] = field(default_factory=dict)
    score: float = -inf
    scores: dict[float, float] = field(default_factory=dict)
    by: str = "default"
    note: str = ""

    def same_as(self, other: "_Found") -> bool:
        """Return whether two choices differ by less than a coarse step of the search."""
        pairs = [(self.alpha, other.alpha), *((self.by_kind[k], other.by_kind[k]) for k in self.by_kind)]
        return self.index == other.index and all(abs(one - two) < COARSE / 2 for one, two in pairs)

    @property
    def scales(self) -> str:
        """The scales in words."""
        return f"alpha {self.alpha:g}" + "".join(f", {kind} {alpha:g}" for kind, alpha in self.by_kind.items())


def _given_scale(method: MergeMethod, options: MergeOptions) -> tuple[float, dict[str, float]]:
    """Return the α that a search starts from, or the only one, and those of kinds of weights."""
    default = method.default_alpha
    alpha = default if options.alpha in (None, "auto") or options.alpha_by_kind else options.alpha
    return alpha, {kind: default if a == "auto" else a for kind, a in options.alpha_by_kind.items()}


def _best_scales(
    index: int, candidate: Candidate, scorer: Judge | LabelScore, options: MergeOptions, search: Search, rival: bool
) -> _Found:
    """Return the best α of a candidate, or the best of one kind of weights after the other; a rival keeps its own."""
    alpha, by_kind = (candidate.method.default_alpha, {}) if rival else _given_scale(candidate.method, options)
    scores: dict[float, float] = {}
    largest = candidate.method.largest_alpha
    if not rival and options.alpha in (None, "auto"):
        alpha, scores = search(lambda alpha: scorer.score(candidate.updates, alpha, by_kind), alpha, largest)
    for kind in [kind for kind in by_kind if options.alpha_by_kind[kind] == "auto"] * ROUNDS:

        def score_of_kind(own: float, kind: str = kind) -> float:
            return scorer.score(candidate.updates, alpha, {**by_kind, kind: own})

        by_kind[kind], _ = search(score_of_kind, by_kind[kind], largest)
    score = scores[alpha] if scores else scorer.score(candidate.updates, alpha, by_kind)
    return _Found(index, alpha, by_kind, score, scores)


def _all_scales(
    candidates: list[Candidate], scorer: Judge | LabelScore, options: MergeOptions, search: Search
) -> list[_Found]:
    """Return the best scales of every candidate. Beside others, a method without α is a rival."""
    return [
        _best_scales(i, candidate, scorer, options, search, len(candidates) > 1 and not candidate.method.tunable)
        for i, candidate in enumerate(candidates)
    ]


def _by_agreement(candidates: list[Candidate], judge: Judge, options: MergeOptions) -> _Found:
    """Choose the candidate, and its α unless that is given, whose model agrees most with the experts."""
    found = _all_scales(candidates, judge, options, climb_alpha)
    values = ", ".join(f"{candidates[f.index].method.name} {f.score:.3f} at {f.scales}" for f in found)
    best = max(found, key=lambda found: found.score)
    return replace(best, by="agreement", note=f"by agreement with the experts, without labels: {values}")


def _by_labels(
    candidates: list[Candidate],
    labels: LabelScore,
    options: MergeOptions,
    judge: Optional[Judge],
    progress: Callable[[Iterable], Iterable],
) -> _Found:
    """Choose the candidate and its α with the best score on labelled rows, or by the caller's function."""

    def search(score: Callable[[float], float], start: float, largest: float) -> tuple[float, dict[float, float]]:
        return search_alpha(score, progress, default=start, rows=labels.rows, largest=largest)

    best = max(_all_scales(candidates, labels, options, search), key=lambda found: found.score)
    note = "by " + ("labelled rows" if labels.score_fn is None else "the given function")
    if judge is not None:
        other = _by_agreement(candidates, judge, options)
        same, chosen = other.same_as(best), f"{candidates[other.index].method.name} at {other.scales}"
        note += "; agreement with the experts chooses the same" if same else f"; agreement would choose {chosen}"
    return replace(best, by="labels", note=note)
