"""What a merge method sees: one weight of every expert. And what it gives back."""

from collections.abc import Callable, Iterable, Iterator
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


@dataclass(frozen=True)
class WholeUpdates:
    """All updates of a merge, for what a method must know before it merges the first weight (`MergeMethod.prepare`).

    Attributes:
        tasks: names of the experts, in the order of a stack's updates.
        read: reads the update of one task's expert, weight by weight, float32: of all weights that are merged, without
            running means and other buffers. Each call starts at the first weight.
        learn_mask: learns a mask over the updates on the calibration samples, with the settings of the method, a
            Concrete one. All processes call it together.
        progress: shows how far an iteration is.
    """

    tasks: tuple[str, ...]
    read: Callable[[str], Iterator[Tensor]]
    learn_mask: Callable[[], Any]
    progress: Callable[[Iterable], Iterable] = iter


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
        tolerance: share of the leading directions' energy that may be missed; above 0 matrices are multiplied in the
            precision that the hardware multiplies fastest.
        stacks_shared_inputs: whether linear maps that read one tensor (q, k and v) are merged as one weight.
        router: `"prototype"`, `"discriminant"`, `"oracle"` or `"static"` (see `RoutedExpertsConfig`), if an expert per
            task is written beside the merged model; empty if not. The five attributes below are read only then.
        directions: what the experts approximate: `"residual"`, what the merged model lacks, or `"update"`.
        needs_merged_features: whether the router reads features of the merged model, not those of the base.
        depth: share of the blocks that run before a router of features decides.
        router_settings: `top_k`, `mixing_temperature` and `confidence` of a router of features.
    """

    name: ClassVar[str]
    default_alpha: ClassVar[float] = 1.0
    tunable: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = False
    needs_samples: ClassVar[bool] = False
    layer_exponent: ClassVar[float] = 0.0
    tolerance: ClassVar[float] = 0.0
    stacks_shared_inputs: ClassVar[bool] = False
    router: ClassVar[str] = ""
    directions: ClassVar[str] = "residual"
    needs_merged_features: ClassVar[bool] = False
    depth: ClassVar[float] = 1 / 3

    @property
    def routes(self) -> bool:
        """Whether an expert per task is written beside the merged model."""
        return bool(self.router)

    @property
    def decides(self) -> bool:
        """Whether a router finds the task of an input."""
        return self.router in ("prototype", "discriminant")

    @property
    def needs_features(self) -> bool:
        """Whether the router is made from features, the pooled inputs of the blocks."""
        return self.router == "discriminant"

    @property
    def router_settings(self) -> dict[str, Any]:
        """`top_k`, `mixing_temperature` and `confidence` of a router of features."""
        return {}

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

    def prepare(self, whole: WholeUpdates) -> list[float]:
        """Learn from the whole model what merging one weight needs; called once, before the first weight is merged.

        Returns the `thresholds` of every stack of the merge: one magnitude per expert, or none.
        """
        return []

    def with_rank(self, rank: int) -> "MergeMethod":
        """Copy the method with experts of this rank.

        Raises:
            HfEsmError: if the method writes no experts, or does not have a setting `rank`.
        """
        if not self.routes or "rank" not in {setting.name for setting in fields(self)}:
            raise HfEsmError(
                f"Method {self.name!r} has no experts, so no rank. Leave it out, or use 'esm++' or 'tsv-c'."
            )
        return replace(self, rank=rank)

    def expert_rank(self, shape: torch.Size, tasks: int) -> int:
        """Return the rank of each expert of a map `[d_out, d_in]`; asked only of a method that routes."""
        raise NotImplementedError

    def bodies_to_learn(self, tasks: int) -> int:
        """How many bodies in float32 are in memory while something is learned on samples; 0 where nothing is."""
        return 0


def mean_update(stack: Stack, scaled: bool) -> Merged:
    """The plain average of the experts' updates: the rule for biases, norms and convolutions in every method."""
    return Merged(torch.stack(stack.deltas).mean(0), "mean", scaled)
