"""Methods that look at lengths and angles of whole weights: Model Stock, and interpolation along a sphere."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import HfEsmError
from ..linalg import pieces, piecewise
from .stack import Merged, MergeMethod, Stack, mean_update, weights_cancel


def interpolation_shares(cosine: Tensor, t: float, least_sine: float) -> tuple[Tensor, Tensor]:
    """Return what multiplies two vectors on the way from one to the other along the arc between their directions.

    Args:
        cosine: of the angle between the vectors; of several pairs, of each.
        t: 0 at the first vector, 1 at the second.
        least_sine: sine of the angle at or below which the vectors are interpolated linearly.
    """
    angle = cosine.clamp(-1, 1).arccos()
    sine, line = angle.sin(), torch.tensor([1 - t, t], dtype=cosine.dtype, device=cosine.device)
    straight = sine <= least_sine
    safe = torch.where(straight, 1, sine)
    first, second = ((share * angle).sin() / safe for share in (1 - t, t))
    return torch.where(straight, line[0], first), torch.where(straight, line[1], second)


def cosine_of(first: Tensor, second: Tensor, dim: int | None = None) -> Tensor:
    """Return the cosine between two tensors, along a dimension or as a whole; 0 where one of them is zero."""
    units = []
    for tensor in (first, second):
        length = torch.linalg.vector_norm(tensor, dim=dim, keepdim=dim is not None)
        units.append(tensor / torch.where(length > 0, length, 1))
    product = units[0] * units[1]
    return product.sum() if dim is None else product.sum(dim, keepdim=True)


def _check_sum(name: str, weights: Sequence[float]) -> None:
    if weights_cancel(weights):
        raise HfEsmError(
            f"Method {name!r}: the weights {', '.join(f'{weight:g}' for weight in weights)} sum to 0, so there is no "
            "point between the experts. Change `weights`."
        )


@dataclass
class ModelStock(MergeMethod):
    """Model Stock (arXiv 2403.19522): of each weight, the mean of the updates, times the share of it that the angle
    between them justifies.

    With `N` experts and the cosine `c` between their updates, the mean over all pairs, the share is
    `N c / (1 + (N − 1) c)`: 1 where the experts agree, 0 where they have nothing in common. Where they point away from
    each other, the base stays, where mergekit takes a negative share without a limit. One expert is returned as it is.
    Tasks of weight 0 do not count. The method is meant for fine-tunes on one task; on different tasks, angles are near
    90 degrees, and little is left of the updates.
    """

    name: ClassVar[str] = "model-stock"
    papers: ClassVar[tuple[str, ...]] = ("2403.19522",)
    keeps_span: ClassVar[bool] = True

    def check_weights(self, weights: Iterable[float]) -> None:
        """Raise an error if the weights of the tasks sum to 0."""
        _check_sum(self.name, list(weights))

    def merge(self, stack: Stack) -> Merged:
        merged = mean_update(stack, scaled=True)
        weighted = [u.double() for u, weight in zip(stack.weighted, stack.weights, strict=True) if weight]
        if len(weighted) > 1:
            cosines = torch.stack([cosine_of(first, second) for first, second in combinations(weighted, 2)])
            cosine = float(cosines.mean().clamp(0, 1))
            merged.update *= len(weighted) * cosine / (1 + (len(weighted) - 1) * cosine)
        merged.how = self.name
        return merged


@dataclass
class SLERP(MergeMethod):
    """Spherical linear interpolation between two experts, each weight along the arc between their directions.

    As mergekit computes it: of weights whose cosine is above 0.9995, as of most fine-tunes of one base, the
    interpolation is linear. Tasks' weights `v` move the point to `t v_2 / ((1 − t) v_1 + t v_2)`; lists of weights in
    `overrides` move it from block to block. One expert is returned as it is.
    """

    name: ClassVar[str] = "slerp"
    tunable: ClassVar[bool] = False
    most_experts: ClassVar[int] = 2

    t: float = field(
        default=0.5,
        metadata={
            "help": "0: the first expert; 1: the second",
            "least": 0,
            "most": 1,
            "search": (0.0, 1.0, "linear"),
        },
    )

    def check_weights(self, weights: Iterable[float]) -> None:
        """Raise an error if there are more than two tasks, or if their weights leave no point between them."""
        weights = list(weights)
        super().check_weights(weights)
        self.point(weights)

    def point(self, weights: Sequence[float]) -> float:
        """Return where the merge lies between the experts, with the weights of their tasks."""
        if len(weights) == 1:
            return 0.0
        shares = [(1 - self.t) * weights[0], self.t * weights[1]]
        _check_sum(self.name, shares)
        return shares[1] / sum(shares)

    def merge(self, stack: Stack) -> Merged:
        self.check_weights(stack.weights)
        if len(stack.updates) == 1:
            return Merged(stack.updates[0].clone(), self.name)
        products = torch.zeros(2, 2, dtype=torch.float64, device=stack.base.device)
        for base, *updates in pieces(stack.base, *stack.updates):
            experts = torch.stack(updates).double() + base
            products += experts @ experts.T
        lengths = products.diagonal().sqrt()
        cosine = products[0, 1] / torch.where(lengths > 0, lengths, 1).prod()
        if cosine.abs() > 0.9995:
            cosine = torch.ones_like(cosine)
        ahead, behind = interpolation_shares(cosine, self.point(stack.weights), least_sine=0.0)

        def merge(base: Tensor, first: Tensor, second: Tensor) -> Tensor:
            base = base.double()
            return ahead * (base + first) + behind * (base + second) - base

        return Merged(piecewise(merge, stack.base, *stack.updates), self.name)


@dataclass
class NuSLERP(MergeMethod):
    """Spherical linear interpolation between the updates of two experts, as mergekit's `nuslerp` with a base model.

    The point between them is the second task's share of the weights of both. A zero update counts as at a right angle
    to every other. One expert is returned as it is.
    """

    name: ClassVar[str] = "nuslerp"
    most_experts: ClassVar[int] = 2

    along: str = field(
        default="whole",
        metadata={
            "help": "what has an angle: the whole weight; each of its rows, or columns (mergekit's "
            "`nuslerp_flatten: false`, and with it `nuslerp_row_wise: true`)",
            "choices": ("whole", "rows", "columns"),
        },
    )

    @property
    def keeps_span(self) -> bool:
        """Whether angles are the same in any basis of the outputs: those of rows are not."""
        return self.along != "rows"

    def check_weights(self, weights: Iterable[float]) -> None:
        """Raise an error if there are more than two tasks, or if their weights sum to 0."""
        weights = list(weights)
        super().check_weights(weights)
        _check_sum(self.name, weights)

    def merge(self, stack: Stack) -> Merged:
        self.check_weights(stack.weights)
        if len(stack.updates) == 1:
            return Merged(stack.updates[0].clone(), self.name)
        first, second = (update.double() for update in stack.updates)
        dim = {"whole": None, "rows": -1, "columns": 0}[self.along] if first.dim() else None
        point = stack.weights[1] / sum(stack.weights)
        ahead, behind = interpolation_shares(cosine_of(first, second, dim), point, least_sine=1e-8)
        return Merged((ahead * first + behind * second).float(), self.name)


@dataclass
class Karcher(MergeMethod):
    """The Karcher mean of the experts' weights (arXiv 2603.04972): of each weight, the mean of the directions on the
    sphere, times the mean of the lengths.

    As mergekit computes it, but in float64: in bfloat16, mergekit's angles between fine-tunes of one base are rounded
    to 0, so that it returns the mean direction. Tasks' weights weight both means. One expert is returned as it is.
    """

    name: ClassVar[str] = "karcher"
    papers: ClassVar[tuple[str, ...]] = ("2603.04972",)
    tunable: ClassVar[bool] = False

    max_iter: int = field(default=10, metadata={"help": "most steps towards the mean", "least": 0})
    tol: float = field(default=1e-5, metadata={"help": "length of a step, in radians, at which to stop", "above": 0})

    def check_weights(self, weights: Iterable[float]) -> None:
        """Raise an error if the weights of the tasks sum to 0."""
        _check_sum(self.name, list(weights))

    def merge(self, stack: Stack) -> Merged:
        self.check_weights(stack.weights)
        base = stack.base.double()
        experts = [base + update.double() for update in stack.updates]
        shares = [weight / sum(stack.weights) for weight in stack.weights]
        lengths = [float(torch.linalg.vector_norm(expert)) for expert in experts]
        total = sum(share for share, length in zip(shares, lengths, strict=True) if length) or 1.0
        directed = [
            (share / total, expert / length)
            for share, expert, length in zip(shares, experts, lengths, strict=True)
            if length
        ]
        length = sum(share * length for share, length in zip(shares, lengths, strict=True))
        mean = length * self.mean_direction(directed) if directed else torch.zeros_like(base)
        return Merged((mean - base).float(), self.name)

    def mean_direction(self, directed: list[tuple[float, Tensor]]) -> Tensor:
        """Return the mean of unit tensors on the sphere, each with its share."""
        mean = sum(share * unit for share, unit in directed)
        length = torch.linalg.vector_norm(mean)
        mean = mean / length if length > self.tol else directed[0][1]
        for _ in range(self.max_iter):
            step = torch.zeros_like(mean)
            for share, unit in directed:
                cosine = (mean * unit).sum().clamp(-1, 1)
                angle, sine = cosine.arccos(), cosine.arccos().sin()
                if sine > self.tol:  # no direction leads to where the mean is, or to its opposite
                    step += share * angle / sine * (unit - cosine * mean)
            size = torch.linalg.vector_norm(step)
            if size < self.tol:
                break
            mean = size.cos() * mean + size.sin() * step / size
            mean /= torch.linalg.vector_norm(mean)
        return mean
