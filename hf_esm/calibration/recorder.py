"""Hooks that keep what the linear maps of a model read."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architecture import canonical_names, linear_maps
from ..linalg import triangular_factor
from ..utils import reserve
from .mixtures import mixtures_of


# A linear map by its weight, and which of its calls within one pass.
Call = tuple[str, int]


class FactorAccumulator:
    """Streams rows into a factor of at most twice as many rows as columns, their sum and their count.

    The factor stands in a buffer of that size, of which the operating system backs what was written; given a file, it
    stands there, and memory only caches it.
    """

    def __init__(self, width: int, file: Optional[Path] = None):
        size = 2 * width * width
        held = torch.empty(size) if file is None else torch.from_file(str(file), shared=True, size=size)
        self._held, self._rows, self._file = held.view(2 * width, width), 0, file
        self.total, self.count = torch.zeros(width, dtype=torch.float64), 0

    @property
    def factor(self) -> Tensor:
        return self._held[: self._rows]

    def add(self, rows: Tensor) -> None:
        rows = rows.detach().float()
        self.total += rows.sum(0).cpu()  # exact enough within a batch, float64 over all
        self.count += rows.shape[0]
        for part in rows.split(rows.shape[1]):
            if self._rows + part.shape[0] > self._held.shape[0]:
                self._put(triangular_factor(self.factor.to(rows.device)), 0)
            self._put(part, self._rows)

    def _put(self, rows: Tensor, start: int) -> None:
        self._rows = start + rows.shape[0]
        if self._file is not None:  # what a full disk does not take would end the process without a word
            reserve(self._file, self._rows * rows.shape[1] * rows.element_size())
        self._held[start : self._rows] = rows


@dataclass
class Reading:
    """How a model reads samples that share a batch: the same for all models of one class and one body.

    Attributes:
        left_out: inputs that are made of no sample, such as DeBERTa's relative positions.
        padded: inputs that hold the padding of a batch.
        alike: whether samples are read the same in a padded batch as alone, up to rounding: not so where padding
            shows, as through convolutions.
    """

    left_out: set[Call] = field(default_factory=set)
    padded: set[Call] = field(default_factory=set)
    alike: bool = True


class InputRecorder:
    """Hooks on a model's linear maps that add every row they read to an accumulator.

    Maps that read the same tensor share one. A mixture whose experts one module holds counts as a map, by the name of
    its first matrices, until its rows are told apart by expert.
    """

    def __init__(self, model: PreTrainedModel, folder: Optional[Path] = None):
        """`folder` is where factors stand while they grow, if not in memory."""
        self.model, self.folder = model, folder
        live, maps = {name: canonical for canonical, name in canonical_names(model).items()}, linear_maps(model)
        self.weight_of = {
            linear.module: live[linear.weight]
            for linear in maps.values()
            if not linear.slices and linear.weight in live
        }
        by_module = mixtures_of(model, maps, live)
        self.weight_of |= {module: mixture.first for module, mixture in by_module.items()}
        self.mixtures = {mixture.first: mixture for mixture in by_module.values()}
        self.accumulators: dict[str, FactorAccumulator] = {}
        self.leaders: dict[str, set[str]] = defaultdict(set)
        self.reading = Reading()
        self._seen: dict[int, tuple[weakref.ref, str]] = {}

    def learn(self, run: Callable[[list[int]], Any], mask: Optional[Tensor]) -> None:
        """Learn the model's `reading` from passes over two samples. An input that has one shape alone and in a batch
        is made of no sample.

        Args:
            run: passes over the first, the second, or both: the second is the longer one, or they are of one shape.
            mask: `[2, length]`, 0 where the batch of both is padded; None where they are of one shape.
        """
        reading = self.reading = Reading()
        alone: dict[Call, list[tuple[torch.Size, Tensor]]] = defaultdict(list)
        passes = (0, 1) if mask is not None else (1,)
        for i in passes:
            with self.hooked(lambda call, inputs: alone[call].append((inputs.shape, sketch_rows(input_rows(inputs))))):
                run([i])
        together: dict[Call, bool] = {}

        def compare(call: Call, inputs: Tensor) -> None:
            rows = [sketch for _, sketch in alone.get(call, []) if len(sketch)]
            if len(rows) == len(passes) and inputs.shape == alone[call][-1][0]:
                reading.left_out.add(call)
            elif mask is not None:
                together[call] = bool(rows) and self._reads_alike(call, inputs, mask, torch.cat(rows))

        with self.hooked(compare):
            run([0, 1])
        reading.alike = mask is None or all(together.get(call, False) for call in alone.keys() - reading.left_out)
        if not reading.alike:
            reading.padded.clear()

    def _reads_alike(self, call: Call, inputs: Tensor, mask: Tensor, expected: Tensor) -> bool:
        padded = inputs.shape[:-1].numel() == mask.numel() != expected.shape[0]
        if padded:
            self.reading.padded.add(call)
        found, tolerance = sketch_rows(input_rows(inputs, mask if padded else None)), 8 * torch.finfo(inputs.dtype).eps
        same = found.shape == expected.shape
        return same and bool((found - expected).abs().max() <= max(1e-4, tolerance) * expected.abs().max())

    @contextmanager
    def recording(self, mask: Optional[Tensor] = None) -> Iterator[None]:
        """Around one pass over samples; `mask` `[B, length]` is 0 where they are padded."""
        self._seen = {}
        with self.hooked(lambda call, inputs: self._take(call, inputs, mask)):
            yield

    def _take(self, call: Call, inputs: Tensor, mask: Optional[Tensor]) -> None:
        weight, _ = call
        if call in self.reading.left_out:
            return
        mask = mask if call in self.reading.padded else None
        if weight in self.mixtures:
            real = None if mask is None else mask.reshape(-1).bool()
            for matrix, rows in self.mixtures[weight].reads(inputs, real):
                self._add(matrix, rows)
            return
        known = self._seen.get(id(inputs))
        if known is not None and known[0]() is inputs:
            self.leaders[weight].add(known[1])
            return
        self._seen[id(inputs)] = (weakref.ref(inputs), weight)
        self._add(weight, input_rows(inputs, mask))

    def _add(self, weight: str, rows: Tensor) -> None:
        """Add what a map reads by itself, or the first of those that read it."""
        self.leaders[weight].add(weight)
        if weight not in self.accumulators:
            file = self.folder / f"{weight}.factor" if self.folder else None
            self.accumulators[weight] = FactorAccumulator(rows.shape[-1], file)
        self.accumulators[weight].add(rows)

    @contextmanager
    def hooked(self, act: Callable[[Call, Tensor], Any]) -> Iterator[None]:
        """Call `act` with every input of every linear map in one pass."""
        calls: Counter[str] = Counter()

        def reader(weight: str) -> Callable:
            def read(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                calls[weight] += 1
                if weight in self.mixtures:
                    inputs = self.mixtures[weight].open(args, kwargs)
                else:
                    inputs = args[0] if args else next(iter(kwargs.values()))
                act((weight, calls[weight]), inputs)

            return read

        handles = [
            module.register_forward_pre_hook(reader(self.weight_of[name]), with_kwargs=True)
            for name, module in self.model.named_modules()
            if name in self.weight_of
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def input_rows(inputs: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """The rows of what a linear map reads, `[n, d]`; those where `mask` is 0 are left out."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    return rows if mask is None else rows[mask.reshape(-1).bool()]


def sketch_rows(rows: Tensor) -> Tensor:
    """Four fixed random mixtures of each row's features, `[n, 4]`: enough to tell other rows, without keeping them."""
    mixed = torch.randn(rows.shape[1], 4, generator=torch.Generator().manual_seed(0))
    return rows.float() @ mixed.to(rows.device)
