"""The interface of a merge method: what it receives (`Stack`), what it returns (`Merged`), and what it declares."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Optional

import torch
from torch import Tensor

from ..errors import HfEsmError
from ..linalg import piecewise
from ..utils import check_fields


@dataclass
class InputStatistics:
    """Statistics of the inputs `X [n, d_in]` of one linear map, for one expert.

    Attributes:
        factor: `[m, d_in]` float32, any matrix with `factorᵀ factor = Xᵀ X`; `m ≤ 2 d_in`, whatever `n` is.
        mean: `[d_in]` float32, the mean row of `X`.
        count: the number of rows `n`.
    """

    factor: Tensor
    mean: Tensor
    count: int

    def to(self, device: Optional[torch.device]) -> "InputStatistics":
        """Return a copy on another device."""
        return replace(self, factor=self.factor.to(device), mean=self.mean.to(device))


@dataclass
class Stack:
    """One weight of all `T` experts, as updates of the base.

    Attributes:
        name: the weight's name in the base model.
        layer_type: the name with its integers removed. Weights of one type share a scale between layers.
        updates: `T` float32 tensors of one shape: `[d_out, d_in]` for a matrix, any shape for other parameters.
        is_linear: whether the weight is the matrix of a linear map, rather than an embedding or another parameter.
        is_embedding: whether the weight is the matrix `[V, d]` of an embedding, tied to an output map or not.
        part: index of the matrix, where one parameter holds several (the experts of a mixture).
        routable: whether routed experts can be added to the weight.
        statistics: per expert, the statistics of the map's inputs, or None. Only linear maps have statistics.
        counts: per expert, how often its samples read each row of an embedding, `[V]`; empty if that is not known of
            all experts.
        thresholds: per expert, what `MergeMethod.prepare` returned: of TIES, the smallest magnitude that is kept; of
            Breadcrumbs, the largest and the smallest.
        depth: index of the block that holds the weight, and the number of blocks; None outside of blocks.
        weights: per expert, the caller's weight of its task; 1 by default, negative to negate a task.
        num_outputs: `d_out` of the map, if `updates` hold the updates in a basis of `s ≤ d_out` columns, `[s, d_in]`;
            see `MergeMethod.keeps_span`.
        read_base: reads `base`; called at most once.
    """

    name: str
    layer_type: str
    updates: list[Tensor]
    is_linear: bool = False
    is_embedding: bool = False
    part: int = 0
    routable: bool = False
    statistics: list[Optional[InputStatistics]] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    thresholds: list[Any] = field(default_factory=list)
    depth: Optional[tuple[int, int]] = None
    weights: list[float] = field(default_factory=list)
    num_outputs: Optional[int] = None
    read_base: Optional[Callable[[], Tensor]] = None

    def __post_init__(self) -> None:
        self.weights = self.weights or [1.0] * len(self.updates)

    @cached_property
    def base(self) -> Tensor:
        """The base's weight, float32, with the shape and on the device of the updates; read on first use."""
        if self.read_base is None:
            raise HfEsmError(f"{self.name}: this stack was made without the base's weight. Pass read_base=….")
        return self.read_base()

    @cached_property
    def weighted(self) -> list[Tensor]:
        """The updates times their weights; an update whose weight is 1 is not copied."""
        return [u if weight == 1 else weight * u for weight, u in zip(self.weights, self.updates, strict=True)]

    @property
    def is_matrix(self) -> bool:
        return self.updates[0].dim() == 2

    @property
    def is_calibrated(self) -> bool:
        """Whether there are statistics of every expert's inputs."""
        return bool(self.statistics) and all(inputs is not None for inputs in self.statistics)


@dataclass
class Merged:
    """A merged update, before α and the scale between layers.

    Attributes:
        update: float32, of the shape of the stack's updates.
        how: the rule that made the update, in a word (`"esm"`, `"tsv-m"`, `"mean"`, `"sum"`, …).
        scaled: whether α multiplies the update.
        info: figures for the report, such as the energy kept per expert.
    """

    update: Tensor
    how: str
    scaled: bool = True
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WholeUpdates:
    """All updates of a merge, for methods that must read them before the first weight is merged.

    Attributes:
        tasks: names of the experts, in the order of a stack's updates.
        read: reads the updates of one task's expert, weight by weight, float32. Buffers such as running means are left
            out. Each call starts at the first weight.
        stacks: reads every weight of all experts as a stack, in the basis of their factors if they are merged in it.
            Each call starts at the first weight.
        learn_mask: learns a mask over the updates, and coefficients, on the calibration samples, with the settings of
            a Concrete method. A collective call: all processes make it.
        progress: wraps an iterable, to show how far it is.
    """

    tasks: tuple[str, ...]
    read: Callable[[str], Iterator[Tensor]]
    stacks: Callable[[], Iterator[Stack]]
    learn_mask: Callable[[], Any]
    progress: Callable[[Iterable], Iterable] = iter


