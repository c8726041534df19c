"""Which rows the embeddings of a model read, and how often."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..architecture import canonical_names, ties
from ..utils import Hook, hooked


class RowHooks:
    """Passes on which rows the embeddings of a model read: of words, positions, token types and all others.

    Embeddings whose weights are tied count as one.

    Attributes:
        sizes: number of rows of every embedding, by the canonical name of its weight.
    """

    def __init__(self, model: PreTrainedModel):
        canonical = {live: name for name, live in canonical_names(model).items()}
        tied = ties(model)
        self._weight_of: dict[nn.Module, str] = {}
        self.sizes: dict[str, int] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            weight = tied.get(f"{name}.weight", f"{name}.weight")
            if isinstance(module, nn.Embedding) and weight in canonical:
                self._weight_of[module] = canonical[weight]
                self.sizes[canonical[weight]] = module.weight.shape[0]

    @contextmanager
    def hooked(self, act: Callable[[tuple[str, int], Tensor], Any]) -> Iterator[None]:
        """Call `act` with the name of a weight and the number of the reading, and with the indices of the rows, in any
        shape, at every reading of an embedding during one forward pass inside the block.
        """
        readings: Counter[str] = Counter()
        modes: list[_RowReader] = []

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            weight = self._weight_of[module]

            def read(rows: Tensor) -> None:
                readings[weight] += 1
                act((weight, readings[weight]), rows.detach().cpu())

            modes.append(_RowReader(module, read))
            modes[-1].__enter__()

        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            modes.pop().__exit__(None, None, None)

        hooks = [Hook(module, enter, before=True) for module in self._weight_of]
        hooks += [Hook(module, leave, before=False) for module in self._weight_of]
        try:
            with hooked(hooks):
                yield
        finally:
            while modes:  # an interrupt, which is no `Exception`, calls no hook
                modes.pop().__exit__(None, None, None)


class _RowReader(TorchFunctionMode):
    """Passes on the rows of an embedding's weight that are looked up while the mode is active.

    What a module is called with does not tell: some add an offset to positions, or are called with the tokens.
    """

    def __init__(self, module: nn.Module, act: Callable[[Tensor], None]):
        super().__init__()
        self._module, self._act = module, act

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Optional[dict] = None) -> Any:
        if func is F.embedding:
            self._act(args[0])
        elif func == Tensor.__getitem__ and args[0] is self._module.weight:
            index = args[1][0] if isinstance(args[1], tuple) else args[1]
            self._act(torch.arange(len(args[0]), device=args[0].device)[index])
        return func(*args, **(kwargs or {}))


class RowCounter:
    """Counts how often the samples read each row of a model's embeddings.

    Attributes:
        counts: `[V]` int64 by the canonical name of the weight; embeddings that are not read have none.
    """

    def __init__(self, hooks: RowHooks, repeated: set[tuple[str, int]]):
        """Count through `hooks`; the readings in `repeated` are made once a batch, and serve every sample of it."""
        self._hooks, self._repeated = hooks, repeated
        self.counts: dict[str, Tensor] = {}

    @contextmanager
    def counting(self, size: int, mask: Optional[Tensor] = None) -> Iterator[None]:
        """Count during one forward pass inside the block.

        Args:
            size: samples in the batch.
            mask: `[B, length]`, 0 where samples are padded, on the right.
        """
        mask = None if mask is None else mask.bool().cpu()
        with self._hooks.hooked(lambda reading, rows: self._add(reading, rows, size, mask)):
            yield

    def _add(self, reading: tuple[str, int], rows: Tensor, size: int, mask: Optional[Tensor]) -> None:
        weight, _ = reading
        if reading in self._repeated:
            self._add_repeated(weight, rows, size, mask)
        elif mask is not None and rows.numel() == mask.numel():
            self._put(weight, rows.reshape(-1)[mask.reshape(-1)])
        else:
            self._put(weight, rows)

    def _add_repeated(self, weight: str, rows: Tensor, size: int, mask: Optional[Tensor]) -> None:
        """Add what every sample reads: of each dimension that is as long as the batch, as much as the sample has
        tokens (positions have one such dimension, distances of two positions two).
        """
        if mask is None or mask.dim() != 2:
            self._put(weight, rows, size)
            return
        for length, times in Counter(mask.sum(1).tolist()).items():
            self._put(weight, rows[tuple(slice(length if n == mask.shape[1] else None) for n in rows.shape)], times)

    def _put(self, weight: str, rows: Tensor, times: int = 1) -> None:
        size = self._hooks.sizes[weight]
        counts = self.counts.setdefault(weight, torch.zeros(size, dtype=torch.int64))
        counts += times * torch.bincount(rows.reshape(-1), minlength=size)
