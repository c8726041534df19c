"""Metrics of classes that are functions of a confusion matrix: F1 and Matthews' correlation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import HfEsmError
from .labels import LabelledSamples
from .metric import ClassMetric


@dataclass(frozen=True)
class ConfusionMetric(ClassMetric):
    """Score that the confusion matrix of all rows tells, so that a draw of rows needs no count of its own.

    Attributes:
        of_tables: returns the scores `[…]` float64 of confusion matrices `[…, T, C, C]` (the label, the answer): of
            one matrix (`T` is 1), or of one for every label where several may hold (`C` is 2).
        of_two: whether the score is of two classes alone.
        of_one: whether the score is of one class per sample or token, not of several labels that may hold.
    """

    of_tables: Callable[[Tensor], Tensor] = torch.Tensor.double
    of_two: bool = False
    of_one: bool = False

    @classmethod
    def of(cls, name: str, of_tables: Callable[[Tensor], Tensor], *, of_two: bool = False, of_one: bool = False):
        """Metric that is a function of confusion matrices."""

        def score(outputs: Tensor, labels: Tensor) -> float:
            return float(of_tables(confusion_tables(outputs, labels).sum(0)))

        return cls(name, score, of_tables=of_tables, of_two=of_two, of_one=of_one)

    def outputs(self, model: PreTrainedModel, data: LabelledSamples, batch_size: int) -> Tensor:
        kind, config = type(model).__name__, model.config
        if config.num_labels == 1:
            raise HfEsmError(f"{kind} gives one value, not a class. Choose a metric of values, such as 'spearman'.")
        several = config.problem_type == "multi_label_classification"
        if (self.of_two and config.num_labels != 2) or ((self.of_two or self.of_one) and several):
            counted = "two classes" if self.of_two else "one class per sample"
            found = f"{config.num_labels} labels" + (", of which several may hold" if several else "")
            raise HfEsmError(f"{self.name} is of {counted}, but {kind} has {found}. Choose the metric 'f1-macro'.")
        return super().outputs(model, data, batch_size)

    def scores_of_draws(self, outputs: Tensor, labels: Tensor, draws: Tensor) -> Tensor:
        tables = confusion_tables(outputs, labels)
        times = torch.zeros(len(draws), len(labels), dtype=torch.float64)
        times.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))
        drawn = (times @ tables.flatten(1)).reshape(len(draws), *tables.shape[1:])
        return self.of_tables(drawn)


def confusion_tables(outputs: Tensor, labels: Tensor) -> Tensor:
    """Confusion matrix of every sample, `[N, T, C, C]` float64; see `ConfusionMetric`.

    Args:
        outputs: answers as `ClassMetric` has them.
        labels: labels of the same shape; -100 where no class counts.
    """
    if labels.dtype == torch.bool:
        answered, labelled = outputs.long(), labels.long()
        pairs = 2 * labelled + answered
        return torch.nn.functional.one_hot(pairs, 4).double().reshape(*labels.shape, 2, 2)
    counted = labels != -100
    answered, labelled = (
        values.masked_fill(~counted, 0).long().reshape(len(labels), -1) for values in (outputs, labels)
    )
    counts = max(int(answered.max()), int(labelled.max()), 1) + 1
    tables = torch.zeros(len(labels), counts * counts, dtype=torch.float64)
    tables.scatter_add_(1, labelled * counts + answered, counted.reshape(len(labels), -1).double())
    return tables.reshape(len(labels), 1, counts, counts)


def f1_of_tables(tables: Tensor) -> Tensor:
    """F1 of class 1, the harmonic mean of precision and recall, `2 TP / (2 TP + FP + FN)`; 0 without any.

    Args:
        tables: `[…, 1, C, C]`.
    """
    return _f1_by_class(tables)[0][..., 0, 1]


def macro_f1_of_tables(tables: Tensor) -> Tensor:
    """Mean of F1 over the classes that are labelled or answered, or over all labels where several may hold.

    Args:
        tables: `[…, T, C, C]`.
    """
    f1, present = _f1_by_class(tables)
    if tables.shape[-3] > 1:
        return f1[..., 1].mean(-1)
    return (f1 * present).sum((-1, -2)) / present.sum((-1, -2))


def _f1_by_class(tables: Tensor) -> tuple[Tensor, Tensor]:
    """F1 of every class `[…, T, C]`, and whether the class is labelled or answered."""
    right = tables.diagonal(dim1=-2, dim2=-1)
    both = tables.sum(-1) + tables.sum(-2)
    return 2 * right / both.clamp(min=1), both > 0


def mcc_of_tables(tables: Tensor) -> Tensor:
    """Matthews' correlation of labels and answers, for any number of classes (Gorodkin, 2004); 0 where either are all
    of one class.

    Args:
        tables: `[…, 1, C, C]`.
    """
    tables = tables[..., 0, :, :]
    labelled, answered, total = tables.sum(-1), tables.sum(-2), tables.sum((-1, -2))
    shared = tables.diagonal(dim1=-2, dim2=-1).sum(-1) * total - (labelled * answered).sum(-1)
    spread = (total**2 - labelled.square().sum(-1)) * (total**2 - answered.square().sum(-1))
    return torch.where(spread > 0, shared / spread.clamp(min=1e-300).sqrt(), 0.0)


F1 = ConfusionMetric.of("f1", f1_of_tables, of_two=True)


F1_MACRO = ConfusionMetric.of("f1-macro", macro_f1_of_tables)


MCC = ConfusionMetric.of("mcc", mcc_of_tables, of_one=True)
