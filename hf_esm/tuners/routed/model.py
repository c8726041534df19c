"""Routed experts on the linear maps of a whole model; routes that the caller names; decisions without a full pass."""

import hashlib
import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...architecture import tower_of, towers
from ...errors import HfEsmError
from ...utils import check_known, in_place
from ..base import AdapterModel, check_linear
from .config import RoutedExpertsConfig
from .frames import RoutingState, install, uninstall
from .layer import NOT_MERGEABLE, Decided, RoutedExpertsLayer, RoutedExpertsLinear
from .routes import Decision, Decisions, Named, Route
from .separability import check_separable, inseparable


logger = logging.getLogger(__name__)


class RoutedExpertsModel(AdapterModel):
    """A merged model with a low-rank expert of every task on its linear maps (ESM++, arXiv 2606.19164).

    Each sample is routed by itself: its output depends neither on the other samples of its batch nor on padding.
    `merge_models` with `method="esm++"` writes such an adapter.
    """

    prefix: str = "routed_experts_"
    tuner_layer_cls = RoutedExpertsLayer
    adapter_names_error = "Experts are chosen by the router or by `route(model, tasks)`, not by adapter_names."

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        if "." in adapter_name:
            raise HfEsmError(f"'{adapter_name}' cannot name an adapter: torch allows no dots in the names of weights.")
        if config.decides:
            check_separable(model)
        if config.base_fingerprint is not None:
            _check_fingerprint(model, adapter_name, config)
        if routing_state(model) is None:
            self._state = RoutingState()
            install(model, self._state)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(
        self,
        config: RoutedExpertsConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        rank = config.rank_pattern.get(f"^{current_key}", config.r)
        if isinstance(target, RoutedExpertsLayer):
            target.update_layer(adapter_name, config, rank)
            return
        check_linear(target, current_key, "routed experts")
        if ".experts." in f".{current_key}":  # of a mixture of experts
            raise HfEsmError(
                f"'{current_key}' reads some of each sample's tokens, so that samples cannot be told apart. Leave it "
                "out of target_modules."
            )
        state = routing_state(self.model) or self._state
        # DeBERTa's shared projections read relative positions after the samples.
        reads_once = bool(getattr(parent, "share_att_key", False))
        tower = tower_of(current_key, towers(self.model))
        layer = RoutedExpertsLinear(target, state, current_key, tower, adapter_name, reads_once)
        self.add_layer(adapter_name, layer, parent, target_name, target)
        layer.update_layer(adapter_name, config, rank)

    def _check_merge_allowed(self) -> None:
        raise HfEsmError(NOT_MERGEABLE)

    def unload(self) -> nn.Module:
        model = super().unload()
        uninstall(model)
        return model


def fingerprint(model: nn.Module, modules: Iterable[str]) -> Optional[dict[str, str]]:
    """Hashes of some weights of each module, rounded to bfloat16 and to float16, by dtype.

    In whatever dtype a model is loaded, at least one of the hashes is that of the stored weights. They tell the model
    under the experts from the base, and from other merges. None if weights cannot be read (quantised).
    """
    hashes = {dtype: hashlib.sha256() for dtype in (torch.bfloat16, torch.float16)}
    for name in sorted(modules):
        module = model.get_submodule(name)
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        with in_place(module):
            for weight in (getattr(module, "weight", None), getattr(module, "bias", None)):
                if weight is None:
                    continue
                if weight.is_meta or not weight.is_floating_point() or weight.itemsize == 1:
                    return None
                values = weight.detach().flatten()
                sample = values[:: max(len(values) // 256, 1)].cpu()
                for dtype, digest in hashes.items():
                    digest.update(f"{name} {tuple(weight.shape)}".encode())
                    digest.update(sample.to(dtype).view(torch.int16).numpy().tobytes())
    return {str(dtype).removeprefix("torch."): digest.hexdigest() for dtype, digest in hashes.items()}


def _check_fingerprint(model: nn.Module, adapter: str, config: RoutedExpertsConfig) -> None:
    """Refuse a model that is not the one under which the adapter's experts were made."""
    modules = dict(model.named_modules())
    missing = [name for name in config.modules if name not in modules]
    if missing:
        reason = f"it has no '{missing[0]}'"
    else:
        hashes = fingerprint(model, config.modules)
        if hashes is None:
            logger.warning(
                "Adapter '%s': the weights of this %s cannot be read, so that they cannot be compared with those "
                "that the experts were made for.",
                adapter,
                type(model).__name__,
            )
            return
        if hashes.items() & config.base_fingerprint.items():
            return
        reason = "their weights differ"
    raise HfEsmError(
        f"Adapter '{adapter}' has experts of another model than this {type(model).__name__}: {reason}. Load the "
        "adapter over the merged model that it was made with."
    )


def routing_state(model: nn.Module) -> Optional[RoutingState]:
    """The state that the routed layers of a model share; None if it has no routed layers."""
    return next((module.state for module in model.modules() if isinstance(module, RoutedExpertsLayer)), None)


def _state_of(model: nn.Module) -> RoutingState:
    state = routing_state(model)
    if state is None:
        raise HfEsmError(f"This {type(model).__name__} has no routed experts. Load its adapter first.")
    return state


@contextmanager
def route(model: nn.Module, tasks: str | Sequence[str] | Route | Decision | Decisions) -> Iterator[None]:
    """Within this context, samples get the named experts: in this thread and asyncio task, and in those that asyncio
    starts inside (`create_task`, `to_thread`), but not in a thread that is started by hand.

    Args:
        model: a model with a routed adapter.
        tasks: one task for all samples, one task per sample, a `Route`, the router's `Decision` or `Decisions` on a
            prompt, or `"static"` for no expert. One task for all samples is also added to inputs that do not come from
            samples, such as DeBERTa's relative positions.

    Raises:
        HfEsmError: if there is no such task, or there are several over a model whose samples cannot be told apart; in
            the forward pass, if there is not one task per sample.
    """
    state = _state_of(model)
    if isinstance(tasks, Decision):
        tasks = _everywhere(model, tasks)
    forced = tasks if isinstance(tasks, (Route, Decisions)) else _named(model, tasks)
    with state.request(state.route, forced):
        yield


@contextmanager
def prompt_length(model: nn.Module, length: Optional[int | Sequence[int]]) -> Iterator[None]:
    """Within this context, the router reads the first `length` tokens of each sample, padding not counted.

    For callers that run prompt and answer together without labels, which otherwise tell where a prompt ends.

    Args:
        model: a model with a routed adapter.
        length: number of tokens of all prompts, or of each; None for whole inputs.
    """
    state = _state_of(model)
    with state.request(state.prompt_length, length):
        yield


def _everywhere(model: nn.Module, decision: Decision) -> Decisions:
    """One decision for every adapter, whether its router decides once or in every module."""
    layers = [module for module in model.modules() if isinstance(module, RoutedExpertsLayer)]
    keys = {key for layer in layers for name in layer.configs for key in (name, (name, layer.name))}
    return Decisions(dict.fromkeys(keys, decision))


def _named(model: nn.Module, tasks: str | Sequence[str]) -> Named:
    """The tasks that a caller names, checked."""
    layers = [module for module in model.modules() if isinstance(module, RoutedExpertsLayer)]
    if not isinstance(tasks, str):
        tasks = list(tasks) if isinstance(tasks, Iterable) else [tasks]
    names = [tasks] if isinstance(tasks, str) else tasks
    if not names:
        raise HfEsmError("route names no task. Give one for all samples, or one per sample.")
    active = [layer.configs[name] for layer in layers for name in layer.configs if name in layer.active_adapters]
    known = {task for config in active for task in config.tasks}
    check_known(names, [*sorted(known), "static"], "expert for")
    if not isinstance(tasks, str) and (reason := inseparable(model)):
        if len(set(tasks)) != 1:
            raise HfEsmError(f"{reason}: its samples cannot be told apart. Name one task for all of a batch.")
        tasks = tasks[0]
    return Named.of(tasks, {tuple(config.tasks) for layer in layers for config in layer.configs.values()})


@contextmanager
def recording(model: nn.Module) -> Iterator[list[tuple[str, str, Decision]]]:
    """Within this context, list the decisions of this thread: adapter, module that decided, decision.

    A recording around it lists them, too, afterwards.
    """
    state, records = _state_of(model), []
    before, state.local.records = state.local.records, records
    try:
        yield records
    finally:
        state.local.records = before
        if before is not None:
            before.extend(records)


def decide(model: nn.Module, inputs: Mapping[str, Any]) -> list[tuple[str, str, Decision]]:
    """The decisions on a batch, as `recording` lists them.

    A discriminant router ends the pass when it has decided. Of an encoder-decoder, the encoder alone runs; of two
    towers, those with inputs in the batch.
    """
    local = _state_of(model).local
    with recording(model) as records:
        for part, part_inputs in _deciding_parts(model, inputs):
            local.deciding = True
            try:
                with _uncompiled if _is_compiled(model) else nullcontext():  # compiled passes cannot be ended early
                    part(**part_inputs)
            except Decided:
                pass
            finally:
                local.deciding = False
                local.frames.clear()
    return records


def _is_compiled(model: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None for module in model.modules())  # by `Module.compile`


class Uncompiled:
    """Context in which nothing is compiled. Torch has one stance for the process, which all threads inside share."""

    def __init__(self) -> None:
        self.lock, self.inside, self.stance = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.stance.enter_context(torch.compiler.set_stance("force_eager"))
            self.inside += 1

    def __exit__(self, *error: Any) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.stance.close()


_uncompiled = Uncompiled()


def _deciding_parts(model: nn.Module, inputs: Mapping[str, Any]) -> list[tuple[Callable, dict[str, Any]]]:
    """The parts of a model that decide, each with its inputs in a batch."""
    whole = getattr(model, "get_base_model", lambda: model)()
    if whole.config.is_encoder_decoder:
        encoder = whole.get_encoder()
        return [(encoder, _arguments(encoder.forward, inputs))]
    if not towers(whole):
        return [(model, dict(inputs))]
    names = ("get_text_features", "get_image_features", "get_audio_features")
    parts = [getattr(whole, name) for name in names if hasattr(whole, name)]
    calls = [(part, _arguments(part, inputs)) for part in parts]
    return [
        (part, arguments) for part, arguments in calls if next(iter(inspect.signature(part).parameters)) in arguments
    ]


def _arguments(function: Callable, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that a function takes."""
    return {name: value for name, value in inputs.items() if name in inspect.signature(function).parameters}
