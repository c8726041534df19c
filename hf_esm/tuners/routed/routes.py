"""Routes of a batch: which experts each sample gets, as a router decides or as the caller names them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import HfEsmError
from .config import RoutedExpertsConfig


ONE_PER_SAMPLE = "Give one task per sample."


class Route(NamedTuple):
    """The experts of every sample of a batch, and the weight with which each is added.

    Attributes:
        experts: indices of tasks, int64: `[B]`, or `[B, k]` where a sample gets several.
        weights: float32 of the same shape, 0 where no expert is added. None means 1 everywhere.
    """

    experts: Tensor
    weights: Optional[Tensor] = None

    def for_batch(self, size: int) -> "Route":
        """The route of a batch in which every sample is repeated, copies in a row (beams)."""
        samples = self.experts.shape[0]
        if samples == size:
            return self
        if size % samples:
            raise HfEsmError(f"Routes of {samples} samples do not fit a batch of {size}. {ONE_PER_SAMPLE}")
        return Route(*(None if part is None else part.repeat_interleave(size // samples, dim=0) for part in self))

    def to(self, device: torch.device) -> "Route":
        return Route(*(None if part is None else part.to(device) for part in self))


class Ready:
    """What layers keep of the experts of one route, for later passes of the same request; copies are empty.

    Attributes:
        layers: by module.
        folded_bytes: size of the weights that experts are folded into.
    """

    def __init__(self) -> None:
        self.layers: dict[str, Any] = {}
        self.folded_bytes = 0
        self._shared: dict[tuple[str, int], bool] = {}

    def shared(self, adapter: str, route: Route) -> bool:
        """Return whether all samples of a route get the same experts."""
        key = adapter, len(route.experts)
        if key not in self._shared:
            self._shared[key] = all(part is None or torch.equal(part, part[:1].expand_as(part)) for part in route)
        return self._shared[key]

    def __deepcopy__(self, memo: dict) -> "Ready":
        return Ready()

    def __reduce__(self) -> Any:
        return Ready, ()


@dataclass
class Decision:
    """A router's decision on a batch.

    Attributes:
        route: the experts that are added.
        probabilities: of the tasks, `[B, T]`; a prototype router gives cosines.
        distance: distance of each sample from all tasks, `[B]`, as a multiple of the router's `threshold`. Above 1, a
            sample counts as belonging to none of the tasks. None if the router has no threshold.
        before: names of the modules that ran before the decision. They add no expert, neither to the input that was
            decided on nor to any later one.
        ready: what layers keep of the experts, from the first pass that does.
    """

    route: Route
    probabilities: Tensor
    distance: Optional[Tensor] = None
    before: frozenset[str] = frozenset()
    ready: Optional[Ready] = field(default=None, repr=False, compare=False)


class Decisions(NamedTuple):
    """Decisions that were made on a prompt, for passes that read something else.

    Attributes:
        by_key: by adapter, or by adapter and module; see `Frame.decisions`.
    """

    by_key: dict[Any, Decision]


class Named(NamedTuple):
    """The tasks that the caller of `route(…)` names.

    Attributes:
        names: one task for all samples, or a list with one task per sample.
        routes: the same tasks as a route, by the tasks of each adapter; a single name gives a route of one sample.
            The tensors are made once, so that code is not compiled again for other names.
        ready: what layers keep of the experts.
    """

    names: str | list[str]
    routes: dict[tuple[str, ...], Optional[Route]]
    ready: Ready

    @classmethod
    def of(cls, names: str | list[str], adapters: Iterable[Sequence[str]]) -> "Named":
        listed = [names] if isinstance(names, str) else names
        return cls(names, {tuple(tasks): _route_of(listed, tasks) for tasks in adapters}, Ready())

    @property
    def is_static(self) -> bool:
        """Whether no adapter adds an expert to any sample."""
        return not any(self.routes.values())


def _route_of(names: list[str], tasks: Sequence[str]) -> Optional[Route]:
    """The route to named tasks over one adapter's `tasks`. `"static"`, and tasks of other adapters, add no expert."""
    if not set(names) & set(tasks):
        return None
    experts = torch.tensor([tasks.index(name) if name in tasks else 0 for name in names])
    weights = torch.tensor([float(name in tasks) for name in names])
    return Route(experts, None if bool(weights.all()) else weights)


