"""Weights that Accelerate offloads: it puts them in place when their module is called, and takes them away again."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn


def _hooks(module: nn.Module) -> list[AlignDevicesHook]:
    hook = vars(module).get("_hf_hook")
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [found for found in hooks if isinstance(found, AlignDevicesHook)]


def is_offloaded(module: nn.Module) -> bool:
    """Whether Accelerate offloads the module's tensors, those of its submodules not counted."""
    return any(hook.offload for hook in _hooks(module))


@contextmanager
def in_place(*modules: nn.Module) -> Iterator[None]:
    """Within this context, the tensors of modules can be read without calling the modules."""
    offloaded = [(hook, module) for module in modules for hook in _hooks(module) if hook.offload]
    try:
        for hook, module in offloaded:
            hook.pre_forward(module)
        yield
    finally:
        for hook, module in offloaded:
            hook.post_forward(module, None)


def device_of(model: nn.Module) -> torch.device:
    """Device on which a model computes first, also if its weights are offloaded. Meta for a model without weights."""
    for module in model.modules():
        for tensor in module.parameters(recurse=False):
            if not tensor.is_meta:
                return tensor.device
            if devices := [hook.execution_device for hook in _hooks(module) if hook.execution_device is not None]:
                return torch.device(devices[0])
    return torch.device("meta")
