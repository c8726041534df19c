"""Chooses α: the merged updates are added to the base at several scales; no weight is merged again."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import inf, isnan
from typing import Any, Optional

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..architecture import canonical_names, untie
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
    """Search the best α among 0.1, 0.2, …, 3.0: by steps of 0.3 first, and of 0.1 around the best of those.

    On a few hundred rows a score is uncertain by more than neighbouring values of α differ. If the score is the share
    of `rows` rows that are right, the result is the α nearest to the default whose score is within one standard error
    of the best (the one-standard-error rule), so that the default is left only if the rows tell the difference. Other
    scores are taken to be exact.

    Args:
        score: returns the score of an α; higher is better. NaN counts as the worst.
        default: the method's default α.
        rows: number of rows that the score is a share of, if it is one.

    Returns α, and the scores by α.

    Raises:
        HfEsmError: if every score is NaN.
    """
    scores: dict[float, float] = {}

    def number(alpha: float) -> float:
        return -inf if isnan(value := score(alpha)) else value

    for alpha in progress(COARSE):
        scores[alpha] = number(alpha)
    middle = max(COARSE, key=lambda alpha: (scores[alpha], -alpha))
    for alpha in (round(middle + step * FINE, 1) for step in range(-2, 3)):
        if 0 < alpha <= 3 and alpha not in scores:
            scores[alpha] = number(alpha)
    best = max(scores.values())
    if best == -inf:
        raise HfEsmError("alpha='auto': every score is NaN. Check score_fn or the metric, or give alpha a number.")
    error = (best * (1 - best) / rows) ** 0.5 if rows else 0.0
    good = [alpha for alpha, value in scores.items() if value >= best - error]
    return min(good, key=lambda alpha: (abs(alpha - default), alpha)), dict(sorted(scores.items()))


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


def score_candidates(
    models: CandidateModels,
    validation: Mapping[str, LabelledSamples],
    score_fn: Optional[Callable[[Any], float] | Mapping[str, Callable[[Any], float]]],
    metric: Metric,
    batch_size: int,
) -> dict[str, float]:
    """Return one score per task, higher is better: the metric on the task's rows, or what `score_fn` returns."""
    if models.whole is not None:
        return {"merged": _number(score_fn(models.whole))}
    if score_fn is not None:
        return {task: _number(score(models.by_task[task])) for task, score in score_fn.items()}
    sign = 1 if metric.higher_is_better else -1
    return {t: sign * run(models.by_task[t], data, metric, batch_size).score for t, data in validation.items()}


def _number(score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError):
        raise HfEsmError(f"score_fn returned {score!r:.80}. It must return a number; higher is better.") from None


class LabelScore:
    """Scores merged models on labelled rows, or by the caller's function.

    Attributes:
        rows: number of rows that a score is a share of; None if it is none.
    """

    def __init__(
        self,
        plan: MergePlan,
        labelled: Mapping[str, LabelledSamples],
        score_fn: Any,
        accelerator: Accelerator,
        options: MergeOptions,
    ):
        self.models = CandidateModels(plan, accelerator.device, whole=callable(score_fn))
        self.labelled, self.score_fn, self.batch_size = labelled, score_fn, options.batch_size
        self.metric = resolve_metric(options.metric)
        share = score_fn is None and self.metric.is_share
        self.rows = sum(len(data.labels) for data in labelled.values()) if share else None

    def score(self, updates: MergedUpdates, alpha: float, by_kind: Mapping[str, float]) -> float:
        """Return the mean score over all tasks at a scale, and other scales for some kinds of weights."""
        self.models.set_weights(partial(updates.weight, alpha=alpha, by_kind=by_kind))
        scores = score_candidates(self.models, self.labelled, self.score_fn, self.metric, self.batch_size)
        return sum(scores.values()) / len(scores)


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
