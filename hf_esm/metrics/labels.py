"""Labelled rows: encoded samples, and the label of each in the form that a kind of metric compares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig

from ..data import Sample, SampleOptions, encode, is_words, row_fields
from ..errors import HfEsmError
from ..utils import did_you_mean


@dataclass
class LabelledSamples:
    """Samples of one task with their labels.

    Attributes:
        samples: `N` model inputs.
        labels: `N` labels. Their form depends on the kind of metric: see the functions of this module.
        contexts: for rows of two texts that are scored by texts: which tokens of each sample, `[L]` bool, belong to
            the second text.
        tokenizer: decodes answers, for metrics of texts.
        partners: the second text of each row, for metrics of pairs.
    """

    samples: list[Sample]
    labels: Tensor | list[Any]
    contexts: list[Tensor] = field(default_factory=list)
    tokenizer: Any = None
    partners: list[Sample] = field(default_factory=list)

    def first(self, count: int) -> "LabelledSamples":
        """Return the first rows."""
        parts = (self.samples, self.labels, self.contexts, self.tokenizer, self.partners)
        return LabelledSamples(*(part if part is self.tokenizer else part[:count] for part in parts))

    def decode(self, tokens: Tensor) -> str:
        """Text of an answer's tokens, `[L]` int64."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@dataclass(frozen=True)
class RowReader:
    """Encoder of one task's rows, which also finds their labels.

    Attributes:
        processor: tokenizer or processor; None is enough for rows of ready model inputs.
        config: config of the model that will answer.
        title: name of the rows in errors, such as `data of 'sst2'`.
        options: how texts are cut, and the names of columns.
    """

    processor: Any
    config: PretrainedConfig
    title: str
    options: SampleOptions

    @property
    def label_columns(self) -> tuple[str, str]:
        """Columns that may hold a label, the first choice first."""
        return self.column("label"), "labels"

    def column(self, name: str) -> str:
        """Name that the rows have for the column `name`."""
        return self.options.columns.get(name, name)

    def row_title(self, index: int) -> str:
        return f"{self.title}: row {index}"

    def encode(self, rows: list[Any], **settings: bool) -> list[Sample]:
        """Rows as model inputs; `settings` are those of `data.encode`."""
        return encode(rows, self.processor, self.config, self.title, self.options, **settings)

    def label(self, row: Any, index: int, *fallbacks: str) -> Any:
        """Label of a row: the first value in `label_columns`, or in the columns `fallbacks`."""
        columns = (*self.label_columns, *fallbacks)
        label = None
        if isinstance(row, Mapping):
            label = next((row[column] for column in columns if row.get(column) is not None), None)
        if label is None:
            others = [name for name in row if name not in columns] if isinstance(row, Mapping) else []
            meant = did_you_mean(columns[0], others)
            raise HfEsmError(
                f"{self.row_title(index)} needs a label in the column {columns[0]!r}{meant}. If it is in another "
                "column, name that in `columns={'label': …}`."
            )
        return label.tolist() if hasattr(label, "tolist") else label

    def labels(self, rows: list[Any]) -> list[Any]:
        return [self.label(row, i) for i, row in enumerate(rows)]

    def unlabelled(self, rows: list[Mapping[str, Any]], *columns: str) -> list[dict[str, Any]]:
        """Rows without their labels, and without `columns`."""
        removed = {*self.label_columns, *columns}
        return [{name: value for name, value in row.items() if name not in removed} for row in rows]


def with_targets(rows: list[Any], reader: RowReader) -> LabelledSamples:
    """Samples that hold what the model should write; `labels` are `[N]` zeros."""
    return LabelledSamples(reader.encode(rows, with_targets=True), torch.zeros(len(rows), dtype=torch.int64))


def with_references(rows: list[Any], reader: RowReader) -> LabelledSamples:
    """Samples whose `labels` are a list of what the rows hold, unchanged."""
    references = reader.labels(rows)
    return LabelledSamples(reader.encode(reader.unlabelled(rows)), references)


def with_classes(rows: list[Any], reader: RowReader) -> LabelledSamples:
    """Samples with classes or values as `labels`.

    They are `[N]` int64 classes, or `[N]` float32 values for a head of one label; `[N, C]` bool, which labels hold,
    where several may (`config.problem_type`); `[N, L]` int64, the class of each token, -100 for tokens that do not
    count.
    """
    labels, config = reader.labels(rows), reader.config
    if config.problem_type == "multi_label_classification":
        marked = all(_marks_every_class(label, config) for label in labels)
        read = [_several_labels(label, config, reader.row_title(i), marked) for i, label in enumerate(labels)]
    elif _labels_parts(rows[0], labels[0], reader):
        return _with_token_classes(rows, labels, reader)
    else:
        read = [_one_label(label, config, reader.row_title(i)) for i, label in enumerate(labels)]
    return LabelledSamples(reader.encode(rows), torch.tensor(read))


