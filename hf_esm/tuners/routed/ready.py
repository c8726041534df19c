"""Experts of a route made ready for later passes of a request: factors gathered, or folded into a private weight."""

from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ...utils import is_offloaded
from .routes import Ready, Route, listed


# Bytes of weights that one request may copy to fold experts into them.
FOLDED_BYTES = 2**30


# Products of a sample with an expert that take less time than sorting samples by expert, whether they are used or not.
FEW_PRODUCTS = 64


@dataclass(frozen=True)
class Gathered:
    """The factors of each sample's experts, or those of the experts that any sample gets.

    Attributes:
        down: `[B, k r, d_in]`; `[1, k r, d_in]` if all samples read the same.
        up: `[B, k r, d_out]`, or `[1, k r, d_out]`; times the weights, unless `shares` has them.
        shares: weights of the factors by sample, `[B, k r]`, for samples of one token that read the same factors.
    """

    down: Tensor
    up: Tensor
    shares: Optional[Tensor] = None

    @classmethod
    def of(cls, a: Tensor, b: Tensor, experts: Tensor, weights: Tensor, dtype: torch.dtype) -> "Gathered":
        """Gather the factors `a` `[T, r, d_in]` and `b` `[T, d_out, r]` of experts `[B, k]` with weights `[B, k]`."""
        down, up = a[experts].to(dtype), (b[experts] * weights[..., None, None]).to(dtype).mT
        return cls(down.flatten(1, 2), up.flatten(1, 2))

    @classmethod
    def of_all(cls, a: Tensor, b: Tensor, experts: Tensor, weights: Tensor, dtype: torch.dtype) -> "Gathered":
        """Take the factors of every expert that is used once; the arguments are those of `of`."""
        used, shares = experts.unique(), weights.new_zeros(len(experts), len(a))
        shares = shares.scatter_add_(1, experts, weights)[:, used].to(dtype)
        down, up = a[used].to(dtype).flatten(0, 1), b[used].to(dtype).mT.flatten(0, 1)
        return cls(down[None], up[None], shares.repeat_interleave(a.shape[1], dim=1))

    def add(self, result: Tensor, rows: Tensor) -> Tensor:
        """Return `result + Σ w_t (x A_tᵀ) B_tᵀ` for samples `[B, L, d_in]`."""
        rows = rows.to(result.dtype)
        if len(self.down) == 1:
            hidden = rows.flatten(0, 1) @ self.down[0].T
            hidden = hidden if self.shares is None else hidden * self.shares
            flat = torch.addmm(result.reshape(-1, result.shape[-1]), hidden, self.up[0])
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


class Conditions:
    """What the sum of a linear map and its experts depends on, beside the route and the numbers in the input.

    Args:
        modules: `base_layer`, `routed_experts_A` and `routed_experts_B` of the layer.
        adapter: name of the active adapter, or a list of such names.
        batch: number of samples.
        x: the layer's input.
    """

    def __init__(self, modules: dict[str, nn.Module], adapter: Any, batch: int, x: Tensor):
        self.base, self.adapter, self.batch = modules["base_layer"], adapter, batch
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device.type
        self.autocast, self.observed = torch.is_autocast_enabled(self.device), is_observed(self.base)
        self.tensors = []
        for module in (self.base, modules["routed_experts_A"], modules["routed_experts_B"]):
            for name, tensor in module._parameters.items():
                version = None if tensor is None or tensor.is_inference() else tensor._version
                pointer = 0 if tensor is None else tensor.data_ptr()
                self.tensors.append((module._parameters, name, tensor, pointer, version))

    def hold(self, modules: dict[str, nn.Module], adapter: Any, batch: int, x: Tensor) -> bool:
        """Return whether nothing of that is different now. In decoding, that takes as long as a small product."""
        if (
            x.shape != self.shape
            or batch != self.batch
            or modules["base_layer"] is not self.base
            or adapter != self.adapter
            or x.dtype is not self.dtype
            or torch.is_autocast_enabled(self.device) is not self.autocast
            or is_observed(self.base) is not self.observed
        ):
            return False
        for parameters, name, tensor, pointer, version in self.tensors:
            if parameters.get(name) is not tensor:
                return False
            if tensor is not None and tensor.data_ptr() != pointer:
                return False
            if version is not None and tensor._version != version:
                return False
        return True


