"""A linear map with the low-rank experts of all tasks on it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Optional

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ...errors import HfEsmError
from ..base import AdapterLayer, recorded
from .config import RoutedExpertsConfig
from .frames import Frame, RoutingState
from .pooling import pool, sample_rows
from .ready import Conditions, Kept, add_to_all
from .routes import (
    Decision,
    Decisions,
    Named,
    Ready,
    Route,
    discriminate,
    encoder_vote,
    forced_route,
    listed,
    nearest_prototype,
    project,
)


NOT_MERGEABLE = (
    "Routed experts depend on the sample and cannot be merged into one weight. `hf-esm export` (or "
    "`RoutedModel.export_lora`) writes each expert as a LoRA adapter, which can be merged."
)


class Decided(Exception):
    """Ends a forward pass as soon as the router has decided."""


class RoutedExpertsLayer(AdapterLayer):
    """The experts of `T` tasks on one linear map, and the map's part of the router, by adapter, in float32.

    Attributes:
        routed_experts_A: `[T, r, d_in]`, coordinates of the experts along their directions.
        routed_experts_B: `[T, d_out, r]`, essential directions of the experts; expert `t` adds `x A_tᵀ B_tᵀ`.
        routed_experts_prototypes: `[T, d_in]`, normalised mean inputs of the experts, for a prototype router.
        routed_experts_projection: `[K + 1, d_in]`, in modules that a discriminant router reads: this module's columns
            of the directions, which are orthonormal over all readers, and of the mean input.
        routed_experts_classes: `[T, K]`, in the module that decides: means of the tasks along the directions.
        routed_experts_precision: `[2, K + 1]`, in the module that decides. First row: inverse variances along the
            directions, and across them. Second row: the mean of all tasks along the directions, and its squared norm.
        state: shared by the routed layers and hooks of a model.
        tower: name of the tower that the linear map belongs to, "" in a model without towers.
        reads_once: whether the linear map reads the samples first, and may then read inputs that are not samples.
    """

    adapter_layer_names = ("routed_experts_A", "routed_experts_B")
    other_param_names = (
        "routed_experts_prototypes",
        "routed_experts_projection",
        "routed_experts_classes",
        "routed_experts_precision",
    )

    def __init__(self, base_layer: nn.Module, state: RoutingState, name: str, tower: str, reads_once: bool):
        super().__init__(base_layer, name)
        self.state, self.tower, self.reads_once = state, tower, reads_once
        self.configs: dict[str, RoutedExpertsConfig] = {}
        self.routed_experts_A, self.routed_experts_B = nn.ParameterDict(), nn.ParameterDict()
        for buffers in self.other_param_names:
            setattr(self, buffers, BufferDict(persistent=True))

    def update_layer(self, adapter_name: str, config: RoutedExpertsConfig, rank: int) -> None:
        """Add the tensors of an adapter; those that come from its file are NaN until the file is loaded."""
        self.configs[adapter_name] = config = config.of_tower(self.tower)
        self.known_loaded.discard(adapter_name)
        count, width, directions = len(config.tasks), self.in_features, config.directions
        from_file = config.inference_mode or config.base_fingerprint is not None  # the latter when training goes on
        if rank:
            a, b = torch.randn(count, rank, width) * width**-0.5, torch.zeros(count, self.out_features, rank)
            if from_file:
                a, b = torch.full_like(a, torch.nan), torch.full_like(b, torch.nan)
            self.routed_experts_A[adapter_name], self.routed_experts_B[adapter_name] = nn.Parameter(a), nn.Parameter(b)
        if config.router == "prototype":
            self.routed_experts_prototypes[adapter_name] = torch.full((count, width), torch.nan)
        if self.name in config.readers:
            self.routed_experts_projection[adapter_name] = torch.full((directions + 1, width), torch.nan)
            if self.name == config.readers[-1]:
                self.routed_experts_classes[adapter_name] = torch.full((count, directions), torch.nan)
                self.routed_experts_precision[adapter_name] = torch.full((2, directions + 1), torch.nan)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


class RoutedExpertsLinear(nn.Module, RoutedExpertsLayer):
    """`y = x Wᵀ + b + Σ w_t (x A_tᵀ) B_tᵀ` over the experts `t` of each sample, for `nn.Linear` and `Conv1D`.

    Experts are added in the precision of `y`.
    """

    def __init__(
        self, base_layer: nn.Module, state: RoutingState, name: str, tower: str, adapter_name: str, reads_once: bool
    ):
        super().__init__()
        RoutedExpertsLayer.__init__(self, base_layer, state, name, tower, reads_once)
        self._active_adapter = adapter_name

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RoutedExpertsLinear":
        """Move adapters with the base, but keep them in float32: half precision changes routes."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        for name, child in self.named_children():
            child._apply(fn if name == "base_layer" else keep_dtype)
        return self

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        frame = self._frame()
        if frame is None:
            self.state.load()
        if frame is None and self.state.local.forced is None:
            raise HfEsmError(
                f"{self.name} was run outside of its model's forward pass, so that there is no route. Call the model, "
                "or name the task: `with route(model, task)`. To checkpoint activations, call "
                "`activation_checkpointing_enable` of Transformers."
            )
        frame, forced = frame or Frame(x.shape[0]), self.state.local.forced
        if isinstance(forced, Named) and forced.is_static:
            frame.read.add(self.name)
            return self.base_layer(x, *args, **kwargs)
        rows = sample_rows(x, frame.batch)
        if rows is None or (self.reads_once and self.name in frame.read):
            with self.in_place():
                return self._add_to_all(self.base_layer(x, *args, **kwargs), x)
        frame.read.add(self.name)
        ready = None if args or kwargs else self._ready(frame)
        modules, active = self._modules, self._active_adapter  # attributes of modules take longer than a small product
        kept = None if ready is None else ready.layers.get(self.name)
        if kept is not None and kept.conditions.hold(modules, active, frame.batch, x):
            return kept.run(x, rows, ready)
        with self.in_place():
            added = list(self._routes(frame, rows, x))
            if ready is not None and len(added) == 1:
                adapter, route = added[0]
                if ready.shared(adapter, route) or rows.shape[1] == 1:  # else as much as all samples may be kept
                    conditions = Conditions(modules, active, frame.batch, x)
                    kept = Kept(conditions, self.routed_experts_A[adapter], self.routed_experts_B[adapter], route)
                    ready.layers[self.name] = kept
                    return kept.run(x, rows, ready)
            result = self.base_layer(x, *args, **kwargs)
            for adapter, route in added:
                result = self._add_experts(result, adapter, rows, route)
        return result

    def _routes(self, frame: Frame, rows: Tensor, x: Tensor) -> Iterator[tuple[str, Route]]:
        """The active adapters that add experts here, with their routes."""
        for adapter in self.active_adapters:
            if adapter in self.configs:
                self.ensure_loaded(adapter)
                route = self._route(adapter, frame, rows, x)
                if route is not None and adapter in self.routed_experts_A:
                    yield adapter, route

    def _ready(self, frame: Frame) -> Optional[Ready]:
        """What layers keep for later passes of this request, which have the same route; None if that is nothing."""
        forced, experts = self.state.local.forced, self._modules["routed_experts_A"]
        if torch.is_grad_enabled() or recorded() or "_hf_hook" in vars(experts) or len(self.active_adapters) > 1:
            return None
        if isinstance(forced, Named):
            return forced.ready
        decision = frame.decisions.get(self.active_adapters[0])  # of a router that decides for all modules
        if decision is None or frame.cache is None or not (forced is None or isinstance(forced, Decisions)):
            return None
        decision.ready = decision.ready or Ready()
        return decision.ready

    def _frame(self) -> Optional[Frame]:
        """The frame of this pass; in a projection behind a tower, the frame of the tower."""
        local = self.state.local
        if self.tower and not self.name.startswith(f"{self.tower}."):
            return local.towers.get(self.tower)
        return local.frames[-1] if local.frames else None

    def _add_to_all(self, result: Tensor, x: Tensor) -> Tensor:
        """Add the one expert that the caller named for all samples to an input that does not come from samples, such
        as relative positions.
        """
        named, shape = self.state.local.forced, result.shape
        for adapter in self.active_adapters:
            if isinstance(named, Named) and isinstance(named.names, str) and adapter in self.routed_experts_A:
                route = named.routes[tuple(self.configs[adapter].tasks)]
                if route is not None:
                    rows = x.reshape(1, -1, x.shape[-1])
                    result = self._add_experts(result.reshape(1, -1, result.shape[-1]), adapter, rows, route)
        return result.reshape(shape)

    def _add_experts(self, result: Tensor, adapter: str, rows: Tensor, route: Route) -> Tensor:
        a, b = self.routed_experts_A[adapter], self.routed_experts_B[adapter]
        rows = rows.to(result.dtype)
        learned = route.weights is not None and route.weights.requires_grad
        if not recorded() and len(route.experts) == 1 and rows.device.type == "cpu" and not learned:
            return add_to_all(result, rows, a, b, route)
        experts, weights = route.for_batch(rows.shape[0]).to(rows.device)
        if grouping_pays(experts, a, b, rows.shape[1]):
            return result + add_by_expert(rows, a, b, experts, weights).reshape(result.shape)
        added = result.reshape(*rows.shape[:2], -1)
        for nth, expert in enumerate(listed(experts).unbind(1)):
            hidden = torch.bmm(rows, a[expert].to(rows.dtype).mT)
            if weights is not None:
                hidden = hidden * listed(weights)[:, nth, None, None].to(hidden.dtype)
            added = torch.baddbmm(added, hidden, b[expert].to(rows.dtype).mT)
        return added.reshape(result.shape).to(result.dtype)

    def _route(self, adapter: str, frame: Frame, rows: Tensor, x: Tensor) -> Optional[Route]:
        """The route of an adapter's experts in this module; None if no expert is added."""
        config, forced = self.configs[adapter], self.state.local.forced
        if forced is not None and not isinstance(forced, Decisions):
            repeats = frame.cache is not None or frame.encoder_states is not None
            return forced_route(forced, config.tasks, rows.shape[0], rows.device, repeats)
        if config.router == "oracle":
            raise HfEsmError(f"Adapter '{adapter}' has no router. Name the tasks: `with route(model, tasks)`.")
        if not config.decides:
            return None
        key = adapter if config.router == "discriminant" else (adapter, self.name)
        if key not in frame.decisions and not frame.decoding:
            self._decide(key, adapter, frame, rows, x)
        if config.router == "discriminant":
            self._check_encoder_decided(adapter, frame)
        decision = frame.decisions.get(key)
        return None if decision is None or self.name in decision.before else decision.route

    def _decide(self, key: Any, adapter: str, frame: Frame, rows: Tensor, x: Tensor) -> None:
        """Take this module's part in the decision, and record the decision if it is made here."""
        config, local = self.configs[adapter], self.state.local
        if frame.packed:
            raise HfEsmError(
                f"A row of the batch holds several samples ({frame.packed}), and the router decides on rows. Give "
                "each sample a row (no packing, no collator without padding), or name the task of all: `with "
                "route(model, task)`."
            )
        # Half precision would change routes, and no gradient passes through a choice.
        with torch.autocast(rows.device.type, enabled=False), torch.no_grad():
            if config.router == "prototype":
                frame.decisions[key] = self._compare(adapter, frame, rows, x)
            elif adapter in self.routed_experts_projection:
                self._read(adapter, frame, rows, x)
        if key in frame.decisions:
            frame.decisions[key] = replace(frame.decisions[key], before=frozenset(frame.read - {self.name}))
        if key in frame.decisions and local.records is not None:
            local.records.append((adapter, self.name, frame.decisions[key]))
            if local.deciding and config.router == "discriminant":
                raise Decided

    def _compare(self, adapter: str, frame: Frame, rows: Tensor, x: Tensor) -> Decision:
        """The decision of a prototype router."""
        # A decoder first reads a start token, which is equal for all samples: the modules of the encoder vote.
        in_decoder = frame.encoder_states is not None and x is not frame.encoder_states
        vote = encoder_vote(adapter, frame.decisions) if in_decoder else None
        return vote or nearest_prototype(pool(rows, frame, x, self.name), self.routed_experts_prototypes[adapter])

    def _read(self, adapter: str, frame: Frame, rows: Tensor, x: Tensor) -> None:
        """Add this module's evidence for a discriminant router; the last reader decides."""
        evidence = project(pool(rows, frame, x, self.name), self.routed_experts_projection[adapter])
        if adapter in frame.evidence:
            evidence = frame.evidence[adapter].to(evidence.device) + evidence
        frame.evidence[adapter] = evidence
        if adapter in self.routed_experts_classes:
            del frame.evidence[adapter]
            classes, precision = self.routed_experts_classes[adapter], self.routed_experts_precision[adapter]
            frame.decisions[adapter] = discriminate(evidence, classes, precision, self.configs[adapter])

    def _check_encoder_decided(self, adapter: str, frame: Frame) -> None:
        """Refuse encoder states in a decoder if the encoder has not decided about them."""
        if frame.encoder_states is None or frame.decoding or adapter in {**frame.decisions, **frame.evidence}:
            return
        raise HfEsmError(
            f"{self.name} reads encoder states without a decision of the router: they were copied, or are not from "
            "this model's encoder. Pass on what the encoder of this model returned, or name the tasks: `with "
            "route(model, tasks)`."
        )

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        raise HfEsmError(NOT_MERGEABLE)

    def unmerge(self) -> None:
        """Do nothing, since experts are never merged."""


