"""Metrics: the base class, one class for each kind of answer, and the metrics of each kind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..data import SampleOptions, read_rows
from ..errors import HfEsmError
from .labels import (
    LabelledSamples,
    RowReader,
    with_classes,
    with_maps,
    with_pairs,
    with_references,
    with_targets,
    with_texts,
)
from .outputs import classes_of, likelihoods_of, overlaps_of, readings_of, texts_of
from .pairs import cosines_of, ranks_of, recall_at_10, reciprocal_rank, spearman
from .words import is_accepted, word_overlap


@dataclass(frozen=True)
class Metric:
    """Score of a model's outputs on labelled rows.

    Each kind of answer has a subclass, which reads labels from rows (`load`), takes outputs from a model (`outputs`)
    and scores both. `Metric(name, score)` makes a `ClassMetric`, and `Metric(name, score, read=…)` a `ReadMetric`.
    Subclass one of the kinds, or `Metric` itself, for anything else.

    Attributes:
        name: name in recipes and tables.
        score: function of the outputs and labels of `N` rows that returns one number.
        higher_is_better: False for errors, such as perplexity.
        is_share: whether the score is the share of rows that are right, so that its standard error is known.
        draws: number of draws of rows that an interval is made of.
        read: for a head of any other kind, such as a detector of objects: function of one sample's output tensors
            (by name, on the CPU: `logits`, `pred_boxes`, …) that returns what `score` needs of them.

    Example:
        >>> from hf_esm import Metric
        >>> def count_objects(outputs):
        ...     return int((outputs["logits"].softmax(-1)[:, :-1].amax(1) > 0.5).sum())
        >>> def share_right(counts, labels):
        ...     return sum(count == label for count, label in zip(counts, labels)) / len(labels)
        >>> metric = Metric("objects", share_right, read=count_objects)
        >>> metric.score([2, 1], [2, 3])
        0.5
    """

    name: str
    score: Callable[[Any, Any], float]
    higher_is_better: bool = True
    is_share: bool = False
    draws: int = field(default=1000, kw_only=True)
    read: Optional[Callable[[dict[str, Tensor]], Any]] = field(default=None, kw_only=True)

    def __new__(cls, *args: Any, read: Optional[Callable] = None, **settings: Any) -> "Metric":
        kind = ClassMetric if read is None else ReadMetric
        return object.__new__(kind if cls is Metric else cls)

    def __post_init__(self) -> None:
        if (self.read is not None) != isinstance(self, ReadMetric):
            raise HfEsmError(f"Metric {self.name!r}: `read` goes with Metric(…) or ReadMetric(…), which needs it.")

    def load(self, rows: list[Any], reader: RowReader) -> LabelledSamples:
        """Encode rows, with labels in the form that `score` compares."""
        raise NotImplementedError

    def outputs(self, model: PreTrainedModel, data: LabelledSamples, batch_size: int) -> Tensor | list[Any]:
        """Answers of a model to `N` samples, in the form that `score` compares.

        Raises:
            HfEsmError: if the metric cannot read the model's answers.
        """
        raise NotImplementedError

    def labels(self, data: LabelledSamples) -> Tensor | list[Any]:
        """The `N` labels that `score` compares the outputs with."""
        return data.labels

    def scores_of_draws(self, outputs: Tensor | list[Any], labels: Tensor | list[Any], draws: Tensor) -> Tensor:
        """Score on each draw of rows: `[D]` float64, from indices `[D, N]` int64."""
        scores = [self.score(_select(outputs, rows), _select(labels, rows)) for rows in draws]
        return torch.tensor([float(score) for score in scores], dtype=torch.float64)


def _select(parts: Tensor | list[Any], rows: Tensor) -> Tensor | list[Any]:
    return parts[rows] if isinstance(parts, Tensor) else [parts[i] for i in rows]


@dataclass(frozen=True)
class ClassMetric(Metric):
    """Score of classes or values: of samples, of tokens, or of several labels that may hold.

    Outputs are as `outputs.classes_of` returns them, labels as `labels.with_classes`.
    """

    def load(self, rows: list[Any], reader: RowReader) -> LabelledSamples:
        return with_classes(rows, reader)

    def outputs(self, model: PreTrainedModel, data: LabelledSamples, batch_size: int) -> Tensor:
        outputs = classes_of(model, data.samples, batch_size)
        if outputs.shape != data.labels.shape:
            raise HfEsmError(
                f"{type(model).__name__} gives answers of shape {tuple(outputs.shape[1:])} per row, but the labels "
                f"are of shape {tuple(data.labels.shape[1:])}. Give one label for each answer."
            )
        return outputs


@dataclass(frozen=True)
class AccuracyMetric(ClassMetric):
    """Share of samples, or of labelled tokens, whose class is right."""

    def outputs(self, model: PreTrainedModel, data: LabelledSamples, batch_size: int) -> Tensor:
        if not model.can_generate() and model.config.num_labels == 1:
            kind = type(model).__name__
            raise HfEsmError(f"{kind} gives one value, not a class. Choose a metric of values, such as 'spearman'.")
        return super().outputs(model, data, batch_size)

    def scores_of_draws(self, outputs: Tensor, labels: Tensor, draws: Tensor) -> Tensor:
        right, counted = right_answers(outputs, labels)
        return right[draws].sum(1) / counted[draws].sum(1)


@dataclass(frozen=True)
class ValueMetric(ClassMetric):
    """Score of the values of a head of one label, such as one of how alike two texts are."""

    def outputs(self, model: PreTrainedModel, data: LabelledSamples, batch_size: int) -> Tensor:
        if model.config.num_labels != 1 or model.can_generate():
            raise HfEsmError(
                f"{type(model).__name__} gives no value: {self.name} needs a head of one label. For classes, choose "
                "'accuracy', 'f1-macro' or 'mcc'; for embeddings, 'similarity'."
            )
        return super().outputs(model, data, batch_size)


@dataclass(frozen=True)
class PerplexityMetric(Metric):
    """Score of the likelihood of texts. Outputs are as `outputs.likelihoods_of` returns them; labels are not read."""

    def load(self, rows: list[Any], reader: RowReader) -> LabelledSamples:
        return with_targets(rows, reader)

    def outputs(self, model: PreTrainedModel, data: LabelledSamples, batch_size: int) -> Tensor:
        return likelihoods_of(model, data.samples, batch_size)


@dataclass(frozen=True)
class SegmentationMetric(Metric):
    """Score of classes of pixels. Outputs are as `outputs.overlaps_of` returns them, which counted the labels."""

    def load(self, rows: list[Any], reader: RowReader) -> LabelledSamples:
        return with_maps(rows, reader)

    def outputs(self, model: PreTrainedModel, data: LabelledSamples, batch_size: int) -> Tensor:
        return overlaps_of(model, data.samples, data.labels, batch_size)

    def labels(self, data: LabelledSamples) -> Tensor:
        """`[N]` zeros: the outputs hold all that the maps say."""
        return torch.zeros(len(data.labels))


@dataclass(frozen=True)
class TextMetric(Metric):
    """Score of answers in words. Outputs are `N` texts, labels `N` lists of right texts.

    Attributes:
        single: whether an answer is compared with one right text alone.
        score_answer: function of one answer and its right texts, if `score` is the mean of its values.
    """

    single: bool = False
    score_answer: Optional[Callable[[str, Sequence[str]], float]] = None

    @classmethod
    def mean_of(
        cls, name: str, score_answer: Callable[[str, Sequence[str]], float], is_share: bool = False
    ) -> "TextMetric":
        """Metric that is the mean of a score of each answer."""

        def score(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
            return sum(map(score_answer, answers, accepted)) / len(answers)

        return cls(name, score, is_share=is_share, score_answer=score_answer)

    def load(self, rows: list[Any], reader: RowReader) -> LabelledSamples:
        return with_texts(rows, reader, self.name, self.single)

    def outputs(self, model: PreTrainedModel, data: LabelledSamples, batch_size: int) -> list[str]:
        return texts_of(model, data, batch_size)

    def scores_of_draws(self, outputs: list[str], labels: list[list[str]], draws: Tensor) -> Tensor:
        if self.score_answer is None:
            return super().scores_of_draws(outputs, labels, draws)
        return torch.tensor(list(map(self.score_answer, outputs, labels)), dtype=torch.float64)[draws].mean(1)


@dataclass(frozen=True)
class PairMetric(Metric):
    """Score of embeddings of pairs of texts. Outputs are `[N]`: if `scored`, the cosines of the pairs, and labels the
    scores of the rows; else the rank of each pair's second text for its first (see `pairs`), and labels are not read.
    """

    scored: bool = False

    def load(self, rows: list[Any], reader: RowReader) -> LabelledSamples:
        return with_pairs(rows, reader, self.scored)

    def outputs(self, model: PreTrainedModel, data: LabelledSamples, batch_size: int) -> Tensor:
        return (cosines_of if self.scored else ranks_of)(model, data, batch_size)


@dataclass(frozen=True)
class ReadMetric(Metric):
    """Score of what `read` makes of each sample's outputs, for heads of any kind.

    Outputs are a list of what `read` returns, labels a list of what the rows hold. Both must consist of numbers,
    texts, lists, and dictionaries with texts as keys if `compare` is to cache them.
    """

    def load(self, rows: list[Any], reader: RowReader) -> LabelledSamples:
        return with_references(rows, reader)

    def outputs(self, model: PreTrainedModel, data: LabelledSamples, batch_size: int) -> list[Any]:
        return readings_of(model, data.samples, self.read, batch_size)


def right_answers(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Number of right answers in each sample, and of all that count: both `[N]` float64.

    A sample has one answer, or as many as it has labelled tokens. Where several labels may hold, all must be right.
    """
    right, counted = outputs == labels, labels != -100
    if labels.dtype == torch.bool:
        right, counted = right.all(1), counted.all(1)
    right, counted = (right & counted).double(), counted.double()
    return right.reshape(len(labels), -1).sum(1), counted.reshape(len(labels), -1).sum(1)


