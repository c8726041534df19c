"""Chooses the method and α of a merge: by labelled rows, by agreement with the experts on samples, or by default."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from typing import Any, Optional

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from ..architecture import writes
from ..errors import HfEsmError
from ..methods import AutoMerge, EssentialMerge, MergeMethod, RegMean, resolve_method
from ..metrics import Agreement
from ..planning import MergeOptions, MergePlan
from ..utils import gather, together
from .alpha import LabelScore, TaskScore, search_alpha
from .contest import (
    COARSE,
    Scored,
    Standing,
    climb_alpha,
    finalists,
    first_alphas,
    first_share,
    nearest_as_good,
    search_nearby,
    winner_of,
)
from .expert_statistics import Inputs
from .gates import RefinedWeights
from .judging import Judge, TaskAgreement
from .spans import Span
from .updates import FactoredUpdates, MergedUpdates, WeightReport


ROUNDS = 2  # of the search by kind of weight


# Returns the best α of a score, from where the search starts and as far as it may go, and the scores by α.
Search = Callable[[Callable[[float], float], float, float], tuple[float, dict[float, float]]]


def methods_to_choose_from(named: MergeMethod, model: PreTrainedModel, labelled: bool) -> list[MergeMethod]:
    """Return the methods that `"auto"` chooses from, the best guess first.

    Updates of classifiers add up, so that ESM is best; other methods are tried where labelled rows can tell. Updates
    of language models are large and contradict each other, so that a least-squares fit may be better.

    Args:
        named: the method `"auto"`, which may name the others, or any other for what is chosen by default.
        model: the base, which tells the kind of model.
        labelled: whether there are labelled rows, or a function that scores models.

    Raises:
        HfEsmError: names the method that cannot be one of several.
    """
    if not (isinstance(named, AutoMerge) and named.methods):
        if writes(model):
            return [RegMean(), EssentialMerge()]
        return [EssentialMerge(), *map(resolve_method, ("tsv-m", "iso-cts"))] if labelled else [EssentialMerge()]
    methods = [resolve_method(method) for method in named.methods]
    for method in methods:
        if method.routes or method.needs_samples or method.chooses:
            does = "writes experts" if method.routes else "learns from samples" if method.needs_samples else "chooses"
            raise HfEsmError(f"Method 'auto': {method.name!r} {does}, so it is not one of several. Leave it out.")
    return methods


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

    def without_updates(self) -> "Candidate":
        """Return the same with α = 0 for every weight: the base."""
        return replace(self, updates=self.updates.scaled_by(0.0))


@dataclass(frozen=True)
class Chosen:
    """The chosen method and α, and the weights of the model that is written.

    Attributes:
        candidate: the method and its merged updates.
        alpha: scale of the updates.
        by_kind: other scales of some kinds of weights.
        weight: returns the weight of the merged model by canonical name.
        scores: score by α of the chosen method, where α was searched.
        within_error: whether α is the nearest to the default within a standard error of the best, and not the best.
        evaluations: number of merged models that were scored.
        errors: standard error of each of `scores`; empty if they are not scores of rows.
        by: what chose: `"labels"`, `"agreement"`, or `"default"` for what the caller named or is the default.
        note: one line for the user about the choice; empty by default.
        judge: measures agreement, if there are samples for it.
        rival: the mean of the updates, which the written model is never below in agreement, if methods are chosen.
        agreement: of the written model with every expert, by task; on one process alone until it is shared.
        scores_by_task: scores on the labelled rows, or by the caller's function, if these chose α.
        refined: the loss on the samples that are held back by step, if the model was refined.
        gated: the gates, if the model was refined.
        standings: the places of all candidates, the best one first, if methods were chosen.
        is_base: whether the base scores higher than every candidate, so that its weights are written.
        measured: agreement of the chosen model on all samples, on the main process, if agreement chose it.
    """

    candidate: Candidate
    alpha: float
    by_kind: Mapping[str, float]
    weight: Callable[[str], Tensor]
    scores: dict[float, float] = field(default_factory=dict)
    errors: dict[float, float] = field(default_factory=dict)
    by: str = "default"
    note: str = ""
    judge: Optional[Judge] = None
    rival: Optional[Candidate] = None
    agreement: dict[str, TaskAgreement] = field(default_factory=dict)
    scores_by_task: dict[str, TaskScore] = field(default_factory=dict)
    refined: dict[int, float] = field(default_factory=dict)
    gated: Optional[RefinedWeights] = None
    standings: list[Standing] = field(default_factory=list)
    is_base: bool = False
    measured: Mapping[str, Agreement] = field(default_factory=dict)
    within_error: bool = False
    evaluations: int = 0

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
        if self.is_base:
            what = "and the weights were then refined" if self.refined else "so its weights are written, with alpha 0"
            warnings.append(
                f"The base scores higher than every merged model, {what}. Use the experts themselves, or route them: "
                "`method='esm++'`."
            )
        elif worse and not sum(found.merged - found.base for found in self.agreement.values()) >= 0:
            warnings.append(
                "The base agrees more with the experts than the merged model does, which is written. Use the experts "
                "themselves, or route them: `method='esm++'`."
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
    """Return the method and α: by labels, if anything is searched and there are any, else by agreement or default.

    Where methods are chosen, the model is never worse than the mean of the updates or than the base on the rows that
    chose it. The main process decides. Every process has a judge, if there are answers.
    """
    judge: Optional[Judge] = None
    labels: Optional[LabelScore] = None
    found: Optional[_Found] = None
    searched = options.searches_alpha or len(candidates) > 1
    with together(accelerator):
        if inputs.answers:
            judge = Judge(plan, inputs.answers, accelerator, options.batch_size)
        if accelerator.is_main_process:
            if searched and (inputs.labelled or score_fn is not None):
                labels = LabelScore(plan, inputs.labelled, score_fn, accelerator, options)
                found = _by_labels(candidates, labels, options, judge, progress("Choosing"))
            elif judge is not None and searched:
                found = _by_agreement(candidates, judge, options)
            else:
                found = _Found(0, *given_scale(candidates[0].method, options))
    measured = found.scored.measured if found is not None and found.scored and found.by == "agreement" else {}
    evaluations = sum(scorer.evaluations for scorer in (labels, judge) if scorer is not None)
    found, evaluations = gather(accelerator, (found and replace(found, scored=None), evaluations))[0]
    candidate = candidates[found.index]
    if found.is_base:
        candidate, found = candidate.without_updates(), replace(found, alpha=0.0, by_kind={})
    return Chosen(
        candidate,
        found.alpha,
        found.by_kind,
        partial(candidate.updates.weight, alpha=found.alpha, by_kind=found.by_kind),
        found.scores,
        found.errors,
        found.by,
        found.note,
        judge,
        next((candidate for candidate in candidates if not candidate.method.tunable), None),
        standings=found.standings,
        is_base=found.is_base,
        measured={} if found.is_base else measured,
        within_error=found.within_error,
        evaluations=evaluations,
    )


@dataclass(frozen=True)
class _Found:
    """What was found to be best.

    Attributes:
        index: of the candidate.
        alpha, by_kind: its scales.
        scored: its score on all rows, if it was measured.
        scores, errors: the scores by α, and their standard errors.
        by: what chose; see `Chosen`.
        note: a line for the user.
        standings: the places of all candidates, if methods are chosen, the best one first.
        is_base: whether the base is better than every candidate.
        within_error: see `Chosen`.
    """

    index: int
    alpha: float
    by_kind: dict[str, float] = field(default_factory=dict)
    scored: Optional[Scored] = None
    scores: dict[float, float] = field(default_factory=dict)
    errors: dict[float, float] = field(default_factory=dict)
    by: str = "default"
    note: str = ""
    standings: list[Standing] = field(default_factory=list)
    is_base: bool = False
    within_error: bool = False

    def same_as(self, other: "_Found") -> bool:
        """Return whether two choices differ by less than a coarse step of the search."""
        pairs = [(self.alpha, other.alpha), *((self.by_kind[k], other.by_kind[k]) for k in self.by_kind)]
        same = self.index == other.index and self.is_base == other.is_base
        return same and all(abs(one - two) < COARSE / 2 for one, two in pairs)

    @property
    def scales(self) -> str:
        """The scales in words."""
        return f"alpha {self.alpha:g}" + "".join(f", {kind} {alpha:g}" for kind, alpha in self.by_kind.items())


def given_scale(method: MergeMethod, options: MergeOptions) -> tuple[float, dict[str, float]]:
    """Return the α that a search starts from, or the only one, and those of kinds of weights."""
    default = method.default_alpha
    alpha = default if options.alpha in (None, "auto") or options.alpha_by_kind else options.alpha
    return alpha, {kind: default if a == "auto" else a for kind, a in options.alpha_by_kind.items()}


@dataclass(frozen=True)
class _Contest:
    """The choice among candidates on the rows of one scorer.

    Attributes:
        candidates: the merges, the best guess first; beside others, one without α is a rival that is measured only.
        scorer: scores models.
        options: options of the merge.
        search: of α on all rows.
    """

    candidates: list[Candidate]
    scorer: Judge | LabelScore
    options: MergeOptions
    search: Search

    def run(self) -> _Found:
        """Return the best candidate at its best scales, with the places of all if there are several.

        All are scored at several α on a quarter of the rows; the best two at their best α on all rows; α of the best
        one is then searched. A candidate is left for a later one, and the default α for another, only if the rows tell
        the difference.
        """
        candidates = self.candidates
        if len(candidates) == 1:
            return self._best_scales(_Found(0, *given_scale(candidates[0].method, self.options)))
        share = first_share(self.scorer.rows)
        first = [self._first(i, share) for i in range(len(candidates))]
        base = self.scorer.base_scored(share)
        tunable = [i for i, candidate in enumerate(candidates) if candidate.method.tunable]
        chosen = [tunable[i] for i in finalists([first[i].scored for i in tunable])]
        final = [first[i] if share == 1 else self._measured(first[i]) for i in chosen]
        best = self._best_scales(final[winner_of([found.scored for found in final])])
        others = [f for f in (*final, *(f for f in first if f.index not in chosen)) if f.index != best.index]
        for i, rival in enumerate(others):
            if rival.index not in tunable and rival.scored.leads(best.scored):
                others[i] = rival = self._measured(rival)
                if rival.scored.leads(best.scored):
                    others[i], best = best, rival
        if base.leads(best.scored):
            base = self.scorer.base_scored()
        is_base, names = base.leads(best.scored), [candidate.method for candidate in candidates]
        places = [(names[f.index].name, f.scales if names[f.index].tunable else "", f.scored) for f in (best, *others)]
        winner = base if is_base else best.scored
        standings = [Standing.of(*place, winner) for place in (*places, ("base", "", base))]
        standings.sort(key=lambda place: (place.behind != 0, -place.rows, place.behind))
        return replace(best, standings=standings, is_base=is_base)

    def score(self, found: _Found, share: float = 1.0) -> Scored:
        """Return the score of a candidate at its scales on the first share of every task's rows."""
        updates = self.candidates[found.index].updates
        return self.scorer.scored(partial(updates.weight, alpha=found.alpha, by_kind=found.by_kind), share)

    def _measured(self, found: _Found, share: float = 1.0) -> _Found:
        return replace(found, scored=self.score(found, share))

    def _first(self, index: int, share: float) -> _Found:
        """Return the best α of a few for one candidate, on the first share of the rows."""
        method = self.candidates[index].method
        alpha, by_kind = given_scale(method, self.options)
        if not method.tunable:
            return self._measured(_Found(index, method.default_alpha), share)
        alphas = first_alphas(alpha, method.largest_alpha) if self.options.alpha in (None, "auto") else [alpha]
        tried = [self._measured(_Found(index, alpha, by_kind), share) for alpha in alphas]
        return max(tried, key=lambda found: found.scored.score)

    def _best_scales(self, found: _Found) -> _Found:
        """Return the best α of a candidate on all rows, or the best of one kind of weights after the other."""
        options, known = self.options, {found.alpha: found.scored} if found.scored else {}
        method = self.candidates[found.index].method
        alpha, by_kind = found.alpha, dict(found.by_kind)
        scores: dict[float, float] = {}

        def number(alpha: float) -> float:
            if alpha not in known:
                known[alpha] = self.score(replace(found, alpha=alpha))
            return known[alpha].score

        if options.alpha in (None, "auto"):
            alpha, scores = self.search(number, alpha, method.largest_alpha)
            if len(self.candidates) > 1:
                alpha = nearest_as_good({alpha: known[alpha] for alpha in scores}, method.default_alpha)
        for kind in [kind for kind in by_kind if options.alpha_by_kind[kind] == "auto"] * ROUNDS:

            def score_of_kind(own: float, kind: str = kind) -> float:
                return self.score(replace(found, alpha=alpha, by_kind={**by_kind, kind: own})).score

            by_kind[kind], _ = self.search(score_of_kind, by_kind[kind], method.largest_alpha)
        errors = {alpha: known[alpha].error for alpha in scores if known[alpha].rows}
        scored = None if by_kind else known.get(alpha)
        best = replace(found, alpha=alpha, by_kind=by_kind, scores=scores, errors=errors, scored=scored)
        return best if best.scored else self._measured(best)


