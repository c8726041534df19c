"""What a merge method sees: one weight of every expert. And what it gives back."""

from dataclasses import dataclass, field, fields, replace
from math import isfinite
from numbers import Integral, Real
from typing import Any, ClassVar, Optional

import torch
from torch import Tensor

from ..errors import HfEsmError


@dataclass
class InputStatistics:
    """What the methods need to know of the inputs `X [n, d_in]` of one linear map, for one expert.

    Attributes:
        factor: `[m, d_in]` float32, any matrix with `factorᵀ factor = Xᵀ X`; `m ≤ 2 d_in`, whatever `n` is.
        mean: `[d_in]` float32, the mean row.
        count: the number of rows `n`.
    """

    factor: Tensor
    mean: Tensor
    count: int

    def to(self, device: Optional[torch.device]) -> "InputStatistics":
        """The same on another device."""
        return replace(self, factor=self.factor.to(device), mean=self.mean.to(device))


@dataclass
class Stack:
    """One weight of all `T` experts, as updates of the base.

    Attributes:
        name: the weight's name in the base model.
        part: which of the matrices that the parameter holds, where it holds several.
        layer_type: the name with its integers removed; weights of one type share a scale between layers.
        deltas: `T` float32 tensors of one shape: `[d_out, d_in]` for a matrix, anything for other parameters.
        is_linear: whether it is the matrix of a linear map, rather than an embedding or a parameter of another kind.
        routable: whether experts can be routed beside it.
        statistics: per expert, what is known of the map's inputs, or None. Only linear maps have any.
        thresholds: per expert, the magnitude from which on an entry of its update is kept, if the method trims whole
            updates (TIES).
    """

    name: str
    layer_type: str
    deltas: list[Tensor]
    is_linear: bool = False
    part: int = 0
    routable: bool = False
    statistics: list[Optional[InputStatistics]] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)

    @property
    def is_matrix(self) -> bool:
        return self.deltas[0].dim() == 2

    @property
    def is_calibrated(self) -> bool:
        return bool(self.statistics) and all(s is not None for s in self.statistics)


@dataclass
class Merged:
    """A merged update, before α and the scale between layers.

    Attributes:
        delta: float32, of the shape of the stack's deltas.
        how: the rule that made it, in a word (`"esm"`, `"tsv-m"`, `"mean"`, `"sum"`, …).
        scaled: whether α multiplies it.
        info: figures for the report, such as the energy kept per expert.
    """

    delta: Tensor
    how: str
    scaled: bool = True
    info: dict[str, Any] = field(default_factory=dict)


class MergeMethod:
    """What `merge_models` asks of a method. Each is a dataclass of its settings.

    Attributes:
        name: its name in messages and recipes.
        default_alpha: the scale of the merged update where none is given.
        tunable: whether α means anything to it.
        needs_statistics: whether linear maps are merged with activation statistics.
        needs_samples: whether something is learned on the calibration samples themselves before merging.
        layer_exponent: exponent of the scale between layers of one type, `(‖Δ_M‖ / mean ‖Δ_M‖)^layer_exponent`; 0 for
            none.
    """

    name: ClassVar[str]
    default_alpha: ClassVar[float] = 1.0
    tunable: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = False
    needs_samples: ClassVar[bool] = False
    layer_exponent: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        """Refuse settings of another kind than their defaults."""
        kinds = {bool: bool, int: Integral, float: Real, str: str, tuple: (tuple, list)}
        for setting in fields(self):
            value, default = getattr(self, setting.name), setting.default
            kind = kinds.get(type(default), object)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind in (Integral, Real)):
                raise HfEsmError(f"{self.name}: {setting.name} must be like {default!r}, not {value!r}.")
            if kind is Real and not isfinite(value):
                raise HfEsmError(f"{self.name}: {setting.name} must be a finite number, not {value!r}.")

    def merge(self, stack: Stack) -> Merged:
        """Merge one weight of all experts."""
        raise NotImplementedError

    def bodies_to_learn(self, tasks: int) -> int:
        """How many bodies in float32 are in memory while something is learned on samples; 0 where nothing is."""
        return 0


def mean_update(stack: Stack, scaled: bool) -> Merged:
    """The plain average of the experts' updates: the rule for biases, norms and convolutions in every method."""
    return Merged(torch.stack(stack.deltas).mean(0), "mean", scaled)