def with_texts(rows: list[Any], reader: RowReader, metric: str, single: bool = False) -> LabelledSamples:
    """Samples with the right answers to each as `labels`: a list of texts per row, `[""]` for a question that has no
    answer.

    Right answers are encoded and decoded once, so that they are spelled as the model's answers are.

    Args:
        metric: name of the metric, for errors.
        single: refuse rows that have more than one right answer.
    """
    tokenizer = getattr(reader.processor, "tokenizer", reader.processor)
    if not hasattr(tokenizer, "decode"):
        raise HfEsmError(
            f"{reader.title}: {metric} compares texts and needs a tokenizer. Save one in the model's folder, or pass "
            "`processor`."
        )
    target = reader.column("text_target")
    accepted = [_right_texts(reader.label(row, i, target), reader.row_title(i), metric) for i, row in enumerate(rows)]
    for i, texts in enumerate(accepted):
        if single and len(texts) > 1:
            raise HfEsmError(f"{reader.row_title(i)}: {metric} compares with one right text, not {texts!r}. Give one.")
    samples = reader.encode(reader.unlabelled(rows, target), with_contexts=True)
    contexts = [sample.pop("context") for sample in samples if "context" in sample]
    labelled = LabelledSamples(samples, [], contexts, tokenizer)
    for texts in accepted:
        tokens = tokenizer(texts, add_special_tokens=False).input_ids
        spelled = [labelled.decode(torch.tensor(ids, dtype=torch.int64)) for ids in tokens]
        # A text of unknown tokens alone stays as it is: an empty text would say that there is no answer.
        labelled.labels.append([new or text for new, text in zip(spelled, texts, strict=True)])
    return labelled


def with_maps(rows: list[Any], reader: RowReader) -> LabelledSamples:
    """Samples with the class of every pixel as `labels`: per row `[H, W]` int64, -100 where no class counts."""
    images = getattr(reader.processor, "image_processor", reader.processor)
    reduces = bool(getattr(images, "do_reduce_labels", False))
    maps = [
        # Rows with ready pixels hold maps that the processor has reduced already.
        read_map(label, reader.config, reader.row_title(i), reduces and "pixel_values" not in rows[i])
        for i, label in enumerate(reader.labels(rows))
    ]
    return LabelledSamples(reader.encode(reader.unlabelled(rows)), maps)


def with_pairs(rows: list[Any], reader: RowReader, scored: bool = False) -> LabelledSamples:
    """Samples of the first texts, with the second ones as `partners`; `labels` are `[N]` float64 scores, or zeros
    unless rows are `scored`.
    """
    fields = [row_fields(row, reader.row_title(i), reader.options) for i, row in enumerate(rows)]
    for i, row in enumerate(fields):
        if "text" not in row or "text_pair" not in row:
            raise HfEsmError(
                f"{reader.row_title(i)} is not a pair of texts. Name the columns of both in `columns`, such as text: "
                "sentence1, text_pair: sentence2."
            )
    first, second = (
        reader.encode([{reader.column("text"): row[name]} for row in fields]) for name in ("text", "text_pair")
    )
    labels = torch.zeros(len(rows), dtype=torch.float64)
    if scored:
        labels = torch.tensor([_score(label, reader.row_title(i)) for i, label in enumerate(reader.labels(rows))])
    return LabelledSamples(first, labels.double(), partners=second)


def _score(label: Any, title: str) -> float:
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = float("nan")
    if not isfinite(value):
        raise HfEsmError(f"{title}: similarity needs a number that says how alike the two texts are, not {label!r}.")
    return value


def _right_texts(label: Any, title: str, metric: str) -> list[str]:
    """Right answers of a row, from a text, a list of texts, or SQuAD's `{"text": [...]}`."""
    label = label["text"] if isinstance(label, Mapping) and "text" in label else label
    texts = [label] if isinstance(label, str) else label
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise HfEsmError(f"{title}: {metric} needs the right text, or a list of right texts, not {label!r}.")
    return list(texts) or [""]


def _with_token_classes(rows: list[Any], labels: list[Any], reader: RowReader) -> LabelledSamples:
    rows = [_with_part_classes(row, label, i, reader) for i, (row, label) in enumerate(zip(rows, labels))]
    samples = reader.encode(rows, with_targets=True)
    classes = pad_sequence([sample.pop("labels") for sample in samples], True, -100)
    if (classes == -100).all():
        raise HfEsmError(f"{reader.title}: no token has a label other than -100.")
    return LabelledSamples(samples, classes)


def _parts(row: Mapping[str, Any], reader: RowReader) -> Sequence[Any]:
    """Words or tokens of a row; empty for a row of plain text."""
    text = row.get("input_ids", row.get(reader.column("text")))
    return () if text is None or isinstance(text, str) else text