def _by_agreement(candidates: list[Candidate], judge: Judge, options: MergeOptions) -> _Found:
    """Choose the candidate, and its α unless that is given, whose model agrees most with the experts."""
    found = _Contest(candidates, judge, options, climb_alpha if len(candidates) == 1 else search_nearby).run()
    note = f"by agreement with the experts, without labels{_why(candidates, found)}"
    return replace(found, by="agreement", note=note, within_error=len(candidates) > 1)


def _why(candidates: list[Candidate], found: _Found) -> str:
    """Return the words that say how good the best candidate is, and how far the next one is behind."""
    if not found.standings:
        return f": {candidates[found.index].method.name} {found.scored.score:.3f} at {found.scales}"
    first, second = found.standings[:2]  # of which the second may be the mean or the base
    words = f": {first.method} {first.score:.3f}" + (f" at {first.scales}" if first.scales else "")
    interval = f" ({second.low:.3f} to {second.high:.3f})" if second.rows else ""
    return f"{words}; {second.method} is {second.behind:.3f} behind{interval}"


def _by_labels(
    candidates: list[Candidate],
    labels: LabelScore,
    options: MergeOptions,
    judge: Optional[Judge],
    progress: Callable[[Iterable], Iterable],
) -> _Found:
    """Choose the candidate and its α with the best score on labelled rows, or by the caller's function."""

    def search(score: Callable[[float], float], start: float, largest: float) -> tuple[float, dict[float, float]]:
        return search_alpha(score, progress, default=start, rows=labels.share_of, largest=largest)

    best = _Contest(candidates, labels, options, search if len(candidates) == 1 else search_nearby).run()
    if best.scored.score == -inf:
        raise HfEsmError(
            "Every score is NaN. Check `score_fn` or the metric, or name a method and give `alpha` a number."
        )
    note = "by " + ("labelled rows" if labels.score_fn is None else "the given function")
    note += _why(candidates, best) if best.standings else ""
    if judge is not None:
        other = _by_agreement(candidates, judge, options)
        chosen = "the base" if other.is_base else f"{candidates[other.index].method.name} at {other.scales}"
        same = other.same_as(best)
        note += "; agreement with the experts chooses the same" if same else f"; agreement would choose {chosen}"
    within_error = len(candidates) > 1 or labels.share_of is not None
    return replace(best, by="labels", note=note, within_error=within_error)
