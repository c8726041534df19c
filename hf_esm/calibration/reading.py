"""How a model reads samples that share a batch, learned from passes over two samples."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor

from .hooks import Call, InputHooks, input_rows


@dataclass
class Reading:
    """How a model reads samples that share a batch. All models of one class and one body read alike.

    Attributes:
        left_out: inputs that are not made of samples, such as DeBERTa's relative positions.
        padded: inputs that contain the padding of a batch.
        repeated: readings of embeddings that are made once a batch, such as those of positions.
        alike: whether a padded batch gives the same inputs as single samples, up to rounding. Models with
            convolutions, for example, read the padding.
    """

    left_out: set[Call] = field(default_factory=set)
    padded: set[Call] = field(default_factory=set)
    repeated: set[Call] = field(default_factory=set)
    alike: bool = True


def learn_reading(hooks: InputHooks, run: Callable[[list[int]], Any], mask: Optional[Tensor]) -> Reading:
    """Learn how a model reads batches, by comparing a batch of two samples with the samples alone.

    An input that has the same shape for one sample and for the batch is not made of samples. A reading of an embedding
    that has the same shape is made once a batch.

    Args:
        hooks: hooks on the model.
        run: runs the model on the first sample, `[0]`, the second one, `[1]`, or the batch of both, `[0, 1]`. Both
            have the same shape, or the second one is longer.
        mask: `[2, length]`, 0 where the batch of both is padded; None if both have the same shape.
    """
    reading = Reading()
    alone: dict[Call, list[tuple[torch.Size, Tensor]]] = defaultdict(list)
    shapes: dict[Call, torch.Size] = {}
    singles = (0, 1) if mask is not None else (1,)
    for i in singles:
        with (
            hooks.hooked(lambda call, inputs: alone[call].append((inputs.shape, _sketch(input_rows(inputs))))),
            hooks.embeddings.hooked(lambda call, rows: shapes.update({call: rows.shape})),
        ):
            run([i])
    alike: dict[Call, bool] = {}

    def compare(call: Call, inputs: Tensor) -> None:
        sketches = [sketch for _, sketch in alone.get(call, []) if len(sketch)]
        if len(sketches) == len(singles) and inputs.shape == alone[call][-1][0]:
            reading.left_out.add(call)
        elif mask is not None and sketches:
            expected = torch.cat(sketches)
            padded = inputs.shape[:-1].numel() == mask.numel() != expected.shape[0]
            if padded:
                reading.padded.add(call)
            alike[call] = _agree(input_rows(inputs, mask if padded else None), expected)

    def compare_rows(call: Call, rows: Tensor) -> None:
        if shapes.get(call) == rows.shape:
            reading.repeated.add(call)

    with hooks.hooked(compare), hooks.embeddings.hooked(compare_rows):
        run([0, 1])
    reading.alike = mask is None or all(alike.get(call, False) for call in alone.keys() - reading.left_out)
    if not reading.alike:
        reading.padded.clear()
    return reading


def _agree(rows: Tensor, expected: Tensor) -> bool:
    """Whether rows have the expected sketch, up to the rounding of their dtype."""
    sketch, tolerance = _sketch(rows), max(1e-4, 8 * torch.finfo(rows.dtype).eps)
    return sketch.shape == expected.shape and bool((sketch - expected).abs().max() <= tolerance * expected.abs().max())


def _sketch(rows: Tensor) -> Tensor:
    """Return four fixed random mixtures of each row's features, `[n, 4]`: enough to tell rows apart."""
    mixing = torch.randn(rows.shape[1], 4, generator=torch.Generator().manual_seed(0))
    return rows.float() @ mixing.to(rows.device)
