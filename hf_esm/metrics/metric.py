"""What a score is: accuracy, perplexity, a metric of the `evaluate` library, or a function of the caller's."""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Optional

import torch
from torch import Tensor

from ..errors import HfEsmError


@dataclass(frozen=True)
class Metric:
    """A score of a model's outputs.

    Attributes:
        name: as recipes and tables write it.
        score: outputs and labels of `N` samples to one number; labels as in `labels.LabelledSamples`. Outputs are
            `[N]`: the class of highest logit, or the value of a head of one label; `[N, C]` bool: the labels whose
            logits are positive, where several may hold; `[N, L]`: each token's class; for perplexity `[N, 2]`: summed
            negative log-likelihood, and tokens; of maps `[N, 3, C]`, see `maps.overlaps_of`. Of texts, `N` answers and
            lists of right ones. With `read`, `N` of what it gives, and of what rows have as their label.
        higher_is_better: False for perplexity.
        is_share: whether it is the share of samples (of tokens) that are right, so that its standard error is known.
        reads_maps: whether it is of a class for each pixel.
        reads_texts: whether it is of answers in words.
        of_one_text: whether it compares an answer with one right text alone.
        of_each: of one answer and the right ones, where the score is the mean of it.
        read: for a head of any other kind, such as one that finds objects: what `score` wants to know of a sample,
            made of the tensors that the model put out for it, by name and on the CPU (`logits`, `pred_boxes`, …).
            Numbers, texts, lists, and dictionaries with texts as keys, which JSON can hold.
    """

    name: str
    score: Callable[[Any, Any], float]
    higher_is_better: bool = True
    is_share: bool = False
    reads_maps: bool = False
    reads_texts: bool = False
    of_one_text: bool = False
    of_each: Optional[Callable[[str, Sequence[str]], float]] = None
    read: Optional[Callable[[dict[str, Tensor]], Any]] = None

    @classmethod
    def mean_of(cls, name: str, of_each: Callable[[str, Sequence[str]], float], is_share: bool = False) -> "Metric":
        """A metric of texts that is the mean over them."""

        def score(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
            return sum(map(of_each, answers, accepted)) / len(answers)

        return cls(name, score, is_share=is_share, reads_texts=True, of_each=of_each)

    @property
    def needs_labels(self) -> bool:
        return self is not PERPLEXITY

    @property
    def compares_lists(self) -> bool:
        """Whether outputs and labels are lists, rather than tensors."""
        return self.reads_texts or self.read is not None


def right_answers(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`[N]` and `[N]` float64: how many of a sample's answers are right, and how many there are: one, or as many as it
    has labelled tokens. Where several labels may hold, all have to be right.
    """
    right, asked = outputs == labels, labels != -100
    if labels.dtype == torch.bool:
        right, asked = right.all(1), asked.all(1)
    right, asked = (right & asked).double(), asked.double()
    return right.reshape(len(labels), -1).sum(1), asked.reshape(len(labels), -1).sum(1)


def _share_right(outputs: Tensor, labels: Tensor) -> float:
    right, asked = right_answers(outputs, labels)
    return float(right.sum() / asked.sum())


def _perplexity(outputs: Tensor, labels: Tensor) -> float:
    total, tokens = outputs.double().sum(0)
    if not tokens:
        raise HfEsmError("Perplexity: no sample has a token to predict. Give texts of two tokens or more.")
    return float((total / tokens).exp())


def _mean_iou(overlaps: Tensor, _: Tensor) -> float:
    """Over all samples together, and the classes that are found or labelled in any."""
    both, found, labelled = overlaps.double().sum(0)
    either = found + labelled - both
    if not either.any():
        raise HfEsmError("mean-iou: no pixel has a class. Give maps of classes that the model knows.")
    return float((both / either)[either > 0].mean())


def _words(text: str) -> list[str]:
    """The words that count, as SQuAD's evaluation has it: in lower case, without punctuation and English articles."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _is_among(answer: str, accepted: Sequence[str]) -> float:
    return float(any(_words(answer) == _words(text) for text in accepted))


def _word_overlap(answer: str, accepted: Sequence[str]) -> float:
    """The best F1 of an answer's words beside those of a right one."""
    return max(_f1(_words(answer), _words(text)) for text in accepted)


def _f1(answer: list[str], right: list[str]) -> float:
    common = sum((Counter(answer) & Counter(right)).values())
    return 2 * common / (len(answer) + len(right)) if answer and right else float(answer == right)


ACCURACY = Metric("accuracy", _share_right, is_share=True)


PERPLEXITY = Metric("perplexity", _perplexity, higher_is_better=False)


MEAN_IOU = Metric("mean-iou", _mean_iou, reads_maps=True)


EXACT_MATCH = Metric.mean_of("exact-match", _is_among, is_share=True)


WORD_F1 = Metric.mean_of("word-f1", _word_overlap)


BUILT_IN = {metric.name: metric for metric in (ACCURACY, PERPLEXITY, MEAN_IOU, EXACT_MATCH, WORD_F1)}


def resolve_metric(metric: Any) -> Metric:
    """A metric from its name or from a function `(predictions, references) -> float`; higher is better.

    Built in are `"accuracy"` (of tokens, where they have classes; of all labels together, where several may hold),
    `"perplexity"` (of causal and sequence-to-sequence language models), `"mean-iou"` (of semantic segmentation: pixels
    of a class that are rightly found over all that are found or labelled, mean over classes), and of models that
    answer in words (extractive question answering, generation) `"exact-match"` and `"word-f1"`, which count words as
    SQuAD (Rajpurkar et al., 2016) does. Any other name is loaded by the `evaluate` library, from the Hub or a folder;
    of several numbers, the one of its name counts, or else the first. One whose predictions are strings (ROUGE, BLEU,
    word error rate) is given the model's answers in words. A function is called with tensors, see `Metric.score`; as
    in Transformers' Trainer, classes of tokens are padded, and references are -100 where none counts. For heads of
    other kinds, give a `Metric` with `read`.

    Raises:
        HfEsmError: if there is no such metric.
    """
    if isinstance(metric, Metric):
        return metric
    if callable(metric):
        name = getattr(metric, "__name__", "score")
        return Metric(name if name.isidentifier() else "score", lambda found, labels: float(metric(found, labels)))
    if isinstance(metric, str) and metric in BUILT_IN:
        return BUILT_IN[metric]
    return _of_library(metric)


def _of_library(metric: Any) -> Metric:
    """A metric of the `evaluate` library; what it reads is told by its features."""
    try:
        import evaluate
    except ImportError:
        raise HfEsmError(
            f"There is no metric {metric!r}: there are {', '.join(BUILT_IN)}, functions, and, with `pip install "
            "evaluate`, what `evaluate.load` knows."
        ) from None
    try:
        loaded = evaluate.load(str(metric))
    except (ImportError, OSError, ValueError, RuntimeError) as error:  # one may need a package of its own
        raise HfEsmError(f"The evaluate library cannot load the metric {metric!r}: {error}") from None

    def compute(found: list, labels: list) -> float:
        computed = loaded.compute(predictions=found, references=labels)
        if isinstance(computed, Mapping):
            computed = computed.get(loaded.name, next(iter(computed.values())))
        if not isinstance(computed, Real):
            raise HfEsmError(f"The metric {metric!r} gives no number but {computed!r:.80}. Choose one that does.")
        return float(computed)

    def score(found: Tensor, labels: Tensor) -> float:
        if labels.dim() == 2 and labels.dtype != torch.bool:  # of tokens
            found, labels = found[labels != -100], labels[labels != -100]
        return compute(found.tolist(), labels.tolist())

    def score_texts(found: list[str], accepted: list[list[str]]) -> float:
        if of_one_text:
            return compute(found, [text for (text,) in accepted])
        most = max(map(len, accepted))  # some want as many of each
        return compute(found, [[*texts, *texts[:1] * (most - len(texts))] for texts in accepted])

    kinds = loaded.features if isinstance(loaded.features, list) else [loaded.features]
    if any(not {"predictions", "references"} <= kind.keys() for kind in kinds):
        raise HfEsmError(f"{metric!r} does not compare predictions with references: it is no metric of a model.")
    kinds = [kind for kind in kinds if getattr(kind["predictions"], "dtype", "") == "string"]
    of_one_text = all(getattr(kind["references"], "dtype", "") == "string" for kind in kinds)
    higher = not {str(metric), loaded.name}.intersection(_ERRORS)
    if kinds:
        return Metric(str(metric), score_texts, higher, reads_texts=True, of_one_text=of_one_text)
    return Metric(str(metric), score, higher)


# Metrics of the `evaluate` library of which less is better; it does not say so itself.
_ERRORS = ("brier_score", "cer", "character", "mae", "mape", "mase", "mse", "smape", "ter", "wer")
