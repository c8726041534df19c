"""An interrupt, at whatever moment, leaves nothing on the user's live model."""

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from hf_esm import calibrate
from support.helpers import text_samples
from support.tiny import LLAMA


TABLES = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def interrupted_at(monkeypatch, name, moment):
    """The call of a method of modules with this number is made, and then interrupted."""
    method, count = getattr(nn.Module, name), [0]

    def call(*args, **kwargs):
        result = method(*args, **kwargs)
        count[0] += 1
        if count[0] == moment:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(nn.Module, name, call)


@pytest.mark.parametrize(
    "name, moment",
    [("register_forward_pre_hook", n) for n in (1, 2, 9, 15)]
    + [("register_forward_hook", 1)]
    + [("_call_impl", n) for n in (2, 7, 20)]
    + [("train", 3)],
)
def test_nothing_stays_on_a_live_model(name, moment, monkeypatch):
    model = LLAMA.build().train()
    model.model.layers[0].eval()
    modes = {module: module.training for module in model.modules()}
    with monkeypatch.context() as patch:
        interrupted_at(patch, name, moment)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, text_samples(0), progress=False)
    assert not any(getattr(module, table) for module in model.modules() for table in TABLES)
    assert {module: module.training for module in model.modules()} == modes
    assert not _get_current_function_mode_stack() and torch.is_grad_enabled()