def _share_right(outputs: Tensor, labels: Tensor) -> float:
    right, counted = right_answers(outputs, labels)
    return float(right.sum() / counted.sum())


def _perplexity(outputs: Tensor, _: Tensor) -> float:
    total, tokens = outputs.double().sum(0)
    if not tokens:
        raise HfEsmError("Perplexity: no sample has a token to predict. Give texts of two tokens or more.")
    return float((total / tokens).exp())


def _mean_iou(overlaps: Tensor, _: Tensor) -> float:
    """Mean over the classes that are answered or labelled in any sample, each over all samples together."""
    both, answered, labelled = overlaps.double().sum(0)
    either = answered + labelled - both
    if not either.any():
        raise HfEsmError("mean-iou: no pixel has a class. Give maps of classes that the model knows.")
    return float((both / either)[either > 0].mean())


ACCURACY = AccuracyMetric("accuracy", _share_right, is_share=True)


PERPLEXITY = PerplexityMetric("perplexity", _perplexity, higher_is_better=False)


MEAN_IOU = SegmentationMetric("mean-iou", _mean_iou)


EXACT_MATCH = TextMetric.mean_of("exact-match", is_accepted, is_share=True)


WORD_F1 = TextMetric.mean_of("word-f1", word_overlap)


SPEARMAN = ValueMetric("spearman", spearman)


