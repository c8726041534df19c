"""Hooks that pass on what the linear maps of a model read."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architecture import canonical_names, linear_maps
from ..utils import Hook, hooked
from .embeddings import RowHooks
from .mixtures import mixtures_of


# The canonical name of a linear map's weight, and the number of the call within one forward pass, from 1.
Call = tuple[str, int]


class InputHooks:
    """Passes on the inputs of every linear map of a model.

    A mixture whose experts are held by one module counts as one map, under the name of its first matrices.

    Attributes:
        model: the live model.
        mixtures: the mixtures of the model, by the canonical name of their first matrices.
        embeddings: hooks on the embeddings of the model.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.embeddings, maps = model, RowHooks(model), linear_maps(model)
        canonical = {live: name for name, live in canonical_names(model).items()}
        mixtures = mixtures_of(model, maps, canonical)
        self.mixtures = {mixture.first: mixture for mixture in mixtures.values()}
        self._weight_of = {
            linear.module: canonical[linear.weight]
            for linear in maps.values()
            if not linear.slices and linear.weight in canonical
        }
        self._weight_of |= {module: mixture.first for module, mixture in mixtures.items()}

    @contextmanager
    def hooked(self, act: Callable[[Call, Tensor], Any]) -> Iterator[None]:
        """Call `act` with every input of every linear map during one forward pass inside the block."""
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

        hooks = [
            Hook(module, reader(self._weight_of[name]), before=True)
            for name, module in self.model.named_modules()
            if name in self._weight_of
        ]
        with hooked(hooks):
            yield


def input_rows(inputs: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Return the input vectors of a linear map, `[n, d_in]`, without those where `mask` is 0."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    return rows if mask is None else rows[mask.reshape(-1).bool()]
