"""Where to compute, and how precisely; and room on the disk."""

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


# The smallest tolerance that is larger than the error of factors rounded to bfloat16.
_COARSE = 1e-3


def algebra_device(accelerator: Accelerator) -> torch.device:
    """Device of decompositions in float64: that of the accelerator, unless it has no float64."""
    return torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device


def roomy(device: Optional[torch.device], needed: int) -> Optional[torch.device]:
    """The device, if so many bytes are free on it, else the CPU; None stays None."""
    if device is None or device.type == "cpu" or needed <= get_max_memory().get(device.index or 0, math.inf):
        return device
    return torch.device("cpu")


@contextmanager
def fast_products(tolerance: float) -> Iterator[None]:
    """Compute float32 products of this process in TF32 or bfloat16 inside the block, if the tolerance is large enough
    for the rounding.

    Precisions that were set for single backends stay: torch cannot read the common precision then.
    """
    try:
        before = torch.get_float32_matmul_precision() if tolerance >= _COARSE else None
    except RuntimeError:
        before = None
    if before is None:
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def reserve(path: Path, nbytes: int) -> None:
    """Allocate the first bytes of a sparse file on the disk, if the system can.

    Raises:
        HfEsmError: if the disk has no room for them.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            raise HfEsmError(f"{path}: {readable(nbytes)} cannot be kept there: {error.strerror}.") from None
