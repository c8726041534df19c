"""Work that is shared over processes."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from ..errors import HfEsmError


T = TypeVar("T")


class Alone:
    """What one process of several works under while it does a whole task by itself: an `Accelerator` on its device,
    with one process.
    """

    num_processes = 1
    process_index = local_process_index = 0
    is_main_process = is_local_main_process = True

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator

    @property
    def device(self) -> Any:
        return self._accelerator.device

    def wait_for_everyone(self) -> None:
        """Return at once: there is no one else."""

    @contextmanager
    def split_between_processes(self, inputs: T, apply_padding: bool = False) -> Iterator[T]:
        """All of the inputs."""
        yield inputs


# While one process chooses α, writes or downloads, the others wait; the default of PyTorch is ten minutes on GPUs.
_PATIENCE = timedelta(days=7)


def default_accelerator() -> Accelerator:
    """The Accelerator that is used if the caller passes none.

    Raises:
        HfEsmError: if a launcher started several processes, but Accelerate sees one.
    """
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])
    started = os.environ.get("WORLD_SIZE", "1")
    if started.isdecimal() and int(started) > accelerator.num_processes:
        raise HfEsmError(
            f"{started} processes were started, but Accelerate takes each for the only one. On CPUs, start them by "
            "ACCELERATE_USE_CPU=1 torchrun --nproc-per-node N -m hf_esm.cli …"
        )
    return accelerator


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Barrier that also propagates errors: if one process fails inside the block, all raise.

    No collective calls inside.

    Raises:
        HfEsmError: on the processes that did not fail, with the message of the first one that did.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    message = f"{error}" if isinstance(error, HfEsmError) else f"{type(error).__name__}: {error}"
    messages = gather(accelerator, None if error is None else message)
    if error is not None:
        raise error
    for rank, failure in enumerate(messages):
        if failure is not None:
            raise HfEsmError(f"Process {rank} of {len(messages)} stopped: {failure}")


def main_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """The result of `work`, which the main process does first, so that the others find its downloads and caches."""
    results = []
    for main in (True, False):
        with together(accelerator):
            if accelerator.is_main_process is main:
                results.append(work())
    return results[0]


def gather(accelerator: Accelerator, value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]