class Kept:
    """What one layer keeps in one request: the experts that its samples get, or a private weight with them in it.

    A weight is made where all samples get the same experts: for a pass of many tokens, and to be kept from the second
    pass of one kind on.

    Attributes:
        conditions: under which it holds.
        folded: `W + Σ w_t B_t A_t` `[d_out, d_in]`, if it is kept.
    """

    def __init__(self, conditions: Conditions, a: Tensor, b: Tensor, route: Route):
        self.conditions, self.factors, self.route = conditions, (a, b), route
        self.experts: Optional[Gathered | Grouped] = None
        self.foldable: Optional[bool] = None
        self.folded: Optional[Tensor] = None
        self.passes = 0

    def run(self, x: Tensor, rows: Tensor, ready: Ready) -> Tensor:
        """Return `x Wᵀ + bias + Σ w_t (x A_tᵀ) B_tᵀ`, where the rows are the input as `[B, L, d_in]`."""
        self.passes += 1
        base = self.conditions.base
        weight = self.folded
        if weight is None and self.foldable is not False:
            weight = self._fold(base, rows, ready)
        if weight is not None:
            return F.linear(x, weight, base.bias)
        result = base(x)
        if self.passes == 1 and len(self.route.experts) == 1 and rows.device.type == "cpu":
            return add_to_all(result, rows.to(result.dtype), *self.factors, self.route)
        return self._experts(rows, result.dtype).add(result, rows)

    def _experts(self, rows: Tensor, dtype: torch.dtype) -> Gathered | Grouped:
        if self.experts is None:
            route = self.route if len(self.route.experts) == 1 else self.route.for_batch(len(rows))
            self.experts = make_ready(*self.factors, route.to(rows.device), dtype)
        return self.experts

    def _fold(self, base: nn.Module, rows: Tensor, ready: Ready) -> Optional[Tensor]:
        """Return the weight with the experts in it, if that is worth its products, or room to keep it."""
        (height, width), tokens = (self.factors[1].shape[1], rows.shape[-1]), rows.shape[:2].numel()
        keep = self.passes > 1 and ready.folded_bytes + 4 * height * width <= FOLDED_BYTES
        if not keep and tokens * (height + width) <= height * width:
            return None
        if self.foldable is None:
            experts = self._experts(rows, rows.dtype) if folds(base, rows) else None
            self.foldable = isinstance(experts, Gathered) and len(experts.down) == 1 and experts.shares is None
        if not self.foldable:
            return None
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        weight = torch.addmm(weight.detach(), self.experts.up[0].T, self.experts.down[0])
        if keep:
            self.folded = weight
            ready.folded_bytes += weight.nbytes
        return weight


def add_to_all(result: Tensor, rows: Tensor, a: Tensor, b: Tensor, route: Route) -> Tensor:
    """Return `result + Σ w_t (x A_tᵀ) B_tᵀ` with the experts of a route of one sample, which all samples get.

    Nothing is copied, and experts of weight 0 are left out. The route is read, for which a GPU would have to wait.
    """
    flat, rows = result.reshape(-1, result.shape[-1]), rows.flatten(0, 1)
    weights = [1.0] * route.experts.numel() if route.weights is None else route.weights.flatten().tolist()
    for expert, weight in zip(route.experts.flatten().tolist(), weights, strict=True):
        if weight:
            flat = torch.addmm(flat, rows @ a[expert].to(rows.dtype).T, b[expert].to(rows.dtype).T, alpha=weight)
    return flat.view_as(result).to(result.dtype)


def make_ready(a: Tensor, b: Tensor, route: Route, dtype: torch.dtype) -> Gathered | Grouped:
    """Return the experts of a route, each of them once where many samples share them.

    Args:
        a, b: factors of all experts, `[T, r, d_in]` and `[T, d_out, r]`.
        route: of `B` samples of one token, or one for all samples.
        dtype: of the products.
    """
    experts, weights = listed(route.experts), route.weights
    if experts.shape == (1, 1) and weights is None:  # as they are: nothing is copied
        expert = int(experts)
        return Gathered(a[expert : expert + 1].to(dtype), b[expert : expert + 1].to(dtype).mT)
    weights = torch.ones(experts.shape, device=experts.device) if weights is None else listed(weights)
    if len(experts) > 1 and (_all_same(experts) and _all_same(weights)):
        experts, weights = experts[:1], weights[:1]
    if len(experts) == 1:
        used = weights[0] != 0
        return Gathered.of(a, b, experts[:, used], weights[:, used], dtype)
    used = len(experts.unique())
    if dtype == torch.float16 or experts.numel() <= used:  # in float16, 0 times an expert may be NaN
        return Gathered.of(a, b, experts, weights, dtype)
    if len(experts) * used <= FEW_PRODUCTS:
        return Gathered.of_all(a, b, experts, weights, dtype)
    return (Grouped if experts.numel() > 2 * used else Gathered).of(a, b, experts, weights, dtype)


def _all_same(part: Tensor) -> bool:
    return torch.equal(part, part[:1].expand_as(part))


def is_observed(base: nn.Module) -> bool:
    """Whether somebody looks at what a linear map gives, or gives something else in its place."""
    return bool(base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base))


def folds(base: nn.Module, x: Tensor) -> bool:
    """Whether a linear map is one that experts can be folded into: in float32, and with nothing else on it.

    In half precision, a small update of a large weight would be rounded away.
    """
    return (
        type(base) in (nn.Linear, Conv1D)
        and base.weight.dtype == x.dtype == torch.float32
        and type(base.weight.data) is Tensor
        and not (is_observed(base) or is_offloaded(base))
        and not torch.is_autocast_enabled(x.device.type)
    )