def _labels_parts(row: Mapping[str, Any], label: Any, reader: RowReader) -> bool:
    """Whether a label is a list with one class per word or token."""
    parts = _parts(row, reader)
    return isinstance(label, (list, tuple)) and (len(parts) == len(label) > 0 or is_words(parts))


def _with_part_classes(row: Any, labels: Any, index: int, reader: RowReader) -> dict[str, Any]:
    """Row with the class index of each word or token in the column that `encode` reads."""
    title, count = reader.row_title(index), len(_parts(row, reader))
    if not isinstance(labels, (list, tuple)) or count != len(labels):
        raise HfEsmError(f"{title} has {count} words or tokens, but the labels {labels!r}. Give one label for each.")
    classes = [-100 if label == -100 else _one_label(label, reader.config, title) for label in labels]
    (unlabelled,) = reader.unlabelled([row])
    return {**unlabelled, "labels" if "input_ids" in row else reader.column("label"): classes}


def _one_label(label: Any, config: PretrainedConfig, title: str) -> float:
    """Class index of a label, or the value for a head of one label."""
    if isinstance(label, str):
        if label not in config.label2id:
            meant = did_you_mean(label, config.label2id)
            raise HfEsmError(
                f"{title}: the expert has no label {label!r}{meant}; it has {list(config.label2id)[:10]}."
            )
        return config.label2id[label]
    try:
        value = float(label)
    except (TypeError, ValueError, RuntimeError):
        raise HfEsmError(
            f"{title}: a label is {label!r:.80}, but the expert answers one class, or one value, per row. If several "
            "labels may hold, set problem_type to 'multi_label_classification' in its config; for classes of pixels, "
            "use the metric mean-iou."
        ) from None
    if not isfinite(value):
        raise HfEsmError(f"{title}: a label is {value}. Leave the row out.")
    if config.num_labels == 1:
        return value
    if not value.is_integer():
        raise HfEsmError(
            f"{title}: a label is {value}, but the expert answers a class per row. Give its index or name."
        )
    # A row of multiple choice has its own number of choices.
    chooses = (config.architectures or [""])[0].endswith("ForMultipleChoice")
    if value < 0 or (value >= config.num_labels and not chooses):
        raise HfEsmError(f"{title}: label {int(value)}, but the expert knows {config.num_labels} classes.")
    return int(value)


def _marks_every_class(label: Any, config: PretrainedConfig) -> bool:
    """Whether a label is a list with 0 or 1 for every class."""
    listed = isinstance(label, (list, tuple)) and len(label) == config.num_labels
    return listed and all(not isinstance(mark, str) and mark in (0, 1) for mark in label)


def _several_labels(label: Any, config: PretrainedConfig, title: str, marked: bool) -> list[bool]:
    """Which classes hold in a row, from 0 or 1 for every class if all rows are so `marked`, else from a list."""
    if not isinstance(label, (list, tuple)):
        raise HfEsmError(
            f"{title}: a label is {label!r}, but the expert answers several labels per row: give a list of them."
        )
    if marked:
        return [bool(mark) for mark in label]
    classes = [_one_label(name, config, title) for name in label]
    if len(set(classes)) < len(classes):
        raise HfEsmError(
            f"{title}: the labels {label!r} name a class twice. List the classes that hold, or give, in all rows, 0 "
            f"or 1 for each of the {config.num_labels} classes."
        )
    return [i in classes for i in range(config.num_labels)]


def read_map(label: Any, config: PretrainedConfig, title: str, reduced: bool = False) -> Tensor:
    """Picture or array of classes as `[H, W]` int64, -100 where no class counts.

    Pixels of class `config.semantic_loss_ignore_index` (255) do not count. If `reduced`, pixels of class 0 do not
    count either and all other classes are lowered by one, as an image processor's `do_reduce_labels` does.
    """
    try:
        classes = np.asarray(label)
    except ValueError as error:
        raise HfEsmError(f"{title}: a label is not a map of classes ({error}).") from None
    if classes.ndim != 2 or classes.dtype.kind not in "ui":
        raise HfEsmError(
            f"{title}: a label is {classes.dtype} of shape {classes.shape}; mean-iou needs whole numbers of shape "
            "[height, width], the class of each pixel. A picture must be grey or have a palette."
        )
    pixels = torch.from_numpy(classes.astype(np.int64))
    ignored = (pixels == getattr(config, "semantic_loss_ignore_index", 255)) | (pixels == -100)
    if reduced:
        ignored |= pixels == 0
        pixels = pixels - 1
    if (wrong := pixels[~ignored & ((pixels < 0) | (pixels >= config.num_labels))]).numel():
        raise HfEsmError(f"{title}: a pixel has the class {int(wrong[0])}, but the expert knows {config.num_labels}.")
    return pixels.masked_fill(ignored, -100)
