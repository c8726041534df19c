"""Labelled rows: samples, and what is right of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig

from ..data import Sample, SampleOptions, encode, is_words, read_rows
from ..errors import HfEsmError
from .metric import ACCURACY, Metric


@dataclass
class LabelledSamples:
    """Encoded rows and what is right of each.

    Attributes:
        samples: `N` model inputs.
        labels: `[N]` classes, int64, or values, float32, where the model has one label; `[N, C]` bool, which of a head
            of several labels hold; `[N, L]` int64, the class of each token, -100 where none is asked for; `[N]` of 0
            where there are none, or they are texts.
        texts: the right answers to each row, where they are texts; an unanswerable question's is empty.
        maps: the class of each pixel, `[H, W]` int64 and -100 where none is asked for, of each row where it has one.
        references: what stands in the column of labels, as it is, for a metric with `read`.
        contexts: which tokens of each sample, `[L]` bool, are of its second text, where it has one.
        tokenizer: what reads answers in tokens.
    """

    samples: list[Sample]
    labels: Tensor
    texts: list[list[str]] = field(default_factory=list)
    maps: list[Tensor] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)
    contexts: list[Tensor] = field(default_factory=list)
    tokenizer: Any = None

    def read(self, tokens: Tensor) -> str:
        """The text of an answer's tokens, `[L]` int64."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def load_labelled(
    data: Any,
    processor: Any,
    config: PretrainedConfig,
    title: str,
    options: SampleOptions,
    metric: Metric = ACCURACY,
) -> LabelledSamples:
    """Read, select and encode labelled rows.

    The label stands in the column `label` (or what `options.columns` names): as a class index or one of the model's
    label names; as a number where the model has one label; as a list of either, or of a 0 or 1 for every label, where
    `config.problem_type` says that several may hold; as a list with one of each word where the text is a list of
    words, or of each token beside ready `input_ids` (`labels`, -100 where none is asked for).
    Where `metric` is one of texts, it is a right answer, a list of them, or SQuAD's `{"text": [...]}` (empty where
    there is none); by default the `text_target`. `options.num_samples` 0 takes all rows. Of perplexity, the rows need
    no label; of mean-iou, it is a map of classes, as a picture or an array, of any size.

    Raises:
        HfEsmError: if a row has no label, or one that the model does not know.
    """
    rows = read_rows(data, title, options)
    if metric.reads_texts:
        return _with_texts(rows, processor, config, title, options, metric)
    if metric.reads_maps:
        return _with_maps(rows, processor, config, title, options)
    if metric.read is not None:
        references = [_label_in(row, f"{title}: row {i}", options) for i, row in enumerate(rows)]
        samples = encode(_unlabelled(rows, options), processor, config, title, options)
        return LabelledSamples(samples, torch.zeros(len(rows)), references=references)
    if not metric.needs_labels:
        samples = encode(rows, processor, config, title, options, with_targets=True)
        return LabelledSamples(samples, torch.zeros(len(rows), dtype=torch.int64))
    found = [_label_in(row, f"{title}: row {i}", options) for i, row in enumerate(rows)]
    several = config.problem_type == "multi_label_classification"
    if not several and _labels_parts(rows[0], found[0], options):
        for i, label in enumerate(found):
            rows[i] = _with_labels_of_parts(rows[i], label, config, f"{title}: row {i}", options)
        samples = encode(rows, processor, config, title, options, with_targets=True)
        labels = pad_sequence([sample.pop("labels") for sample in samples], True, -100)
        if (labels == -100).all():
            raise HfEsmError(f"{title}: no token has a label other than -100.")
        return LabelledSamples(samples, labels)
    marked = several and all(_marks_each(label, config) for label in found)
    read = partial(_several_labels, marked=marked) if several else _label
    labels = [read(label, config, f"{title}: row {i}") for i, label in enumerate(found)]
    return LabelledSamples(encode(rows, processor, config, title, options), torch.tensor(labels))


