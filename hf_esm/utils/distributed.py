"""Work that several processes share."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from ..errors import HfEsmError


T = TypeVar("T")


# While one process chooses α, writes or downloads, the others wait; PyTorch would give them ten minutes on GPUs.
_PATIENCE = timedelta(days=7)


def default_accelerator() -> Accelerator:
    """What stands for all processes where the caller gives no Accelerator."""
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])
    started = os.environ.get("WORLD_SIZE", "1")
    if started.isdecimal() and int(started) > accelerator.num_processes:
        raise HfEsmError(
            f"{started} processes were started, but Accelerate takes each for the only one. On CPUs, start them with "
            "ACCELERATE_USE_CPU=1 torchrun --nproc-per-node N -m hf_esm.cli …"
        )
    return accelerator


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Around a piece of work in which no process waits for another: all leave it together, and an error in one is an
    error in all of them, which would else wait for it for ever.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    said = gather(accelerator, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, message in enumerate(said):
        if message is not None:
            raise HfEsmError(f"Process {rank} of {len(said)} stopped: {message}")


def main_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` gives; the main process does it first, so that the others find what it downloaded or cached."""
    found = []
    for main in (True, False):
        with together(accelerator):
            if accelerator.is_main_process is main:
                found.append(work())
    return found[0]


def gather(accelerator: Accelerator, mine: Any) -> list[Any]:
    """What every process gives, in their order."""
    return gather_object([mine]) if accelerator.num_processes > 1 else [mine]
