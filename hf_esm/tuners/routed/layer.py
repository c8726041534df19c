"""A linear map with the low-rank experts of all tasks on it."""

from collections.abc import Callable
from typing import Any, Optional

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import HfEsmError
from .config import RoutedExpertsConfig
from .pooling import pool, sample_rows
from .routing import Decided, Decision, Frame, Named, Route, RoutingState, forced_route, vote


NOT_MERGEABLE = (
    "Routed experts depend on the sample and cannot be merged into one weight. `hf-esm export` (or "
    "`RoutedModel.export_lora`) writes each expert as a LoRA adapter, which can."
)


class RoutedExpertsLayer(BaseTunerLayer):
    """What a module with routed experts holds, by adapter, for `T` tasks.

    Attributes:
        routed_experts_A: `[T, r, d_in]`, the experts' coordinates `Eᵀ δ`.
        routed_experts_B: `[T, d_out, r]`, their essential directions `E`; expert t adds `x Aᵀ Bᵀ`.
        routed_experts_prototypes: `[T, d_in]`, normalised mean inputs, with a prototype router.
        routed_experts_projection: `[K + 1, d_in]`, in the modules that a discriminant router reads: orthonormal
            directions over all of them, and the mean input.
        routed_experts_classes: `[T, K]`, in the one that decides: the tasks' means in these directions.
        routed_experts_precision: `[2, K + 1]`, there too: one over the variance along and beside the directions, and
            the mean of all along them, with its squared norm.
    """

    adapter_layer_names = ("routed_experts_A", "routed_experts_B")
    other_param_names = (
        "routed_experts_prototypes",
        "routed_experts_projection",
        "routed_experts_classes",
        "routed_experts_precision",
    )

    def __init__(self, base_layer: nn.Module, state: RoutingState, name: str, tower: str, reads_once: bool):
        self.base_layer = base_layer
        self.state, self.name, self.tower, self.reads_once = state, name, tower, reads_once
        self.configs: dict[str, RoutedExpertsConfig] = {}
        self.known_loaded: set[str] = set()
        self.routed_experts_A, self.routed_experts_B = nn.ParameterDict(), nn.ParameterDict()
        for buffers in self.other_param_names:
            setattr(self, buffers, BufferDict(persistent=True))
        self._disable_adapters = False
        self.merged_adapters = []
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def update_layer(self, adapter_name: str, config: RoutedExpertsConfig, rank: int) -> None:
        """Make room for an adapter; what has to come from its file is NaN until it is loaded."""
        self.configs[adapter_name] = config = config.of_tower(self.tower)
        self.known_loaded.discard(adapter_name)
        count, width, directions = len(config.tasks), self.in_features, config.directions
        from_file = config.inference_mode or config.base_fingerprint is not None  # the latter, to train on
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

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Optional[torch.device] = None) -> None:
        # PEFT's own brings them to the base's dtype, too: in bfloat16 routes change.
        for name in (*self.adapter_layer_names, *self.other_param_names):
            held = getattr(self, name)
            if adapter_name in held and not held[adapter_name].is_meta:
                held[adapter_name] = held[adapter_name].to(device or self.weight.device)

    def check_loaded(self, adapter: str) -> None:
        """Refuse an adapter whose file lacked some of its tensors, of which PEFT only warns."""
        for name in (*self.adapter_layer_names, *self.other_param_names):
            held = getattr(self, name)
            if adapter in held and (held[adapter].is_meta or bool(held[adapter].isnan().any())):
                raise HfEsmError(
                    f"{self.name}: adapter '{adapter}' has no {name}. Its file lacks it, or holds NaN: write it again."
                )
        self.known_loaded.add(adapter)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


