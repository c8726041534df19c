"""Routed experts on the linear maps of a whole model."""

import hashlib
import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...architecture import tower_of, towers
from ...errors import HfEsmError
from .config import RoutedExpertsConfig
from .layer import NOT_MERGEABLE, RoutedExpertsLayer, RoutedExpertsLinear
from .routing import Decided, Decision, Named, Route, RoutingState, check_separable, inseparable, install, uninstall


logger = logging.getLogger(__name__)


class RoutedExpertsModel(BaseTuner):
    """A merged model with one low-rank expert per task and linear map beside it (ESM++, arXiv 2606.19164).

    Each sample is routed by itself: what it gets depends neither on its batchmates nor on padding. `merge_models` with
    `method="esm++"` makes such an adapter.
    """

    prefix: str = "routed_experts_"
    tuner_layer_cls = RoutedExpertsLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        expected = config.base_fingerprint
        if config.decides:
            check_separable(model)
        if expected is not None:
            present = dict(model.named_modules())
            missing = [name for name in config.modules if name not in present]
            found = None if missing else fingerprint(model, config.modules)
            if not missing and found is None:
                logger.warning(
                    "Adapter '%s': the weights below cannot be compared with those that its experts were made over.",
                    adapter_name,
                )
            if missing or (found and not found.items() & expected.items()):
                why = f"it has no '{missing[0]}'" if missing else "their weights differ"
                raise HfEsmError(
                    f"Adapter '{adapter_name}' holds experts over another model than this {type(model).__name__}: "
                    f"{why}. Load it over the merged model that it was made with."
                )
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
        if not isinstance(target, RoutedExpertsLayer):
            layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            if not isinstance(layer, (nn.Linear, Conv1D)):
                raise HfEsmError(
                    f"'{current_key}' is a {type(layer).__name__}: experts can be routed on nn.Linear and Conv1D "
                    "alone. Leave it out of target_modules."
                )
            if ".experts." in f".{current_key}":  # of a mixture
                raise HfEsmError(
                    f"'{current_key}' reads some of each sample's tokens, so that samples cannot be told apart. Leave "
                    "it out of target_modules."
                )
            state = routing_state(self.model) or self._state
            # DeBERTa's shared projections read its relative positions, too, which are of no sample.
            reads_once = bool(getattr(parent, "share_att_key", False))
            tower = tower_of(current_key, towers(self.model))
            target = RoutedExpertsLinear(target, state, current_key, tower, adapter_name, reads_once)
            if adapter_name not in self.active_adapters:
                target.requires_grad_(False)
            self._replace_module(parent, target_name, target, None)
        target.update_layer(adapter_name, config, rank)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: Any) -> None:
        # PEFT's own also sets `weight` on what is put back when an adapter is unloaded, which a head of several
        # layers does not have. Devices are the layer's concern.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise HfEsmError(NOT_MERGEABLE)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise HfEsmError("Experts are chosen by the router or by `route(model, tasks)`, not by adapter_names.")
        yield

    def unload(self) -> nn.Module:
        model = super().unload()
        uninstall(model)
        return model


def routing_state(model: nn.Module) -> Optional[RoutingState]:
    """What the routed layers of a model share; None if it has none."""
    return next((module.state for module in model.modules() if isinstance(module, RoutedExpertsLayer)), None)


@contextmanager
def route(model: nn.Module, tasks: str | Sequence[str] | Any) -> Iterator[None]:
    """Within it, this thread's samples get the experts that are named.

    Args:
        model: a model with a routed adapter.
        tasks: a task for all samples, one per sample, a `Route`, what a discriminant router decided (a `Decision`), or
            `"static"` for no expert. A task for all samples is added to what is made of no sample, too, such as
            DeBERTa's relative positions.

    Raises:
        HfEsmError: if there is no such task, or several over a model whose samples cannot be told apart; in the
            forward pass, if there is not one per sample.
    """
    state = _state_of(model)
    layers = [module for module in model.modules() if isinstance(module, RoutedExpertsLayer)]
    if not isinstance(tasks, (Route, Decision)):
        known = {
            task
            for layer in layers
            for adapter, config in layer.configs.items()
            if adapter in layer.active_adapters
            for task in config.tasks
        }
        if not isinstance(tasks, str):
            tasks = list(tasks) if isinstance(tasks, Iterable) else [tasks]
        named = [tasks] if isinstance(tasks, str) else tasks
        if not named:
            raise HfEsmError("route names no task. Give one for all samples, or one each.")
        if unknown := [task for task in named if task not in known and task != "static"]:
            there = ", ".join(sorted(known))
            raise HfEsmError(f"There is no expert for {unknown[0]!r}; there are {there}, or 'static'.")
        if why := None if isinstance(tasks, str) else inseparable(model):
            if len(set(tasks)) != 1:
                raise HfEsmError(f"{why}: its samples cannot be told apart. Name one task for all of a batch.")
            tasks = tasks[0]
        tasks = Named.of(tasks, {tuple(config.tasks) for layer in layers for config in layer.configs.values()})
    before, state.local.forced = state.local.forced, tasks
    try:
        yield
    finally:
        state.local.forced = before