def _with_texts(
    rows: list[Any], processor: Any, config: PretrainedConfig, title: str, options: SampleOptions, metric: Metric
) -> LabelledSamples:
    """Rows whose right answers are texts. These are read as the model's are, from their tokens."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "decode"):
        raise HfEsmError(f"{title}: {metric.name} reads texts, and there is no tokenizer. Pass `processor=`.")
    columns = [options.columns.get(name, name) for name in ("label", "text_target")]
    found = []
    for i, row in enumerate(rows):
        label = _label_in(row, f"{title}: row {i}", options, columns[1])
        label = label["text"] if isinstance(label, Mapping) and "text" in label else label
        texts = [label] if isinstance(label, str) else label
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise HfEsmError(
                f"{title}: row {i}: {metric.name} needs the right text, or a list of them, not {label!r}."
            )
        if metric.of_one_text and len(texts) > 1:
            raise HfEsmError(f"{title}: row {i}: {metric.name} compares with one right text, not {label!r}. Give one.")
        found.append(list(texts) or [""])
    rows = [{name: value for name, value in row.items() if name not in columns} for row in rows]
    samples = encode(rows, processor, config, title, options, with_contexts=True)
    for sample in samples:
        sample.pop("labels", None)  # of ready inputs: not for it to see
    contexts = [sample.pop("context") for sample in samples if "context" in sample]
    labelled = LabelledSamples(samples, torch.zeros(len(rows)), contexts=contexts, tokenizer=tokenizer)
    tokens = [tokenizer(texts, add_special_tokens=False).input_ids for texts in found]
    labelled.texts = [  # what the tokenizer does not know stays as it is: no text means that there is no answer
        [labelled.read(torch.tensor(ids, dtype=torch.int64)) or text for text, ids in zip(*row, strict=True)]
        for row in zip(found, tokens, strict=True)
    ]
    return labelled


def _with_maps(
    rows: list[Any], processor: Any, config: PretrainedConfig, title: str, options: SampleOptions
) -> LabelledSamples:
    """Rows that say of each pixel which class it has."""
    images = getattr(processor, "image_processor", processor)
    maps = []
    for i, row in enumerate(rows):
        label = _label_in(row, f"{title}: row {i}", options)
        # What a processor made of a map, beside pixels, it has reduced already.
        reduced = bool(getattr(images, "do_reduce_labels", False)) and "pixel_values" not in row
        maps.append(read_map(label, config, f"{title}: row {i}", reduced))
    samples = encode(_unlabelled(rows, options), processor, config, title, options)
    return LabelledSamples(samples, torch.zeros(len(rows)), maps=maps)


def _unlabelled(rows: list[Any], options: SampleOptions) -> list[dict[str, Any]]:
    columns = (options.columns.get("label", "label"), "labels")
    return [{name: value for name, value in row.items() if name not in columns} for row in rows]


def _label_in(row: Any, title: str, options: SampleOptions, *others: str) -> Any:
    """What stands in the column of labels, or else in one of `others`."""
    columns = (options.columns.get("label", "label"), "labels", *others)
    found = None
    if isinstance(row, Mapping):
        found = next((row[column] for column in columns if row.get(column) is not None), None)
    if found is None:
        raise HfEsmError(f"{title} needs a label; name its column with columns={{'label': …}}.")
    return found.tolist() if hasattr(found, "tolist") else found


def _parts(row: Mapping[str, Any], options: SampleOptions) -> Any:
    """The words or tokens of a row, if it comes in such."""
    text = row.get("input_ids", row.get(options.columns.get("text", "text")))
    return () if text is None or isinstance(text, str) else text


def _labels_parts(row: Mapping[str, Any], label: Any, options: SampleOptions) -> bool:
    """Whether a label is one of each word, or of each token."""
    parts = _parts(row, options)
    return isinstance(label, (list, tuple)) and (len(parts) == len(label) > 0 or is_words(parts))


def _with_labels_of_parts(row: Any, labels: Any, config: Any, title: str, options: SampleOptions) -> dict[str, Any]:
    """The row with class indices for its words or tokens, in the column in which `encode` looks for them."""
    count = len(_parts(row, options))
    if not isinstance(labels, (list, tuple)) or count != len(labels):
        raise HfEsmError(f"{title} has {count} words or tokens, but the labels {labels!r}. Give one for each.")
    classes = [-100 if label == -100 else _label(label, config, title) for label in labels]
    column = options.columns.get("label", "label")
    rest = {name: value for name, value in row.items() if name not in (column, "labels")}
    return {**rest, "labels" if "input_ids" in row else column: classes}


def _label(found: Any, config: Any, title: str) -> float:
    """A class index, or the value of a head of one label."""
    if isinstance(found, str):
        if found not in config.label2id:
            raise HfEsmError(f"{title}: the expert has no label {found!r}; it has {list(config.label2id)[:10]}.")
        return config.label2id[found]
    try:
        found = float(found)
    except (TypeError, ValueError, RuntimeError):
        raise HfEsmError(
            f"{title}: a label is {found!r:.80}, but the expert gives one class, or one value, per row. If several "
            "may hold, set problem_type to 'multi_label_classification' in its config; of pixels, there is mean-iou."
        ) from None
    if not isfinite(found):
        raise HfEsmError(f"{title}: a label is {found}. Leave the row out.")
    if config.num_labels == 1:
        return found
    if not found.is_integer():
        raise HfEsmError(f"{title}: a label is {found}, but the expert gives a class per row. Give its index or name.")
    chooses = (config.architectures or [""])[0].endswith("ForMultipleChoice")  # among as many as the row has
    if found < 0 or (found >= config.num_labels and not chooses):
        raise HfEsmError(f"{title}: label {int(found)}, but the expert knows {config.num_labels} classes.")
    return int(found)


def _marks_each(found: Any, config: Any) -> bool:
    """Whether a label is a 0 or 1 for every class."""
    listed = isinstance(found, (list, tuple)) and len(found) == config.num_labels
    return listed and all(not isinstance(label, str) and label in (0, 1) for label in found)


def _several_labels(found: Any, config: Any, title: str, marked: bool) -> list[bool]:
    """Which labels hold, of a 0 or 1 for each if they are all so `marked`, or a list of those that do."""
    if not isinstance(found, (list, tuple)):
        raise HfEsmError(f"{title}: a label is {found!r}, but the expert gives several per row: give a list of them.")
    if marked:
        return [bool(label) for label in found]
    classes = [_label(label, config, title) for label in found]
    if len(set(classes)) < len(classes):
        raise HfEsmError(
            f"{title}: the labels {found!r} name one twice. Give those that hold, or, in all rows, a 0 or 1 for each "
            f"of the {config.num_labels}."
        )
    return [i in classes for i in range(config.num_labels)]


def read_map(label: Any, config: PretrainedConfig, title: str, reduced: bool = False) -> Tensor:
    """A picture or an array of classes as `[H, W]` int64, -100 where none is asked for.

    Those are `config.semantic_loss_ignore_index` (255); and, if `reduced`, 0, and all other classes count one less, as
    an image processor's `do_reduce_labels` has it.
    """
    try:
        classes = np.asarray(label)
    except ValueError as error:
        raise HfEsmError(f"{title}: a label is no map of classes ({error}).") from None
    if classes.ndim != 2 or classes.dtype.kind not in "ui":
        raise HfEsmError(
            f"{title}: a label is {classes.dtype} of shape {classes.shape}; mean-iou needs whole numbers of shape "
            "[height, width], the class of each pixel. A picture of them has to be grey, or have a palette."
        )
    found = torch.from_numpy(classes.astype(np.int64))
    unasked = (found == getattr(config, "semantic_loss_ignore_index", 255)) | (found == -100)
    if reduced:
        unasked |= found == 0
        found = found - 1
    if (wrong := found[~unasked & ((found < 0) | (found >= config.num_labels))]).numel():
        raise HfEsmError(f"{title}: a pixel has the class {int(wrong[0])}, but the expert knows {config.num_labels}.")
    return found.masked_fill(unasked, -100)