# Bytes that a CPU copies in about the time in which `add_by_expert` handles one more expert.
TURN_BYTES = 1_000_000


def grouping_pays(experts: Tensor, a: Tensor, b: Tensor, tokens: int) -> bool:
    """Whether `add_by_expert` is faster than gathering the factors of each sample's experts.

    Gathering copies factors, and `add_by_expert` copies samples: it is faster where samples of few tokens share
    experts, as in generation. Never while code is recorded, nor on a GPU, which would have to wait for the CPU.
    """
    if recorded() or tokens >= a.shape[1] or experts.device.type != "cpu":
        return False
    distinct = len(experts.unique())
    return (experts.numel() - distinct) * (a[0].nbytes + b[0].nbytes) > distinct * TURN_BYTES


def add_by_expert(rows: Tensor, a: Tensor, b: Tensor, experts: Tensor, weights: Optional[Tensor]) -> Tensor:
    """`Σ w_t (x A_tᵀ) B_tᵀ` `[B, L, d_out]` for samples `[B, L, d_in]`, one expert after another.

    Each expert is computed for those samples alone that get it.
    """
    added = rows.new_zeros(*rows.shape[:2], b.shape[1])
    for expert in experts.unique().tolist():
        chosen = listed(experts) == expert
        shares = (chosen if weights is None else chosen * listed(weights)).sum(1)
        samples = shares.nonzero()[:, 0]
        hidden = rows[samples] @ a[expert].to(rows.dtype).mT
        if weights is not None:
            hidden = hidden * shares[samples].to(hidden.dtype)[:, None, None]
        hidden = (hidden @ b[expert].to(rows.dtype).mT).to(added.dtype)  # autocast may use another dtype
        added.index_add_(0, samples, hidden)
    return added
