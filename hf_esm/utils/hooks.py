"""Forward hooks on a user's live model that are gone afterwards, whatever happens meanwhile."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn


_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


class Hook(NamedTuple):
    """A hook to register on a module: before its forward pass, or after it, also if it fails."""

    module: nn.Module
    function: Callable
    before: bool


@contextmanager
def hooked(hooks: Sequence[Hook]) -> Iterator[None]:
    """Register hooks for the block. None stays, even if an interrupt comes while they are registered."""
    try:
        for module, function, before in hooks:
            if before:
                module.register_forward_pre_hook(function, with_kwargs=True)
            else:
                module.register_forward_hook(function, always_call=True)
        yield
    finally:
        for module, function, _ in hooks:
            remove_hooks(module, lambda hook, function=function: hook is function)


def remove_hooks(module: nn.Module, chosen: Callable[[Any], bool]) -> None:
    """Remove the forward hooks of a module that a function chooses."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if chosen(hook)]:
            for table in _TABLES:
                getattr(module, table).pop(key, None)
