"""The experts of a mixture that one module holds as three-dimensional parameters: what each expert's matrices read."""

import inspect
from collections.abc import Iterator
from typing import Any, Optional

from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture import LinearMap, matrix_names


class Mixture:
    """A module of Transformers' experts interface, in which every token goes through a few of the experts: a first
    matrix, an activation or a gate, and a second matrix.

    Attributes:
        first: canonical name of the parameter that holds the first matrices; the module reads what these read.
    """

    def __init__(self, module: nn.Module, maps: dict[str, LinearMap], canonical: dict[str, str]):
        """`maps` are the module's, by the parameter's own name, and `canonical` their names in statistics."""
        self.module, self._maps, self._canonical = module, maps, canonical
        self._first, self._second = _matrices(module)
        self.first = canonical[self._first]
        self._names = tuple(inspect.signature(type(module).forward).parameters)[1:3]
        self._chosen: Optional[Tensor] = None

    def open(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Take what the module is called with; returns the tokens, `[n, d_in]`."""
        given = dict(zip(self._names, args)) | kwargs
        tokens, self._chosen = (given[name] for name in self._names)
        return tokens

    def reads(self, tokens: Tensor, real: Optional[Tensor] = None) -> Iterator[tuple[str, Tensor]]:
        """The rows that every expert's matrices read, `[m, d_in]`, by the matrix's name; none of those that no token
        came to. Tokens are left out where `real` is 0.
        """
        module, chosen = self.module, self._chosen
        if real is not None:
            tokens, chosen = tokens[real], chosen[real]
        first, second = (matrix_names(self._canonical[name], self._maps[name]) for name in (self._first, self._second))
        with align_module_device(module):  # where it stands partly elsewhere
            for expert in chosen.unique().tolist():
                if expert < len(first):  # beyond are those that other devices hold
                    rows = tokens[(chosen == expert).any(-1)]
                    yield first[expert], rows
                    yield second[expert], self._between(expert, rows)

    def _between(self, expert: int, rows: Tensor) -> Tensor:
        """What the second matrix reads where the first one reads `rows`."""
        weight = getattr(self.module, self._first)[expert]
        bias = getattr(self.module, f"{self._first}_bias")[expert] if self.module.has_bias else None
        found = F.linear(rows, weight.T if self._maps[self._first].transposed else weight, bias)
        return self.module._apply_gate(found) if self.module.has_gate else self.module.act_fn(found)


def mixtures_of(model: nn.Module, maps: dict[str, LinearMap], canonical: dict[str, str]) -> dict[str, Mixture]:
    """The mixtures of a model whose experts' inputs can be told, by the module's name.

    Args:
        maps: the model's linear maps by weight.
        canonical: the canonical name of every weight, by its own.
    """
    found = {}
    for name, module in model.named_modules():
        weights = {p: f"{name}.{p}" for p in (_matrices(module) if hasattr(module, "has_gate") else ())}
        if weights and all(w in canonical and w in maps and maps[w].slices for w in weights.values()):
            parts = {parameter: maps[weight] for parameter, weight in weights.items()}
            found[name] = Mixture(module, parts, {p: canonical[weight] for p, weight in weights.items()})
    return found


def _matrices(module: nn.Module) -> tuple[str, str]:
    """The parameters of a mixture's first and second matrices, as Transformers' experts interface names them."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"
