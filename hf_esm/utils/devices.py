"""Where, and how precisely, to compute."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import torch
from accelerate import Accelerator
from accelerate.utils.modeling import get_max_memory

from ..errors import HfEsmError
from .sizes import readable


# The smallest tolerance that the rounding of factors to bfloat16 disappears in.
_COARSE = 1e-3


def algebra_device(accelerator: Accelerator) -> torch.device:
    """Where decompositions are computed, in float64: the accelerator's device, unless it has none."""
    return torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device


def roomy(device: Optional[torch.device], needed: int) -> Optional[torch.device]:
    """The device, if so many bytes are free on it; else the CPU."""
    if device is None or device.type == "cpu" or needed <= get_max_memory().get(device.index or 0, math.inf):
        return device
    return torch.device("cpu")


@contextmanager
def fast_products(tolerance: float) -> Iterator[None]:
    """Let float32 products in this process be computed in TF32 or bfloat16 where the hardware is faster at it, if the
    tolerance covers that.

    Who has set precisions for single backends, which torch does not read together with the common one, keeps them.
    """
    try:
        found = torch.get_float32_matmul_precision() if tolerance >= _COARSE else None
    except RuntimeError:
        found = None
    if found is None:
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(found)


def reserve(path: Path, nbytes: int) -> None:
    """Have the first bytes of a sparse file stand on the disk, where the system can.

    Raises:
        HfEsmError: if the disk has no room for them.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            raise HfEsmError(f"{path}: {readable(nbytes)} cannot be kept there: {error.strerror}.") from None