class RoutedExpertsLinear(nn.Module, RoutedExpertsLayer):
    """`y = x Wᵀ + b + Σ w (x A_tᵀ) B_tᵀ` over each sample's own `t` and `w`, for `nn.Linear` and `Conv1D`, in the
    precision of `y`.
    """

    def __init__(
        self, base_layer: nn.Module, state: RoutingState, name: str, tower: str, adapter_name: str, reads_once: bool
    ):
        super().__init__()
        RoutedExpertsLayer.__init__(self, base_layer, state, name, tower, reads_once)
        self._active_adapter = adapter_name

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RoutedExpertsLinear":
        """Adapters go where the base goes, but are held in float32: in half precision routes change."""

        def keep(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        for name, child in self.named_children():
            child._apply(fn if name == "base_layer" else keep)
        return self

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        frame = self._frame()
        if frame is None and self.state.local.forced is None:
            raise HfEsmError(
                f"{self.name} was run outside of its model's forward pass, so that there is no route. Call the model, "
                "or name the task: `with route(model, task)`. To checkpoint activations, call "
                "`gradient_checkpointing_enable` of Transformers."
            )
        frame = frame or Frame(x.shape[0])
        rows = sample_rows(x, frame.batch)
        if rows is None or (self.reads_once and self.name in frame.read):
            return self._add_to_all(result, x)
        frame.read.add(self.name)
        for adapter in self.active_adapters:
            if adapter in self.configs:
                if not torch.compiler.is_compiling() and adapter not in self.known_loaded:
                    self.check_loaded(adapter)
                route = self._route(adapter, frame, rows, x)
                if route is not None and adapter in self.routed_experts_A:
                    result = self._add_experts(result, adapter, rows, route)
        return result

    def _add_to_all(self, result: Tensor, x: Tensor) -> Tensor:
        """To what is made of no sample (relative positions), the expert that the caller named for all of them."""
        named, shape = self.state.local.forced, result.shape
        for adapter in self.active_adapters:
            if isinstance(named, Named) and isinstance(named.names, str) and adapter in self.routed_experts_A:
                route = named.routes[tuple(self.configs[adapter].tasks)]
                if route is not None:
                    rows = x.reshape(1, -1, x.shape[-1])
                    result = self._add_experts(result.reshape(1, -1, result.shape[-1]), adapter, rows, route)
        return result.reshape(shape)

    def _frame(self) -> Optional[Frame]:
        """What is known of the samples of this pass; of what was projected from a tower, that tower's."""
        local = self.state.local
        if self.tower and not self.name.startswith(f"{self.tower}."):
            return local.towers.get(self.tower)
        return local.frames[-1] if local.frames else None

    def _add_experts(self, result: Tensor, adapter: str, rows: Tensor, route: Route) -> Tensor:
        a, b = self.routed_experts_A[adapter], self.routed_experts_B[adapter]
        rows, (experts, weights) = rows.to(result.dtype), route.for_batch(rows.shape[0]).to(rows.device)
        if grouping_pays(experts, a, b, rows.shape[1]):
            return result + add_by_expert(rows, a, b, experts, weights).reshape(result.shape)
        added = result.reshape(*rows.shape[:2], -1)
        for nth, expert in enumerate(_listed(experts).unbind(1)):
            hidden = torch.bmm(rows, a[expert].to(rows.dtype).mT)
            if weights is not None:
                hidden = hidden * _listed(weights)[:, nth, None, None].to(hidden.dtype)
            added = torch.baddbmm(added, hidden, b[expert].to(rows.dtype).mT)
        return added.reshape(result.shape).to(result.dtype)

    def _route(self, adapter: str, frame: Frame, rows: Tensor, x: Tensor) -> Optional[Route]:
        config, local = self.configs[adapter], self.state.local
        if local.forced is not None and not isinstance(local.forced, Decision):
            return forced_route(local.forced, config.tasks, rows.shape[0], rows.device, frame)
        if config.router == "oracle":
            raise HfEsmError(f"Adapter '{adapter}' has no router. Name the tasks: `with route(model, tasks)`.")
        if not config.decides:
            return None
        key = adapter if config.router == "discriminant" else (adapter, self.name)
        if key not in frame.decisions and not frame.decoding:
            if isinstance(local.forced, Decision):
                if config.router == "prototype" or adapter in self.routed_experts_classes:
                    frame.decisions[key] = local.forced
            else:
                # In half precision routes change; and no gradient goes through a choice.
                with torch.autocast(rows.device.type, enabled=False), torch.no_grad():
                    self._find(adapter, frame, rows, x)
            if key in frame.decisions and local.records is not None:
                local.records.append((adapter, self.name, frame.decisions[key]))
                if local.deciding and config.router == "discriminant":
                    raise Decided
        answers = frame.encoder_states is not None and not frame.decoding and local.forced is None
        if answers and config.router == "discriminant" and adapter not in {**frame.decisions, **frame.evidence}:
            raise HfEsmError(
                f"{self.name} answers states of an encoder that has decided nothing about them: they were copied, or "
                "come from elsewhere. Give what the encoder of this model returned, or name the tasks: `with "
                "route(model, tasks)`."
            )
        return frame.decisions[key].route if key in frame.decisions else None

    def _find(self, adapter: str, frame: Frame, rows: Tensor, x: Tensor) -> None:
        """Do this module's part in the decision."""
        if self.configs[adapter].router == "prototype":
            # What a decoder reads at first is the same for every sample, and grows: the encoder's modules vote.
            answering = frame.encoder_states is not None and x is not frame.encoder_states
            found = vote(adapter, frame) if answering else None
            found = found or self._compare(adapter, pool(rows, frame, x, self.name))
            frame.decisions[adapter, self.name] = found
        elif adapter in self.routed_experts_projection:
            self._read(adapter, frame, pool(rows, frame, x, self.name))

    def _compare(self, adapter: str, pooled: Tensor) -> Decision:
        """The published router: the task whose prototype has the largest cosine with the pooled input."""
        prototypes = self.routed_experts_prototypes[adapter]
        cosines = F.normalize(pooled, dim=-1) @ F.normalize(prototypes.float(), dim=-1).T
        return Decision(Route(cosines.argmax(-1)), cosines)

    def _read(self, adapter: str, frame: Frame, pooled: Tensor) -> None:
        """Leave what the discriminant needs of this module's input; the last reader decides."""
        found = pooled @ self.routed_experts_projection[adapter].float().T
        found = torch.cat([found, pooled.square().sum(-1, keepdim=True)], dim=1)
        earlier = frame.evidence.get(adapter)
        frame.evidence[adapter] = found = found if earlier is None else earlier.to(found.device) + found
        if adapter in self.routed_experts_classes:
            del frame.evidence[adapter]
            frame.decisions[adapter] = self._decide(adapter, found)

    def _decide(self, adapter: str, found: Tensor) -> Decision:
        """Probabilities of the tasks under normal distributions of one covariance, and the distance from all; the
        likeliest tasks' experts, each by a flatter probability, so that what is left is the static model's.
        """
        config = self.configs[adapter]
        precision, offset = self.routed_experts_precision[adapter].float()
        along = found[:, :-2] - offset[:-1]
        beside = (found[:, -1] - 2 * found[:, -2] + offset[-1] - along.square().sum(-1)).clamp_min(0)
        apart = along[:, None] - self.routed_experts_classes[adapter].float()
        distances = apart.square() @ precision[:-1]
        probabilities = torch.softmax(distances / (-2 * config.temperature), dim=-1)
        flatter = torch.softmax(distances / (-2 * config.temperature * config.mixing_temperature), dim=-1)
        weights, experts = flatter.topk(min(config.top_k, len(config.tasks)), dim=-1)
        weights, distance = (256 * weights).round() / 256, None  # the same whatever the last bits, and in bfloat16
        if config.threshold is not None:
            distance = (distances.min(-1).values + beside * precision[-1]) / config.threshold
            weights = weights * (distance <= 1)[:, None]
        return Decision(Route(experts, weights), probabilities, distance)

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        raise HfEsmError(NOT_MERGEABLE)

    def unmerge(self) -> None:
        """Nothing was merged."""


def grouping_pays(experts: Tensor, a: Tensor, b: Tensor, tokens: int) -> bool:
    """Whether to go through a batch expert by expert, which copies samples, rather than to gather every sample's own
    experts, which copies these: where samples of few tokens, as in generation, share experts. Not while compiling, nor
    on other devices, which would have to wait.
    """
    if tokens >= a.shape[1] or experts.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    distinct = len(experts.unique())
    return (experts.numel() - distinct) * (a[0].nbytes + b[0].nbytes) > distinct * _TURN


def add_by_expert(rows: Tensor, a: Tensor, b: Tensor, experts: Tensor, weights: Optional[Tensor]) -> Tensor:
    """`Σ w (x A_tᵀ) B_tᵀ` `[B, L, d_out]` of every sample of `rows` `[B, L, d_in]`, one expert after another,
    without the samples that it is not added to.
    """
    added = rows.new_zeros(*rows.shape[:2], b.shape[1])
    for expert in experts.unique().tolist():
        of_it = _listed(experts) == expert
        shares = (of_it if weights is None else of_it * _listed(weights)).sum(1)
        own = shares.nonzero()[:, 0]
        hidden = rows[own] @ a[expert].to(rows.dtype).mT
        if weights is not None:
            hidden = hidden * shares[own].to(hidden.dtype)[:, None, None]
        hidden = (hidden @ b[expert].to(rows.dtype).mT).to(added.dtype)  # autocast computes in another
        added.index_add_(0, own, hidden)
    return added


def _listed(part: Tensor) -> Tensor:
    """A route's experts or weights as `[B, k]`."""
    return part.reshape(len(part), -1)


# Bytes that a CPU copies in about the time that a turn for one more expert takes.
_TURN = 1_000_000