def forced_route(
    forced: Named | Route, tasks: Sequence[str], batch: int, device: torch.device, repeats: bool
) -> Optional[Route]:
    """The route that the caller of `route(…)` asks for; None for the static model.

    Args:
        forced: the argument of `route`.
        tasks: tasks of the adapter.
        batch: number of samples.
        repeats: whether the batch may repeat every sample, as beams do.
    """
    route = forced.routes[tuple(tasks)] if isinstance(forced, Named) else forced
    if route is None:
        return None
    route = route.to(device)
    if isinstance(forced, Named) and isinstance(forced.names, str):
        return route
    if route.experts.shape[0] != batch and not repeats:
        raise HfEsmError(f"Routes of {len(route.experts)} samples do not fit a batch of {batch}. {ONE_PER_SAMPLE}")
    return route.for_batch(batch)


def nearest_prototype(pooled: Tensor, prototypes: Tensor) -> Decision:
    """Decide for the task whose prototype `[T, d]` has the largest cosine with the pooled input `[B, d]`."""
    cosines = F.normalize(pooled, dim=-1) @ F.normalize(prototypes.float(), dim=-1).T
    return Decision(Route(cosines.argmax(-1)), cosines)


def project(pooled: Tensor, projection: Tensor) -> Tensor:
    """One reader's share of the discriminant's evidence `[B, K + 2]`; the shares of all readers are summed.

    Columns: the pooled input `[B, d]` along the `K` directions and along the mean input, and its squared norm.
    """
    along = pooled @ projection.float().T
    return torch.cat([along, pooled.square().sum(-1, keepdim=True)], dim=1)


def discriminate(evidence: Tensor, classes: Tensor, precision: Tensor, config: RoutedExpertsConfig) -> Decision:
    """Decide by normal distributions of one covariance around the tasks' means.

    Weights of the `top_k` likeliest tasks are probabilities at the higher `mixing_temperature`. The weight that they
    lack to 1 is that of the static model.

    Args:
        evidence: `[B, K + 2]`, see `project`.
        classes: `[T, K]`, means of the tasks along the directions.
        precision: `[2, K + 1]`, see `RoutedExpertsLayer.routed_experts_precision`.
    """
    precision, offset = precision.float()
    along = evidence[:, :-2] - offset[:-1]
    across = (evidence[:, -1] - 2 * evidence[:, -2] + offset[-1] - along.square().sum(-1)).clamp_min(0)
    distances = (along[:, None] - classes.float()).square() @ precision[:-1]
    probabilities = torch.softmax(distances / (-2 * config.temperature), dim=-1)
    flatter = torch.softmax(distances / (-2 * config.temperature * config.mixing_temperature), dim=-1)
    weights, experts = flatter.topk(min(config.top_k, len(config.tasks)), dim=-1)
    # Steps of 1/256 are exact in bfloat16, and hide differences in the last bits.
    weights, distance = (256 * weights).round() / 256, None
    if config.threshold is not None:
        distance = (distances.min(-1).values + across * precision[-1]) / config.threshold
        weights = weights * (distance <= 1)[:, None]
    return Decision(Route(experts, weights), probabilities, distance)


def encoder_vote(adapter: str, decisions: dict[Any, Decision]) -> Optional[Decision]:
    """The task that most modules of the encoder decided for by their prototypes; None if none decided.

    The vote is added to `decisions`, so that decisions of the decoder's modules never change it.

    Args:
        decisions: of a pass, by adapter and module.
    """
    key = adapter, "the encoder's vote"
    if key not in decisions:
        votes = [
            F.one_hot(decision.route.experts, decision.probabilities.shape[1]).float()
            for by, decision in decisions.items()
            if isinstance(by, tuple) and by[0] == adapter
        ]
        if not votes:
            return None
        shares = torch.stack([vote.to(votes[0].device) for vote in votes]).mean(0)
        decisions[key] = Decision(Route(shares.argmax(-1)), shares)
    return decisions[key]


def listed(part: Tensor) -> Tensor:
    """Return the experts or weights of a route as `[B, k]`."""
    return part if part.dim() == 2 else part[:, None]
