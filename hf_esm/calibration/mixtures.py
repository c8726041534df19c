"""What each expert of a mixture reads, if one module holds the experts as three-dimensional parameters."""

import inspect
from collections.abc import Iterator
from typing import Any, Optional

from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture import LinearMap, matrix_names


class Mixture:
    """A module of Transformers' experts interface. Every token goes through a few of its experts: through a first
    matrix, an activation or a gate, and a second matrix.

    Attributes:
        first: canonical name of the parameter of the first matrices, which read the module's input.
    """

    def __init__(self, module: nn.Module, maps: dict[str, LinearMap], canonical: dict[str, str]):
        """Wrap a module.

        Args:
            module: the module.
            maps: its linear maps, by the parameter's name in the module.
            canonical: the canonical names of their weights, by the same.
        """
        self.module, self._maps, self._canonical = module, maps, canonical
        self._first, self._second = _matrices(module)
        self.first = canonical[self._first]
        self._names = tuple(inspect.signature(type(module).forward).parameters)[1:3]
        self._chosen: Optional[Tensor] = None

    def open(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Take the arguments of a call of the module; return the tokens, `[n, d_in]`."""
        arguments = dict(zip(self._names, args)) | kwargs
        tokens, self._chosen = (arguments[name] for name in self._names)
        return tokens

    def reads(self, tokens: Tensor, real: Optional[Tensor] = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each expert's matrix, and the rows `[m, d_in]` that it reads in the opened call.

        Args:
            tokens: the module's input, `[n, d_in]`.
            real: `[n]` bool, False where tokens are padding and left out.

        Experts that no token reached are left out.
        """
        module, chosen = self.module, self._chosen
        if real is not None:
            tokens, chosen = tokens[real], chosen[real]
        first, second = (matrix_names(self._canonical[name], self._maps[name]) for name in (self._first, self._second))
        with align_module_device(module):  # its weights may be offloaded
            for expert in chosen.unique().tolist():
                if expert < len(first):  # the others are on other devices
                    rows = tokens[(chosen == expert).any(-1)]
                    yield first[expert], rows
                    yield second[expert], self._between(expert, rows)

    def _between(self, expert: int, rows: Tensor) -> Tensor:
        """Return what an expert's second matrix reads if its first one reads `rows`."""
        weight = getattr(self.module, self._first)[expert]
        bias = getattr(self.module, f"{self._first}_bias")[expert] if self.module.has_bias else None
        hidden = F.linear(rows, weight.T if self._maps[self._first].transposed else weight, bias)
        return self.module._apply_gate(hidden) if self.module.has_gate else self.module.act_fn(hidden)


def mixtures_of(model: nn.Module, maps: dict[str, LinearMap], canonical: dict[str, str]) -> dict[str, Mixture]:
    """Return the mixtures of a model whose experts' inputs can be told, by the module's name.

    Args:
        model: the model.
        maps: the model's linear maps, by the live name of the weight.
        canonical: the canonical name of every weight, by its live name.
    """
    mixtures = {}
    for name, module in model.named_modules():
        weights = {p: f"{name}.{p}" for p in (_matrices(module) if hasattr(module, "has_gate") else ())}
        if weights and all(w in canonical and w in maps and maps[w].slices for w in weights.values()):
            parts = {parameter: maps[weight] for parameter, weight in weights.items()}
            mixtures[name] = Mixture(module, parts, {p: canonical[weight] for p, weight in weights.items()})
    return mixtures


def _matrices(module: nn.Module) -> tuple[str, str]:
    """Return the names of the parameters of the first and the second matrices."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"