@dataclass
class MergeMethod:
    """The base class of merge methods: a dataclass of settings, with `merge` for one weight of all experts.

    The metadata of a setting's field may hold `help`, which the command line prints, `least`, `most`, `above`, `below`
    or `choices`, which every instance is checked against, and `search`, `(low, high, "linear" or "log")`: the range in
    which values are worth trying, and how they are spread over it; a setting without it is not searched. See
    `register_method` for an example.

    Attributes:
        name: the method's name in messages and recipes; `register_method` sets it on a class that has none.
        papers: arXiv numbers of what defines the method, which the model card cites.
        default_alpha: scale of the merged update, where the caller sets none.
        tunable: whether α changes the merged model.
        largest_alpha: how far α is searched.
        most_experts: how many experts the method merges at most; any number by default.
        needs_statistics: whether linear maps are merged with activation statistics.
        chooses: whether the merge chooses one of several methods, instead of calling `merge`.
        needs_samples: whether `prepare` learns on the calibration samples themselves.
        layer_exponent: exponent of the scale between layers of one type, `(‖Δ_M‖ / mean ‖Δ_M‖)^layer_exponent`; 0 for
            no scale.
        tolerance: share of the leading directions' energy that may be missed. Above 0, matrices are multiplied in the
            precision that the hardware multiplies fastest.
        decomposes: whether matrices are decomposed (eigenvectors, singular vectors, least squares), in a time that is
            cubic in their width; for estimates of the time.
        counts_embeddings: whether embeddings are merged by token counts (`merge_embedding`) instead of by `merge`.
        stacks_shared_inputs: whether linear maps that read one tensor (q, k and v) are merged as one weight.
        keeps_span: whether the merge of updates `Q K_t` of a matrix, with `Q [d_out, s]` of orthonormal columns, is
            `Q` times that of the `K_t` (with `Stack.num_outputs` set to `d_out`), so that low-rank updates give a
            low-rank merged update. LoRA adapters are then merged in the span of their factors.
        router: the router (see `RoutedExpertsConfig`), if the method routes: an expert per task is written into the
            folder of the merged model. Empty by default. The attributes below are read only if it is set.
        static_method: what the static model beside routed experts is merged by: `"own"`, this method's `merge`, the
            name of another method, or `"auto"`, what `method="auto"` chooses if the model writes.
        directions: what the experts approximate: `"residual"`, the part of each update that the merged model lacks, or
            `"update"`, the update itself.
        needs_merged_features: whether the router is made from features of the merged model, not from the base's.
        depth: share of the blocks that run before a router of features decides.
        keeps_bodies: whether each task keeps what no routed expert holds: biases, norms and convolutions, and
            compressed updates of embeddings.
        gone: settings of earlier versions, with a sentence that says what to do instead.
    """

    name: ClassVar[str] = ""
    papers: ClassVar[tuple[str, ...]] = ()
    default_alpha: ClassVar[float] = 1.0
    tunable: ClassVar[bool] = True
    largest_alpha: ClassVar[float] = 3.0
    most_experts: ClassVar[Optional[int]] = None
    needs_statistics: ClassVar[bool] = False
    chooses: ClassVar[bool] = False
    needs_samples: ClassVar[bool] = False
    layer_exponent: ClassVar[float] = 0.0
    tolerance: ClassVar[float] = 0.0
    decomposes: ClassVar[bool] = False
    counts_embeddings: ClassVar[bool] = True
    stacks_shared_inputs: ClassVar[bool] = False
    keeps_span: ClassVar[bool] = False
    router: ClassVar[str] = ""
    static_method: ClassVar[str] = "own"
    directions: ClassVar[str] = "residual"
    needs_merged_features: ClassVar[bool] = False
    depth: ClassVar[Optional[float]] = None
    keeps_bodies: ClassVar[bool] = False
    gone: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __post_init__(self) -> None:
        """Check the types and ranges of the settings.

        Raises:
            HfEsmError: names the setting, what it takes, and the value.
        """
        check_fields(self, self.name)

    def merge(self, stack: Stack) -> Merged:
        """Merge one weight of all experts. The stack's updates must not be changed or kept: later weights take their
        memory.
        """
        raise NotImplementedError

    def check_weights(self, weights: Iterable[float]) -> None:
        """Raise an error if the method cannot merge with these weights of the tasks, or so many of them.

        Raises:
            HfEsmError: names the method, and the weights or their number.
        """
        count = len(list(weights))
        if self.most_experts is not None and count > self.most_experts:
            raise HfEsmError(
                f"Method {self.name!r} merges {self.most_experts} experts, not {count}. Leave experts out, or use "
                "'karcher', which merges any number."
            )

    def prepare(self, whole: WholeUpdates) -> list[Any]:
        """Compute what `merge` needs to know of the whole model; called once, before the first weight is merged.

        Returns the `thresholds` of every stack, one entry per expert; by default, none.
        """
        return []

    @property
    def reads_whole(self) -> bool:
        """Whether `prepare` reads updates of the whole model; by default, if a class has a `prepare` of its own."""
        return type(self).prepare is not MergeMethod.prepare

    @property
    def routes(self) -> bool:
        """Whether an expert per task is written into the folder of the merged model."""
        return bool(self.router)

    @property
    def decides(self) -> bool:
        """Whether a router finds the task of an input."""
        return self.router in ("prototype", "discriminant")

    @property
    def needs_features(self) -> bool:
        """Whether the router is made from features: the pooled inputs of the blocks."""
        return self.router == "discriminant"

    @property
    def router_settings(self) -> dict[str, Any]:
        """`top_k`, `mixing_temperature` and `confidence` of a router of features."""
        return {}

    def routes_on(self, name: str) -> bool:
        """Return whether a linear map, by the name of its weight in the base, gets experts; by default, all do."""
        return True

    def with_rank(self, rank: int) -> "MergeMethod":
        """Return a copy whose experts have this rank.

        Raises:
            HfEsmError: if the method has no experts, or no setting `rank`.
        """
        if not self.routes or "rank" not in {setting.name for setting in fields(self)}:
            raise HfEsmError(
                f"Method {self.name!r} has no experts, so no rank. Leave it out, or use 'esm++' or 'tsv-c'."
            )
        return replace(self, rank=rank)

    def with_static_method(self, name: str) -> "MergeMethod":
        """Return a copy whose static model is merged by the method of this name, if that is a setting."""
        known = "static_method" in {setting.name for setting in fields(self)}
        return replace(self, static_method=name) if known else self

    def for_model(self, reads_prompts: bool, writes: bool = False) -> "MergeMethod":
        """Return the method with values for settings whose defaults differ by the kind of model; by default, itself.

        Args:
            reads_prompts: whether the models write on after the text that they read.
            writes: whether the models write, with an encoder or without.
        """
        return self

    def expert_rank(self, shape: torch.Size, tasks: int) -> int:
        """Return the rank of one expert of a map `[d_out, d_in]`; called only if the method routes."""
        raise NotImplementedError

    def bodies_to_learn(self, tasks: int) -> int:
        """Return how many float32 bodies are in memory while `prepare` learns on samples; 0 if it does not."""
        return 0


