"""Records the inputs of a model's linear maps as factors, sums and counts."""

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from ..linalg import triangular_factor
from ..utils import reserve
from .hooks import Call, InputHooks, input_rows
from .reading import Reading


class FactorAccumulator:
    """Adds up rows of width `d` in a factor `[n, d]` with `n <= 2 d`, a sum and a count.

    The factor is in a buffer of `2 d` rows, of which the operating system backs the part that was written. With a
    file, the buffer is that file, and memory only caches it.

    Attributes:
        factor: a matrix `R` with `Rᵀ R = Xᵀ X` for all rows `X`, float32.
        total: sum of the rows, `[d]` float64.
        count: number of rows.
    """

    def __init__(self, width: int, file: Optional[Path] = None):
        size = 2 * width * width
        buffer = torch.empty(size) if file is None else torch.from_file(str(file), shared=True, size=size)
        self._buffer, self._rows, self._file = buffer.view(2 * width, width), 0, file
        self.total, self.count = torch.zeros(width, dtype=torch.float64), 0

    @property
    def factor(self) -> Tensor:
        return self._buffer[: self._rows]

    def add(self, rows: Tensor) -> None:
        """Add rows, `[n, d]`.

        Raises:
            HfEsmError: if the disk is full.
        """
        rows = rows.detach().float()
        self.total += rows.sum(0).cpu()  # float32 is exact enough within a batch, float64 over all batches
        self.count += rows.shape[0]
        for part in rows.split(rows.shape[1]):
            if self._rows + part.shape[0] > self._buffer.shape[0]:
                self._put(triangular_factor(self.factor.to(rows.device)), 0)
            self._put(part, self._rows)

    def _put(self, rows: Tensor, start: int) -> None:
        self._rows = start + rows.shape[0]
        if self._file is not None:  # writing through the mapped file to a full disk would end the process silently
            reserve(self._file, self._rows * rows.shape[1] * rows.element_size())
        self._buffer[start : self._rows] = rows


class InputRecorder:
    """Adds every input of a model's linear maps to an accumulator. Maps that read the same tensor share one.

    Attributes:
        accumulators: by the canonical name of the first map that read the tensor.
        leaders: for each map, by its canonical name, the maps whose accumulator holds its inputs.
    """

    def __init__(self, hooks: InputHooks, reading: Reading, folder: Optional[Path] = None):
        """Record through `hooks`, in batches that the model reads as `reading` says; factors grow in `folder`, or in
        memory.
        """
        self._hooks, self._reading, self._folder = hooks, reading, folder
        self.accumulators: dict[str, FactorAccumulator] = {}
        self.leaders: dict[str, set[str]] = defaultdict(set)
        self._seen: dict[int, tuple[weakref.ref, str]] = {}

    @contextmanager
    def recording(self, mask: Optional[Tensor] = None) -> Iterator[None]:
        """Record one forward pass inside the block; `mask`, `[B, length]`, is 0 where samples are padded."""
        self._seen = {}
        with self._hooks.hooked(lambda call, inputs: self._take(call, inputs, mask)):
            yield

    def _take(self, call: Call, inputs: Tensor, mask: Optional[Tensor]) -> None:
        weight, _ = call
        if call in self._reading.left_out:
            return
        mask = mask if call in self._reading.padded else None
        if weight in self._hooks.mixtures:
            real = None if mask is None else mask.reshape(-1).bool()
            for matrix, rows in self._hooks.mixtures[weight].reads(inputs, real):
                self._add(matrix, rows)
            return
        known = self._seen.get(id(inputs))
        if known is not None and known[0]() is inputs:
            self.leaders[weight].add(known[1])
            return
        self._seen[id(inputs)] = (weakref.ref(inputs), weight)
        self._add(weight, input_rows(inputs, mask))

    def _add(self, weight: str, rows: Tensor) -> None:
        """Add rows to the accumulator of a map that reads a tensor first."""
        self.leaders[weight].add(weight)
        if weight not in self.accumulators:
            file = self._folder / f"{weight}.factor" if self._folder else None
            self.accumulators[weight] = FactorAccumulator(rows.shape[-1], file)
        self.accumulators[weight].add(rows)
