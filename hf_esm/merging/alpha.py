"""Chooses α: the merged updates are added to the base at several scales; no weight is merged again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf, isnan
from typing import Any, Optional

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..architecture import canonical_names, untie
from ..checkpoints import Checkpoint
from ..errors import HfEsmError
from ..metrics import LabelledSamples, Outcome, load_labelled, resolve_metric, run
from ..planning import MergeOptions, MergePlan
from .contest import COARSE, ERROR_DRAWS, FINE, LARGEST, Scored, first_rows


MOST = 9  # evaluations of one search


def search_alpha(
    score: Callable[[float], float],
    progress: Callable = iter,
    *,
    default: float = 1.0,
    rows: Optional[int] = None,
    largest: float = LARGEST,
) -> tuple[float, dict[float, float]]:
    """Search the best α among 0.1, 0.2, …, `largest` in at most nine evaluations: in growing steps from the default to
    both sides, until the score falls by more than its standard error, then between the best α and its neighbours.

    On a few hundred rows a score is uncertain by more than neighbouring values of α differ. If the score is the share
    of `rows` rows that are right, the result is the α nearest to the default whose score is within one standard error
    of the best (the one-standard-error rule), so that the default is left only if the rows tell the difference. Other
    scores are taken to be exact.

    Args:
        score: returns the score of an α; higher is better. NaN counts as the worst.
        default: the method's default α.
        rows: number of rows that the score is a share of, if it is one.
        largest: largest α, 0.1 or more; see `MergeMethod.largest_alpha`.

    Returns α, and the scores by α.

    Raises:
        HfEsmError: if every score is NaN.
    """
    scores: dict[float, float] = {}
    steps = iter(progress(range(MOST)))

    def measure(alpha: float) -> float:
        next(steps, None)
        scores[alpha] = -inf if isnan(value := score(alpha)) else value
        return scores[alpha]

    def as_good() -> float:
        best = max(scores.values())
        return best - (best * (1 - best) / rows) ** 0.5 if rows and best > -inf else best

    start = round(min(max(default, FINE), largest), 1)
    measure(start)
    for side in (-1, 1):
        alpha, step = start, COARSE
        while len(scores) < MOST:
            step = max(step, round(abs(alpha - start), 1))  # 0.3, 0.3, 0.6, 1.2, …
            alpha = round(min(max(alpha + side * step, FINE), largest), 1)
            if alpha in scores or measure(alpha) < as_good():
                break
    while len(scores) < MOST and (alpha := _between(scores)) is not None:
        measure(alpha)
    for _ in steps:  # the bar ends
        pass
    if max(scores.values()) == -inf:
        raise HfEsmError("alpha='auto': every score is NaN. Check score_fn or the metric, or give alpha a number.")
    good = [alpha for alpha, value in scores.items() if value >= as_good()]
    return min(good, key=lambda alpha: (abs(alpha - default), alpha)), dict(sorted(scores.items()))


def _between(scores: Mapping[float, float]) -> Optional[float]:
    """Return the middle of the wider gap beside the best α, a multiple of 0.1; None if there is no gap."""
    alphas = sorted(scores)
    place = max(range(len(alphas)), key=lambda i: (scores[alphas[i]], -alphas[i]))
    near = alphas[max(place - 1, 0) : place + 2]
    low, high = max(pairwise(near), key=lambda gap: round(gap[1] - gap[0], 1), default=(0.0, 0.0))
    middle = round(low + FINE * int((high - low) / FINE / 2 + 1e-6), 1)
    return middle if low < middle < high else None


def describe_alpha(alpha: float, scores: Mapping[float, float], default: float, within_error: bool) -> str:
    """Say in one line by what rule α was chosen among the scores by α; empty if it was not searched.

    Args:
        within_error: whether the rule is that of `search_alpha` for shares of rows, or else the best score.
    """
    if alpha not in scores:
        return ""
    best, tried = max(scores, key=lambda one: scores[one]), f"alpha {alpha:g} of {len(scores)} tried"
    if not within_error:
        return f"{tried}, the best"
    return f"{tried}: nearest to the default {default:g} within one standard error of the best, {best:g}"


class CandidateModels:
    """The models that are scored: a model per task around one shared body, or the merged model as a whole.

    Tasks that keep no weights of their own, such as those of language models, share one model. Memory: one body, and
    all heads.

    Attributes:
        whole: the merged model, if it is scored as a whole; otherwise None.
        by_task: a model per task around the shared body; empty if the merged model is scored as a whole.
        body: the shared parameters and buffers, by canonical name.
    """

    def __init__(
        self, plan: MergePlan, device: torch.device, whole: bool = False, dtype: Optional[torch.dtype] = torch.float32
    ):
        """Build the models on a device, in a dtype, or with None in that of the base."""
        self.plan, self.device, self.dtype = plan, device, dtype
        self._shared = set(plan.heads.shared)
        self.body: dict[str, torch.Tensor] = {}
        self.whole = self._build(plan.base, []) if whole else None
        self._headless: dict[type, PreTrainedModel] = {}
        self.by_task = {} if whole else {task: self._model_of(task) for task in plan.experts}

    def _model_of(self, task: str) -> PreTrainedModel:
        weights, expert = self.plan.heads.by_task[task], self.plan.experts[task]
        if weights:
            return self._build(expert, weights)
        kind = type(expert.skeleton)
        if kind not in self._headless:
            self._headless[kind] = self._build(expert, [])
        return self._headless[kind]

    def _build(self, checkpoint: Checkpoint, task_weights: list[str]) -> PreTrainedModel:
        """Build a model of the checkpoint's class around the shared body, with the weights that its task keeps."""
        model = self.plan.base.load_model_as(type(checkpoint.skeleton), checkpoint.config).to(self.device, self.dtype)
        untie(model, checkpoint.names.values())
        state = model.state_dict()
        with torch.no_grad():
            for name in task_weights:
                state[checkpoint.names[name]].copy_(checkpoint.tensor(name))
        for name, live in canonical_names(model).items():
            module_name, _, leaf = live.rpartition(".")
            module = model.get_submodule(module_name)
            for tensors in (module._parameters, module._buffers):
                if name in self._shared and tensors.get(leaf) is not None and tensors[leaf].is_floating_point():
                    tensors[leaf] = self.body.setdefault(name, tensors[leaf])
        model.tie_weights(recompute_mapping=False)
        return model.eval()

    @torch.no_grad()
    def set_weights(self, weight: Callable[[str], torch.Tensor]) -> None:
        """Write the weights that a function returns by canonical name into the shared body."""
        for name, parameter in self.body.items():
            parameter.copy_(weight(name))


