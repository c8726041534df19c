"""Sizes as people write them. (The reader of Accelerate takes `4gb` for bits.)"""

import math
import re
from contextlib import suppress
from numbers import Real
from typing import Any

from ..errors import HfEsmError


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def bytes_of(size: Any, what: str) -> int:
    """Number of bytes of a size such as `"16GB"`, `"512 MiB"`, `"1e9"` or 1e9.

    Args:
        size: a text or number.
        what: name of the argument, for errors.

    Raises:
        HfEsmError: if `size` is not a size of at least one byte.
    """
    count = math.nan
    if isinstance(size, Real) and not isinstance(size, bool):
        count = float(size)
    elif isinstance(size, str):
        parts = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?I?)B?\s*", size.upper().replace("E", "e"))
        if parts and parts[2] in _UNITS:
            with suppress(ValueError):
                count = float(parts[1]) * _UNITS[parts[2]]
    if not 1 <= count < math.inf:
        raise HfEsmError(f"`{what}` must be a size such as '16GB', '512MiB' or a number of bytes, not {size!r}.")
    return int(count)


def readable(count: float) -> str:
    """Text of a number of bytes, in the largest unit that gives at least 1, rounded up to hundredths."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{math.ceil(100 * count / size) / 100:g} {unit}"
    return f"{math.ceil(count)} B"


def readable_duration(seconds: float) -> str:
    """Write a duration in seconds, minutes or hours."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
