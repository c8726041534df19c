"""Metrics by name: the built-in ones, and those of the `evaluate` library."""

import os
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import HfEsmError
from ..utils import did_you_mean
from .confusion import F1, F1_MACRO, MCC
from .harness import harness_metric
from .metric import (
    ACCURACY,
    EXACT_MATCH,
    MEAN_IOU,
    MRR,
    PERPLEXITY,
    RECALL,
    SIMILARITY,
    SPEARMAN,
    WORD_F1,
    ClassMetric,
    Metric,
    TextMetric,
)


BUILT_IN = {
    metric.name: metric
    for metric in (
        ACCURACY,
        F1,
        F1_MACRO,
        MCC,
        SPEARMAN,
        PERPLEXITY,
        EXACT_MATCH,
        WORD_F1,
        MEAN_IOU,
        SIMILARITY,
        MRR,
        RECALL,
    )
}


SLOW_DRAWS = 100  # of rows, for metrics of the library, which take milliseconds or seconds


# What users name a metric by: a built-in name, a name or folder of the `evaluate` library, a function, or a metric.
MetricSpec = str | os.PathLike | Mapping[str, Any] | Metric | Callable[..., float]


def resolve_metric(metric: MetricSpec) -> Metric:
    """Metric by name, or from a function `(predictions, references) -> float` of which more is better.

    Built in are `"accuracy"` (of samples; of tokens for token classifiers; of all labels together where several may
    hold), `"f1"` (of class 1 of two), `"f1-macro"` (mean over classes, or over labels where several may hold), `"mcc"`
    (Matthews' correlation), `"spearman"` (of the values of a head of one label), `"perplexity"` (causal and
    sequence-to-sequence language models), `"mean-iou"` (semantic segmentation: pixels of a class that are rightly
    answered over all that are answered or labelled, mean over classes); for models that answer in words,
    `"exact-match"` and `"word-f1"`, which compare words as SQuAD does (Rajpurkar et al., 2016, arXiv 1606.05250); and,
    for embedding models, on rows of two texts, `"similarity"` (Spearman's correlation of cosines with the rows'
    scores), `"mrr@10"` and `"recall@10"` (of each first text's own second text among those of all rows).

    The `evaluate` library loads any other name, from the Hub or a folder. Of several numbers that a metric computes,
    the one with the metric's name counts, or else the first. A metric of strings (ROUGE, BLEU, word error rate) reads
    the model's answers in words.

    `{"lm_eval": [tasks], "limit": …}` scores models that write on tasks of the lm-evaluation-harness; see `harness`.

    A function gets tensors, see `ClassMetric`; as in Transformers' Trainer, classes of tokens are padded, and
    references are -100 where no class counts. For heads of other kinds, give a `Metric` with `read`.

    Raises:
        HfEsmError: if there is no such metric.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, Mapping):
        return harness_metric(metric)
    if callable(metric):
        name = getattr(metric, "__name__", "score")
        return ClassMetric(
            name if name.isidentifier() else "score", lambda outputs, labels: float(metric(outputs, labels))
        )
    if isinstance(metric, str) and metric in BUILT_IN:
        return BUILT_IN[metric]
    return _library_metric(metric)


def _library_metric(name: str | os.PathLike) -> Metric:
    """Metric of the `evaluate` library; its features tell whether it compares texts."""
    loaded = _load_from_library(name)
    kinds = loaded.features if isinstance(loaded.features, list) else [loaded.features]
    if any(not {"predictions", "references"} <= kind.keys() for kind in kinds):
        raise HfEsmError(f"{name!r} does not compare predictions with references, so it cannot score a model.")
    higher = not {str(name), loaded.name}.intersection(_ERRORS)
    texts = [kind for kind in kinds if getattr(kind["predictions"], "dtype", "") == "string"]
    if not texts:
        return ClassMetric(str(name), _library_score_of_classes(loaded, name), higher, draws=SLOW_DRAWS)
    single = all(getattr(kind["references"], "dtype", "") == "string" for kind in texts)
    return TextMetric(
        str(name), _library_score_of_texts(loaded, name, single), higher, single=single, draws=SLOW_DRAWS
    )


def _load_from_library(name: str | os.PathLike) -> Any:
    meant = did_you_mean(name, BUILT_IN)
    try:
        import evaluate
    except ImportError:
        raise HfEsmError(
            f"There is no metric {name!r}{meant}. Use {', '.join(BUILT_IN)}, a function, or, after "
            "`pip install evaluate`, any name that `evaluate.load` knows."
        ) from None
    try:
        return evaluate.load(str(name))
    except (ImportError, OSError, ValueError, RuntimeError) as error:  # ImportError: some need a package of their own
        raise HfEsmError(f"The evaluate library cannot load the metric {name!r}{meant}: {error}") from None


def _library_score_of_classes(loaded: Any, name: Any) -> Callable[[Tensor, Tensor], float]:
    def score(outputs: Tensor, labels: Tensor) -> float:
        if labels.dim() == 2 and labels.dtype != torch.bool:  # classes of tokens
            outputs, labels = outputs[labels != -100], labels[labels != -100]
        return _computed(loaded, name, outputs.tolist(), labels.tolist())

    return score


def _library_score_of_texts(loaded: Any, name: Any, single: bool) -> Callable[[list[str], list[list[str]]], float]:
    def score(answers: list[str], accepted: list[list[str]]) -> float:
        if single:
            return _computed(loaded, name, answers, [text for (text,) in accepted])
        most = max(map(len, accepted))  # some metrics need the same number of right texts for every answer
        return _computed(loaded, name, answers, [[*texts, *texts[:1] * (most - len(texts))] for texts in accepted])

    return score


def _computed(loaded: Any, name: Any, predictions: list, references: list) -> float:
    """The number that a metric of the library computes."""
    computed = loaded.compute(predictions=predictions, references=references)
    if isinstance(computed, Mapping):
        computed = computed.get(loaded.name, next(iter(computed.values())))
    if not isinstance(computed, Real):
        raise HfEsmError(f"The metric {name!r} gives {computed!r:.80}, not a number. Choose one that gives a number.")
    return float(computed)


# Metrics of the `evaluate` library of which less is better. The library itself does not say so.
_ERRORS = ("brier_score", "cer", "character", "mae", "mape", "mase", "mse", "smape", "ter", "wer")
