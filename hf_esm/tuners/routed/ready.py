"""Experts of a route made ready for later passes of a request: factors gathered, or folded into a private weight."""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ...utils import is_offloaded
from .routes import Ready, Route, listed


# Bytes of weights that one request may copy to fold experts into them.
FOLDED_BYTES = 2**30


@dataclass(frozen=True)
class Gathered:
    """The factors of each sample's experts, or of the experts that all samples get.

    Attributes:
        down: `[B, k r, d_in]`; `[1, k r, d_in]` if all samples get the same.
        up: `[B, k r, d_out]`, or `[1, k r, d_out]`; times the weights.
    """

    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor, experts: Tensor, weights: Tensor, dtype: torch.dtype) -> "Gathered":
        """Gather the factors `a` `[T, r, d_in]` and `b` `[T, d_out, r]` of experts `[B, k]` with weights `[B, k]`."""
        down, up = a[experts].to(dtype), (b[experts] * weights[..., None, None]).to(dtype).mT
        return cls(down.flatten(1, 2), up.flatten(1, 2))

    def add(self, result: Tensor, rows: Tensor) -> Tensor:
        """Return `result + Σ w_t (x A_tᵀ) B_tᵀ` for samples `[B, L, d_in]`."""
        rows = rows.to(result.dtype)
        if len(self.down) == 1:
            flat = torch.addmm(result.reshape(-1, result.shape[-1]), rows.flatten(0, 1) @ self.down[0].T, self.up[0])
        else:
            flat = torch.baddbmm(result.reshape(*rows.shape[:2], -1), rows @ self.down.mT, self.up)
        return flat.view_as(result)


@dataclass(frozen=True)
class Grouped:
    """The factors of the `U` experts that any sample gets, and which samples get each.

    Attributes:
        down: `[U, r, d_in]`.
        up: `[U, r, d_out]`.
        samples: `[U m]`, the samples of each expert, filled up with sample 0 to the largest number of any.
        weights: `[U, m, 1]`, 0 where filled up.
    """

    down: Tensor
    up: Tensor
    samples: Tensor
    weights: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor, experts: Tensor, weights: Tensor, dtype: torch.dtype) -> "Grouped":
        """Sort samples by their experts; the arguments are those of `Gathered.of`."""
        order = experts.flatten().sort()
        used, counts = order.values.unique_consecutive(return_counts=True)
        place = torch.arange(len(order.values), device=experts.device)
        place = place - (counts.cumsum(0) - counts).repeat_interleave(counts)
        group = torch.arange(len(used), device=experts.device).repeat_interleave(counts)
        samples = torch.zeros(len(used), int(counts.max()), dtype=torch.int64, device=experts.device)
        shares = torch.zeros(samples.shape, dtype=weights.dtype, device=experts.device)
        samples[group, place] = order.indices // experts.shape[1]
        shares[group, place] = weights.flatten()[order.indices]
        down, up = a[used].to(dtype), b[used].to(dtype).mT.contiguous()
        return cls(down, up, samples.flatten(), shares[..., None].to(dtype))

    def add(self, result: Tensor, rows: Tensor) -> Tensor:
        """Return `result + Σ w_t (x A_tᵀ) B_tᵀ` for samples of one token, `[B, 1, d_in]`."""
        grouped = rows[:, 0].to(result.dtype)[self.samples].view(*self.weights.shape[:2], -1)
        added = (grouped @ self.down.mT * self.weights) @ self.up
        flat = result.reshape(len(rows), -1).index_add(0, self.samples, added.flatten(0, 1))
        return flat.view_as(result)


class Kept:
    """What one layer keeps in one request: the experts that its samples get, or a private weight with them in it.

    A weight is made where all samples get the same experts: for a pass of many tokens, and to be kept from the second
    pass of one kind on.

    Attributes:
        signature: of the passes that it is for.
        folded: `W + Σ w_t B_t A_t` `[d_out, d_in]`, if it is kept.
    """

    def __init__(self, signature: list, base: nn.Module, x: Tensor, a: Tensor, b: Tensor, route: Route):
        self.signature, self.factors, self.route = signature, (a, b), route
        self.experts: Optional[Gathered | Grouped] = None
        self.foldable = folds(base, x)
        self.folded: Optional[Tensor] = None
        self.passes = 0

    def run(self, base: nn.Module, x: Tensor, rows: Tensor, ready: Ready) -> Tensor:
        """Return `x Wᵀ + bias + Σ w_t (x A_tᵀ) B_tᵀ`, where the rows are the input as `[B, L, d_in]`."""
        self.passes += 1
        weight = self._fold(base, rows, ready) if self.foldable and self.folded is None else self.folded
        if weight is not None:
            return F.linear(x, weight, base.bias)
        result = base(x)
        return self._experts(rows, result.dtype).add(result, rows)

    def _experts(self, rows: Tensor, dtype: torch.dtype) -> Gathered | Grouped:
        if self.experts is None:
            route = self.route if len(self.route.experts) == 1 else self.route.for_batch(len(rows))
            self.experts = make_ready(*self.factors, route.to(rows.device), dtype)
        return self.experts

    def _fold(self, base: nn.Module, rows: Tensor, ready: Ready) -> Optional[Tensor]:
        """Return the weight with the experts in it, if that is worth its products, or room to keep it."""
        experts, (height, width) = self._experts(rows, rows.dtype), (self.factors[1].shape[1], rows.shape[-1])
        self.foldable = isinstance(experts, Gathered) and len(experts.down) == 1
        keep = self.passes > 1 and ready.folded_bytes + 4 * height * width <= FOLDED_BYTES
        if not self.foldable or not (keep or rows.shape[:2].numel() * (height + width) > height * width):
            return None
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        weight = torch.addmm(weight.detach(), experts.up[0].T, experts.down[0])
        if keep:
            self.folded = weight
            ready.folded_bytes += weight.nbytes
        return weight


def make_ready(a: Tensor, b: Tensor, route: Route, dtype: torch.dtype) -> Gathered | Grouped:
    """Return the experts of a route, each of them once where many samples share them.

    Args:
        a, b: factors of all experts, `[T, r, d_in]` and `[T, d_out, r]`.
        route: of `B` samples of one token, or one for all samples.
        dtype: of the products.
    """
    experts, weights = listed(route.experts), route.weights
    weights = torch.ones(experts.shape, device=experts.device) if weights is None else listed(weights)
    if torch.equal(experts, experts[:1].expand_as(experts)) and torch.equal(weights, weights[:1].expand_as(weights)):
        return Gathered.of(a, b, experts[:1], weights[:1], dtype)
    # A sample that fills up a group gets 0 times an expert, which may be NaN in float16.
    grouped = dtype != torch.float16 and experts.numel() > 2 * len(experts.unique())
    return (Grouped if grouped else Gathered).of(a, b, experts, weights, dtype)


def folds(base: nn.Module, x: Tensor) -> bool:
    """Whether a linear map is one that experts can be folded into: in float32, and with nothing else on it.

    In half precision, a small update of a large weight would be rounded away.
    """
    return (
        type(base) in (nn.Linear, Conv1D)
        and base.weight.dtype == x.dtype == torch.float32
        and type(base.weight.data) is Tensor
        and not (base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base) or is_offloaded(base))
        and not torch.is_autocast_enabled(x.device.type)
    )
