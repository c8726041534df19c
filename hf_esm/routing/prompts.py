"""The route of a request; in `generate`, the prompt decides, also where the first pass reads something else."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from ..errors import HfEsmError
from ..tuners.routed import (
    ONE_PER_SAMPLE,
    Decisions,
    Named,
    RoutingState,
    decide,
    prompt_length,
    route,
    routing_state,
)
from .adapters import check_present


if TYPE_CHECKING:
    from .model import RoutedModel


@contextmanager
def request(
    routed: "RoutedModel", tasks: Optional[str | Sequence[str]], length: Optional[int | Sequence[int]]
) -> Iterator[None]:
    """Context of one call of a routed model: its route, if tasks are named, and the length of its prompts."""
    with ExitStack() as stack:
        routing_state(check_present(routed)).load()
        if tasks is not None:
            stack.enter_context(route(routed.model, tasks))
        if length is not None:
            stack.enter_context(prompt_length(routed.model, length))
        yield


def compile_with_routes(model: PreTrainedModel, state: RoutingState, *args: Any, **kwargs: Any) -> None:
    """Compile a task's model as `torch.nn.Module.compile` does; each call loads the route of its request before."""
    nn.Module.compile(model, *args, **kwargs)
    compiled = model._compiled_call_impl

    def run(*inputs: Any, **named: Any) -> Any:
        state.load()
        return compiled(*inputs, **named)

    model._compiled_call_impl = run


def prompt_route(
    routed: "RoutedModel", args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> AbstractContextManager[None]:
    """Context for a call of `generate`, in which the prompt decides the route.

    Where the first pass of `generate` does not read exactly the prompt, the router decides in a separate pass before.

    Args:
        routed: the model.
        args, kwargs: the arguments of `generate`.

    Raises:
        HfEsmError: if the route around the call names another number of tasks than there are prompts, or padding
            cannot be told from tokens.
    """
    base, forced = routed.model.get_base_model(), routing_state(routed.model).route.get()
    inputs = _prompt_inputs(base, args, kwargs)
    size = next((len(value) for value in inputs.values() if value.dim()), None)
    if isinstance(forced, Named) and not isinstance(forced.names, str) and size not in (None, len(forced.names)):
        raise HfEsmError(f"{len(forced.names)} tasks are named for {size} samples. {ONE_PER_SAMPLE}")
    decides = routed.model.has_active_enabled_adapter and routed.config.decides and forced is None
    # The first pass of an encoder always reads the prompt and nothing else.
    if not decides or not inputs or base.config.is_encoder_decoder:
        return nullcontext()
    generation_config = args[1] if len(args) > 1 else kwargs.get("generation_config")
    if not _first_pass_differs(base, generation_config, kwargs):
        return nullcontext()
    if size > 1 and "input_ids" in inputs and "attention_mask" not in inputs:
        raise HfEsmError("generate: pass attention_mask, too, so that the router can tell padding from tokens.")
    with torch.no_grad():
        records = decide(routed.model, inputs)
    once = routed.config.router == "discriminant"
    return route(routed.model, Decisions({a if once else (a, module): found for a, module, found in records}))


def _prompt_inputs(base: PreTrainedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The arguments of `generate` that are inputs of the model."""
    known = inspect.signature(base.forward).parameters
    arguments = {base.main_input_name: args[0] if args else kwargs.get("inputs"), **kwargs}
    return {name: value for name, value in arguments.items() if name in known and isinstance(value, Tensor)}


# Settings with which the first pass of `generate` reads less than the prompt, or more.
_OTHER_FIRST_PASS = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "prefill_chunk_size")


def _first_pass_differs(
    base: PreTrainedModel, generation_config: Optional[GenerationConfig], kwargs: Mapping[str, Any]
) -> bool:
    """Whether the first pass of `generate` reads something else than the prompt, or later passes read it again."""
    places = [kwargs, *(vars(place) for place in (generation_config, base.generation_config, base.config) if place)]

    def setting(name: str) -> Any:
        return next((place[name] for place in places if place.get(name) is not None), None)

    return setting("use_cache") is False or any(setting(name) is not None for name in _OTHER_FIRST_PASS)