@contextmanager
def recording(model: nn.Module) -> Iterator[list[tuple[str, str, Decision]]]:
    """Within it, this thread's decisions are listed: adapter, module that decided, and the decision."""
    state = _state_of(model)
    before, state.local.records = state.local.records, []
    try:
        yield state.local.records
    finally:
        state.local.records = before


def _state_of(model: nn.Module) -> RoutingState:
    state = routing_state(model)
    if state is None:
        raise HfEsmError(f"This {type(model).__name__} has no routed experts. Load its adapter first.")
    return state


def fingerprint(model: nn.Module, modules: Iterable[str]) -> Optional[dict[str, str]]:
    """Hashes of some weights of each module, rounded to bfloat16 and to float16: in whatever dtype a model is loaded,
    one of them is that of the stored weights. None where weights cannot be read (offloaded, quantised).

    It tells the model that experts were made over from its neighbours: the base, another merge.
    """
    found = {dtype: hashlib.sha256() for dtype in (torch.bfloat16, torch.float16)}
    for name in sorted(modules):
        module = model.get_submodule(name)
        for weight in (getattr(module, "weight", None), getattr(module, "bias", None)):
            if weight is None:
                continue
            if weight.is_meta or not weight.is_floating_point() or weight.itemsize == 1:
                return None
            rows = weight.detach().flatten()
            sample = rows[:: max(len(rows) // 256, 1)].cpu()
            for dtype, digest in found.items():
                digest.update(f"{name} {tuple(weight.shape)}".encode())
                digest.update(sample.to(dtype).view(torch.int16).numpy().tobytes())
    return {str(dtype).removeprefix("torch."): digest.hexdigest() for dtype, digest in found.items()}


def decide(model: nn.Module, inputs: dict[str, Any]) -> list[tuple[str, str, Decision]]:
    """The decisions on a batch; with a discriminant router, no block after the deciding one is run, of an
    encoder-decoder the encoder alone, and of two towers those that have something to read.
    """
    local = _state_of(model).local
    with recording(model) as records:
        for reader, read in _readers(model, inputs):
            local.deciding = True
            try:
                with _uncompiled if _is_compiled(model) else nullcontext():  # a pass that is broken off cannot be
                    reader(**read)
            except Decided:
                pass
            finally:
                local.deciding = False
                local.frames.clear()
    return records


def _is_compiled(model: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None for module in model.modules())  # by `Module.compile`


class _Uncompiled:
    """Within it, nothing is compiled: one stance, which is all that torch has, for however many threads are in it."""

    def __init__(self) -> None:
        self.lock, self.inside, self.stance = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.stance.enter_context(torch.compiler.set_stance("force_eager"))
            self.inside += 1

    def __exit__(self, *raised: Any) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.stance.close()


_uncompiled = _Uncompiled()


def _readers(model: nn.Module, inputs: dict[str, Any]) -> list[tuple[Callable, dict[str, Any]]]:
    """The parts of a model that decide, and what of a batch each reads."""
    whole = getattr(model, "get_base_model", lambda: model)()
    if whole.config.is_encoder_decoder:
        encoder = whole.get_encoder()
        return [(encoder, _known(encoder.forward, inputs))]
    if not towers(whole):
        return [(model, inputs)]
    names = ("get_text_features", "get_image_features", "get_audio_features")
    parts = [getattr(whole, name) for name in names if hasattr(whole, name)]
    read = [(part, _known(part, inputs)) for part in parts]
    return [(part, own) for part, own in read if next(iter(inspect.signature(part).parameters)) in own]


def _known(function: Callable, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs that a function takes."""
    return {name: value for name, value in inputs.items() if name in inspect.signature(function).parameters}