def weighted_sum(stack: Stack) -> Tensor:
    """Return `Σ w_t Δ_t`, float32."""

    def add(*updates: Tensor) -> Tensor:
        total = stack.weights[0] * updates[0]
        for update, weight in zip(updates[1:], stack.weights[1:], strict=True):
            total.add_(update, alpha=weight)
        return total

    return piecewise(add, *stack.updates)


def mean_update(stack: Stack, scaled: bool) -> Merged:
    """Average the experts' updates: the rule of every method for biases, norms and convolutions.

    The result is `Σ w_t Δ_t / Σ w_t`, or `Σ w_t Δ_t / T` where the weights cancel (as 1 and -1 do).
    """
    total = len(stack.weights) if weights_cancel(stack.weights) else sum(stack.weights)
    return Merged(weighted_sum(stack).div_(total), "mean", scaled)


def buffer_stack(stack: Stack) -> Stack:
    """Return the stack of a running mean or variance, in which weights below 0 count as 0: no variance is negative."""
    return replace(stack, weights=[max(weight, 0.0) for weight in stack.weights])


def weights_cancel(weights: Iterable[float]) -> bool:
    """Return whether the sum of the weights is 0, but for rounding, so that there is no weighted mean."""
    weights = list(weights)
    return abs(math.fsum(weights)) <= 1e-9 * math.fsum(map(abs, weights))
