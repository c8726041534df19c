"""Values as plain data, which files of JSON hold."""

from math import isfinite
from typing import Any


def without_nan(value: Any) -> Any:
    """Return plain data with None for NaN and infinity, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not isfinite(value) else value
