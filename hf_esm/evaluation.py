"""Scores of a model on labelled rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedModel

from .errors import HfEsmError
from .proxies import ProxyOptions, Sample, collate, encode, read_rows


@dataclass
class LabelledSamples:
    """Encoded rows and the class that each belongs to."""

    samples: list[Sample]
    labels: list[int]


def load_labelled(data: Any, processor: Any, config: Any, title: str, options: ProxyOptions) -> LabelledSamples:
    """Read, select and encode labelled rows.

    The label stands in the column `label` (or what `options.columns` names), as a class index or as one of the
    model's label names. `options.num_samples` 0 takes all rows.

    Raises:
        HfEsmError: if a row has no label, or one that the model does not know.
    """
    rows = read_rows(data, title, options)
    labels = [_label(row, config, title, options) for row in rows]
    return LabelledSamples(encode(rows, processor, config, title, options), labels)


def _label(row: Any, config: Any, title: str, options: ProxyOptions) -> int:
    column = options.columns.get("label", "label")
    found = row.get(column, row.get("labels")) if isinstance(row, Mapping) else None
    if found is None:
        raise HfEsmError(f"{title}: rows need a label; name its column with columns={{'label': …}}.")
    if isinstance(found, str):
        if found not in config.label2id:
            raise HfEsmError(f"{title}: the expert has no label {found!r}; it has {list(config.label2id)[:10]}.")
        return config.label2id[found]
    if not 0 <= int(found) < config.num_labels:
        raise HfEsmError(f"{title}: label {int(found)}, but the expert knows {config.num_labels} classes.")
    return int(found)


@torch.no_grad()
def predict(model: PreTrainedModel, samples: list[Sample], batch_size: int = 32) -> torch.Tensor:
    """The class of highest logit per sample, `[N]` int64 on the CPU. Samples of like length share a batch."""
    device = next(model.parameters()).device
    order = sorted(range(len(samples)), key=lambda i: max(value.numel() for value in samples[i].values()))
    classes = torch.empty(len(samples), dtype=torch.long)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = send_to_device(collate([samples[i] for i in chosen], model.config), device)
        batch = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in batch.items()}
        classes[chosen] = model(**batch).logits.argmax(-1).cpu()
    return classes


def accuracy(model: PreTrainedModel, data: LabelledSamples, batch_size: int = 32) -> float:
    """Share of samples whose class is right, in [0, 1]."""
    return float((predict(model, data.samples, batch_size) == torch.tensor(data.labels)).float().mean())
