"""`--device`: where the commands that run a model run it."""

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

from ..errors import HfEsmError


_VARIABLE = "ACCELERATE_TORCH_DEVICE"


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: a GPU, if there is one)")


@contextmanager
def on_device(name: Optional[str]) -> Iterator[None]:
    """Let Accelerate place all models on a device inside the block; None leaves the choice to Accelerate.

    Raises:
        HfEsmError: if there is no such device, or a launcher has given each process its own.
    """
    if name is None:
        yield
        return
    _check(name)
    before = os.environ.get(_VARIABLE)
    try:
        _start_again(name)
        yield
    finally:
        _start_again(before)


def _start_again(name: Optional[str]) -> None:
    """Let the next state of Accelerate be made for a device."""
    from accelerate.state import AcceleratorState

    os.environ.pop(_VARIABLE, None)
    if name is not None:
        os.environ[_VARIABLE] = name
    AcceleratorState._reset_state(reset_partial_state=True)


def _check(name: str) -> None:
    import torch

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise HfEsmError("`device`: the launcher gives every process its device. Leave it out.")
    if not re.fullmatch(r"(cpu|cuda|mps|xpu|npu)(:\d+)?", name):
        raise HfEsmError(f"`device` must be cpu, cuda, cuda:1 or mps, not {name!r}.")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise HfEsmError(f"`device` {name}: torch finds no such device here. Pass `device='cpu'`.") from None
