"""Estimates of the time and memory of a merge, from shapes."""

import functools
import math
import time
from collections.abc import Callable

import torch

from ..checkpoints import AdapterCheckpoint, Checkpoint


# Time of an update of low rank, as a share of that of a full one; measured at widths of 1,024 and 4,096.
_ADAPTER = 0.1
# Time per entry of an update, in additions of large tensors; measured for `mean` and `ties`.
_STEPS = 10


def merge_bytes(elements: int, tasks: int) -> int:
    """Return the bytes for merging one weight: that of each expert, its factors in float64, and the computation.

    Args:
        elements: number of elements of the weight.
        tasks: number of experts.
    """
    return 4 * elements * (2 * tasks + 6)


def estimate_seconds(
    base: Checkpoint, shared: list[str], experts: list[Checkpoint], decomposed: Callable[[str], bool]
) -> float:
    """Return the seconds that merging the shared weights takes on this machine: for every entry of every update, and
    for the eigenproblems of matrices that are decomposed.

    Args:
        decomposed: whether a weight is merged by a method that decomposes matrices, by its canonical name.
    """
    cubes, entries, tasks = 0.0, 0, len(experts)
    share = sum(_ADAPTER if isinstance(expert.stored, AdapterCheckpoint) else 1.0 for expert in experts) / tasks
    for name in shared:
        shape = base.shape(name)
        entries += tasks * math.prod(shape)
        if len(shape) >= 2 and (name in base.linear or len(shape) == 2) and decomposed(name):
            slices = math.prod(shape[:-2])
            cubes += slices * (
                tasks * min(shape[-2:]) ** 3 + sum(side**3 for side in shape[-2:] if side < 4 * min(shape[-2:]))
            )
    return share * (cubes * _seconds_per_cube() if cubes else 0.0) + entries * _seconds_per_entry()


@functools.cache
def _seconds_per_cube() -> float:
    """Return the seconds of an eigenproblem on this machine, divided by the cube of its size; timed once."""
    probe = torch.randn(768, 768, dtype=torch.float64)
    torch.linalg.eigh(probe + probe.T)
    start = time.perf_counter()
    torch.linalg.eigh(probe + probe.T)
    return (time.perf_counter() - start) / 768**3


@functools.cache
def _seconds_per_entry() -> float:
    """Return the seconds that an entry of an update takes on this machine by a method without decompositions; timed
    once.
    """
    probe = torch.randn(2**22)
    probe.add(probe)
    start = time.perf_counter()
    probe.add(probe)
    return _STEPS * (time.perf_counter() - start) / len(probe)