SIMILARITY = PairMetric("similarity", spearman, scored=True)


MRR = PairMetric("mrr@10", reciprocal_rank)


RECALL = PairMetric("recall@10", recall_at_10, is_share=True)


def load_labelled(
    data: Any,
    processor: Any,
    config: PretrainedConfig,
    title: str,
    options: SampleOptions,
    metric: Metric = ACCURACY,
) -> LabelledSamples:
    """Read, select and encode labelled rows.

    A row's label is in the column `label`, or the one that `options.columns` names, or `labels`. Which labels a row
    may hold depends on the metric:

    - classes: a class index or one of the model's label names; a number for a head of one label; a list of labels, or
      of 0 or 1 for every label, where `config.problem_type` says that several may hold; a list with a label for each
      word where the text is a list of words, or for each token of ready `input_ids` (-100 for tokens that do not
      count);
    - texts: the right text, a list of right texts, or SQuAD's `{"text": [...]}` (empty if there is no answer); by
      default the column `text_target`;
    - `mean-iou`: a map of classes of any size, as a picture or an array;
    - `similarity`: how alike the two texts of a row are, as a number of any range;
    - `perplexity`, `mrr@10`, `recall@10`: none;
    - a metric with `read`: anything.

    Args:
        data: rows in any form that `merge_models` takes.
        title: name of the rows in errors.
        options: `num_samples` 0 takes all rows.

    Raises:
        HfEsmError: if a row has no label, or one that the model does not know.
    """
    if metric.name == "lm_eval":
        raise HfEsmError(f"{title}: lm_eval has rows of its own. Score these by another metric, such as 'perplexity'.")
    return metric.load(read_rows(data, title, options), RowReader(processor, config, title, options))