def _number(score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError):
        raise HfEsmError(f"score_fn returned {score!r:.80}. It must return a number; higher is better.") from None


@dataclass(frozen=True)
class TaskScore:
    """Scores of one task, on the labelled rows that α was chosen on or by the caller's function.

    Attributes:
        merged: score of the merged model, without routed experts.
        base: score of the base with the head that the task keeps for itself.
        expert: score of the task's expert; None if the caller's function scores the merged model as a whole.
        metric: name of the metric, or `"score_fn"`.
        rows: number of rows; None for the caller's function.
        higher_is_better: False for errors, such as perplexity.
        interval: 95 % interval of `merged`, of draws of the rows; None for the caller's function.
    """

    merged: float
    base: float
    expert: Optional[float]
    metric: str
    rows: Optional[int]
    higher_is_better: bool
    interval: Optional[tuple[float, float]] = None

    @property
    def below_base(self) -> bool:
        """Whether the merged model is worse than the base, or its score is NaN."""
        better, worse = (self.merged, self.base) if self.higher_is_better else (self.base, self.merged)
        return not better >= worse

    def __str__(self) -> str:
        expert = "" if self.expert is None else f", expert {self.expert:.4g}"
        rows = "" if self.rows is None else f"; {self.rows} rows"
        interval = f", 95 % {self.shown_interval}" if self.interval else ""
        return f"{self.merged:.4g} (base {self.base:.4g}{expert}{rows}{interval})"

    @property
    def shown_interval(self) -> str:
        """The interval as tables show it; empty without one."""
        return "" if self.interval is None else f"{self.interval[0]:.4g} to {self.interval[1]:.4g}"


