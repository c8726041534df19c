"""Gradient checkpointing: what the backward pass computes again is routed as it was the first time."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Optional

from torch import nn

from ...errors import HfEsmError


# Called in the forward pass; what it returns gives a context in which layers find the routes of that moment.
Hold = Callable[[], Callable[[], AbstractContextManager]]


def keep_routes(model: nn.Module, hold: Hold) -> None:
    """Have every checkpointed block of a model that is about to run find its routes when it is computed again.

    Raises:
        HfEsmError: if blocks are checkpointed in the reentrant way, which computes them the first time without a
            graph, and again as a forward pass of its own.
    """
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is None or not getattr(module, "gradient_checkpointing", False):
            continue
        settings = getattr(function, "keywords", {})
        if settings.get("use_reentrant") is not False:
            raise HfEsmError(
                "Routed experts cannot be trained under reentrant gradient checkpointing: the routes would be lost. "
                "Call gradient_checkpointing_enable({'use_reentrant': False})."
            )
        given = settings.get("context_fn")
        if isinstance(given, _Contexts):
            if given.hold == hold:
                continue
            given = given.others  # the routed adapter that it was for is no longer there
        module._gradient_checkpointing_func = functools.partial(function, context_fn=_Contexts(hold, given))


class _Contexts:
    """A `context_fn` of `torch.utils.checkpoint`, around another one if there is one."""

    def __init__(self, hold: Hold, others: Optional[Callable]):
        self.hold, self.others = hold, others

    def __call__(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        first, again = self.others() if self.others else (nullcontext(), nullcontext())
        return first, _Again(self.hold(), again)


class _Again:
    """Around computing a block again, as often as it takes."""

    def __init__(self, resumed: Callable[[], AbstractContextManager], other: AbstractContextManager):
        self.resumed, self.other = resumed, other

    def __enter__(self) -> None:
        self.stack = ExitStack()
        self.stack.enter_context(self.resumed())
        self.stack.enter_context(self.other)

    def __exit__(self, *error: Any) -> Optional[bool]:
        return self.stack.__exit__(*error)
