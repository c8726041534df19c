"""Gradient checkpointing: the backward pass computes blocks again with the routes of the forward pass."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Optional

from torch import nn

from ...errors import HfEsmError


# Is called in the forward pass; its result opens a context in which layers see the routes of that moment.
Hold = Callable[[], Callable[[], AbstractContextManager]]


def keep_routes(model: nn.Module, hold: Hold) -> None:
    """Keep the routes of the forward pass for every checkpointed block of a model that is about to run.

    Raises:
        HfEsmError: if checkpointing is reentrant: it first computes blocks without a graph, and then again as separate
            forward passes.
    """
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is None or not getattr(module, "gradient_checkpointing", False):
            continue
        settings = getattr(function, "keywords", {})
        if settings.get("use_reentrant") is not False:
            raise HfEsmError(
                "Reentrant gradient checkpointing loses the routes of routed experts. Call "
                "activation_checkpointing_enable({'use_reentrant': False})."
            )
        context_fn = settings.get("context_fn")
        if isinstance(context_fn, _Contexts):
            if context_fn.hold == hold:
                continue
            context_fn = context_fn.inner  # the routed adapter of `context_fn` has been unloaded
        module._gradient_checkpointing_func = functools.partial(function, context_fn=_Contexts(hold, context_fn))


class _Contexts:
    """A `context_fn` of `torch.utils.checkpoint` that restores routes around the `inner` one, if there is one."""

    def __init__(self, hold: Hold, inner: Optional[Callable]):
        self.hold, self.inner = hold, inner

    def __call__(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        forward, recompute = self.inner() if self.inner else (nullcontext(), nullcontext())
        return forward, _Recompute(self.hold(), recompute)


class _Recompute:
    """Context in which a block is computed again, any number of times."""

    def __init__(self, routes: Callable[[], AbstractContextManager], inner: AbstractContextManager):
        self.routes, self.inner = routes, inner

    def __enter__(self) -> None:
        self.stack = ExitStack()
        self.stack.enter_context(self.routes())
        self.stack.enter_context(self.inner)

    def __exit__(self, *error: Any) -> Optional[bool]:
        return self.stack.__exit__(*error)