class LabelScore:
    """Scores merged models on labelled rows, or by the caller's function.

    Attributes:
        share_of: number of rows that a score is a share of; None if it is none.
        evaluations: number of models that `scored` has measured.
    """

    def __init__(
        self,
        plan: MergePlan,
        labelled: Mapping[str, LabelledSamples],
        score_fn: Any,
        accelerator: Accelerator,
        options: MergeOptions,
    ):
        self.plan, self.models = plan, CandidateModels(plan, accelerator.device, whole=callable(score_fn))
        self.labelled, self.score_fn, self.batch_size = labelled, score_fn, options.batch_size
        self.metric, self.evaluations = resolve_metric(options.metric), 0
        share = score_fn is None and self.metric.is_share
        self.share_of = sum(len(data.labels) for data in labelled.values()) if share else None

    def scored(self, weight: Callable[[str], torch.Tensor], share: float = 1.0) -> Scored:
        """Return the mean score over all tasks of a model, by its weights; higher is better.

        Args:
            share: of each task's rows, the first of them; the caller's function always scores the whole model.
        """
        self.models.set_weights(weight)
        self.evaluations += 1
        if self.score_fn is not None:
            scores = list(self._by_function().values())
            return Scored({}, lambda draws: torch.tensor([sum(scores) / len(scores)]).double())
        rows = first_rows(self.rows, share)
        outcomes = {t: self._outcome(t, data.first(rows[t])) for t, data in self.labelled.items()}
        sign = 1 if self.metric.higher_is_better else -1

        def of_draws(draws: Mapping[str, torch.Tensor]) -> torch.Tensor:
            scores = [outcomes[task].scores_of_draws(draw) for task, draw in draws.items()]
            return sign * torch.stack(scores).mean(0)

        error_draws = min(ERROR_DRAWS, self.metric.draws // 4)
        return Scored(rows, of_draws, self.metric.higher_is_better, error_draws=error_draws)

    def base_scored(self, share: float = 1.0) -> Scored:
        """Return the same of the base."""
        return self.scored(self.plan.base.tensor, share)

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows by task; empty if the caller's function scores."""
        return {task: len(data.labels) for task, data in self.labelled.items()} if self.score_fn is None else {}

    def _outcome(self, task: str, data: LabelledSamples) -> Outcome:
        return run(self.models.by_task[task], data, self.metric, self.batch_size)

    def _by_function(self, task: Optional[str] = None) -> dict[str, float]:
        """Return what the caller's function says of the models, by task (of all or of one) or as `"merged"`."""
        if self.models.whole is not None:
            return {"merged": _number(self.score_fn(self.models.whole))}
        functions = self.score_fn.items()
        return {name: _number(score(self.models.by_task[name])) for name, score in functions if task in (None, name)}

    def compare(self, weight: Callable[[str], torch.Tensor]) -> dict[str, TaskScore]:
        """Return the scores of a merged model by task, with those of the base and of each task's expert.

        Args:
            weight: returns the merged model's weights by canonical name.
        """
        higher, name = self.score_fn is not None or self.metric.higher_is_better, self.metric.name
        outcomes = self._outcomes(weight) if self.score_fn is None else {}
        merged = {task: outcome.score for task, outcome in outcomes.items()} or self._scores(weight)
        base = self._scores(self.plan.base.tensor)
        tasks = [task for task in self.plan.experts if task in merged]
        experts = {task: self._scores(self.plan.experts[task].tensor, task)[task] for task in tasks}
        return {
            task: TaskScore(
                merged=merged[task],
                base=base[task],
                expert=experts.get(task),
                metric=name if self.score_fn is None else "score_fn",
                rows=len(self.labelled[task].labels) if self.score_fn is None else None,
                higher_is_better=higher,
                interval=outcomes[task].interval if task in outcomes else None,
            )
            for task in merged
        }

    def _outcomes(self, weight: Callable[[str], torch.Tensor]) -> dict[str, Outcome]:
        """Return the outcomes of a model on the labelled rows by task."""
        self.models.set_weights(weight)
        return {task: self._outcome(task, data) for task, data in self.labelled.items()}

    def _scores(self, weight: Callable[[str], torch.Tensor], task: Optional[str] = None) -> dict[str, float]:
        """Return the scores of a model as the metric states them, of all tasks or of one."""
        self.models.set_weights(weight)
        if self.score_fn is not None:
            return self._by_function(task)
        return {t: self._outcome(t, data).score for t, data in self.labelled.items() if task in (None, t)}


def read_validation(
    plan: MergePlan, validation: Any, processors: dict, options: MergeOptions
) -> dict[str, LabelledSamples]:
    """Return the validation rows by task, encoded, all of them whatever `num_samples` is."""
    all_rows, metric = replace(options, num_samples=0), resolve_metric(options.metric)
    return {
        task: load_labelled(
            rows, processors[task], plan.experts[task].config, f"validation of '{task}'", all_rows, metric
        )
        for task, rows in (validation or {}).items()
    }
