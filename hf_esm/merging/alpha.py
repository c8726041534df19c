"""Choosing α: the merged updates are put on the base at several scales, nothing is merged again."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import inf, isnan
from typing import Any, Optional

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..architecture import canonical_names
from ..checkpoints import Checkpoint
from ..errors import HfEsmError
from ..metrics import LabelledSamples, Metric, load_labelled, resolve_metric, run
from ..planning import MergeOptions, MergePlan
from .updates import MergedUpdates


COARSE = [round(0.1 + 0.3 * i, 1) for i in range(10)]  # 0.1, 0.4, …, 2.8


FINE = 0.1


def search_alpha(
    score: Callable[[float], float], progress: Callable = iter, *, default: float = 1.0, rows: Optional[int] = None
) -> tuple[float, dict[float, float]]:
    """The α in 0.1, 0.2, …, 3.0 to use, searched by steps of 0.3 first and of 0.1 around the best of those.

    On a few hundred rows a score is uncertain by more than neighbouring values of α differ. Where the score is the
    share of `rows` rows that are right, the α nearest to the method's default is taken whose score is within one
    standard error of the best (the one-standard-error rule): it is left for as much as the rows can tell. Other scores
    are taken to be exact. Returns the α, and the scores seen.
    """
    scores: dict[float, float] = {}

    def known(alpha: float) -> float:
        found = score(alpha)
        return -inf if isnan(found) else found

    for alpha in progress(COARSE):
        scores[alpha] = known(alpha)
    middle = max(COARSE, key=lambda alpha: (scores[alpha], -alpha))
    for alpha in (round(middle + step * FINE, 1) for step in range(-2, 3)):
        if 0 < alpha <= 3 and alpha not in scores:
            scores[alpha] = known(alpha)
    best = max(scores.values())
    if best == -inf:
        raise HfEsmError("alpha='auto': every score is NaN. Check score_fn or the metric, or give alpha a number.")
    error = (best * (1 - best) / rows) ** 0.5 if rows else 0.0
    good = [alpha for alpha, found in scores.items() if found >= best - error]
    return min(good, key=lambda alpha: (abs(alpha - default), alpha)), dict(sorted(scores.items()))


class CandidateModels:
    """The models to score: every expert's around one shared copy of the merged body, or the merged model as a whole.

    Memory: one body, and all heads.

    Attributes:
        by_task: every expert's model around the shared body, if they are not scored as a whole.
        body: the shared parameters and buffers, by canonical name.
    """

    def __init__(self, plan: MergePlan, device: torch.device, whole: bool = False):
        self.plan, self.device = plan, device
        self._shared = set(plan.heads.shared)
        self.body: dict[str, torch.Tensor] = {}
        self.whole = self._build(plan.base, []) if whole else None
        self.by_task = {} if whole else {t: self._build(e, plan.heads.by_task[t]) for t, e in plan.experts.items()}

    def _build(self, checkpoint: Checkpoint, own: list[str]) -> PreTrainedModel:
        model = self.plan.base.load_model_as(type(checkpoint.skeleton), checkpoint.config).float().to(self.device)
        state = model.state_dict()
        with torch.no_grad():
            for name in own:
                state[checkpoint.names[name]].copy_(checkpoint.tensor(name))
        for name, live in canonical_names(model).items():
            module_name, _, leaf = live.rpartition(".")
            module = model.get_submodule(module_name)
            for held in (module._parameters, module._buffers):
                if name in self._shared and held.get(leaf) is not None and held[leaf].is_floating_point():
                    held[leaf] = self.body.setdefault(name, held[leaf])
        model.tie_weights()
        return model.eval()

    @torch.no_grad()
    def set_alpha(self, updates: MergedUpdates, alpha: float) -> None:
        for name, parameter in self.body.items():
            parameter.copy_(updates.weight(name, alpha))


def score_candidates(
    models: CandidateModels,
    validation: Mapping[str, LabelledSamples],
    score_fn: Optional[Callable[[Any], float] | Mapping[str, Callable[[Any], float]]],
    metric: Metric,
    batch_size: int,
) -> dict[str, float]:
    """One score per task, higher is better: the metric on its rows, or what `score_fn` says."""
    if models.whole is not None:
        return {"merged": _number(score_fn(models.whole))}
    if score_fn is not None:
        return {task: _number(score(models.by_task[task])) for task, score in score_fn.items()}
    sign = 1 if metric.higher_is_better else -1
    return {t: sign * run(models.by_task[t], data, metric, batch_size).score for t, data in validation.items()}


def _number(found: Any) -> float:
    try:
        return float(found)
    except (TypeError, ValueError):
        raise HfEsmError(f"score_fn gave {found!r:.80}; it has to give a number, of which more is better.") from None


def choose_alpha(
    plan: MergePlan,
    updates: MergedUpdates,
    labelled: Mapping[str, LabelledSamples],
    score_fn: Any,
    accelerator: Accelerator,
    options: MergeOptions,
    progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[float, dict[float, float]]:
    """Return the α that the options name, the method's default, or the best on validation rows, and scores by α.

    Only the main process searches.
    """
    alpha = options.alpha
    if alpha != "auto" or not accelerator.is_main_process:
        return plan.method.default_alpha if alpha in (None, "auto") else float(alpha), {}
    models = CandidateModels(plan, accelerator.device, whole=callable(score_fn))
    metric = resolve_metric(options.metric)

    def score(candidate: float) -> float:
        models.set_alpha(updates, candidate)
        scores = score_candidates(models, labelled, score_fn, metric, options.batch_size)
        return sum(scores.values()) / len(scores)

    share = score_fn is None and metric.is_share
    rows = sum(len(data.labels) for data in labelled.values()) if share else None
    return search_alpha(score, progress, default=plan.method.default_alpha, rows=rows)


def read_validation(
    plan: MergePlan, validation: Any, processors: dict, options: MergeOptions
) -> dict[str, LabelledSamples]:
    everything, metric = replace(options, num_samples=0), resolve_metric(options.metric)
    return {
        task: load_labelled(
            rows, processors[task], plan.experts[task].config, f"validation of '{task}'", everything, metric
        )
        for task, rows in (validation or {}).items()
    }
