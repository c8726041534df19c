"""One row of every file of a merge, for a dry run: what the merge would refuse of the data is refused of that row."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Optional

from ..data import read_first_row
from ..planning import MergeData, MergeOptions
from .expert_statistics import statistics_and_samples


def first_rows(data: MergeData, options: MergeOptions) -> Optional[MergeData]:
    """Return the data of a merge with one row of each task; None if some of it can be read only once.

    Raises:
        HfEsmError: if data cannot be read.
    """
    calibration: Any = data.calibration
    if isinstance(calibration, Mapping):
        calibration = {task: _first(entry, task, options) for task, entry in calibration.items()}
    validation: Any = data.validation and {
        task: [read_first_row(rows, f"validation of '{task}'", options)] if not isinstance(rows, Iterator) else None
        for task, rows in data.validation.items()
    }
    if None in [*(calibration or {}).values(), *(validation or {}).values()]:
        return None
    return replace(data, calibration=calibration, validation=validation)


def _first(calibration: Any, task: str, options: MergeOptions) -> Any:
    """Return the statistics of a task as they are, and one row of its samples; None for an iterator."""
    statistics, rows = statistics_and_samples(calibration)
    if rows is None or isinstance(rows, Iterator):
        return calibration if rows is None else None
    row = read_first_row(rows, f"calibration of '{task}'", options)
    return [row] if statistics is None else {"statistics": statistics, "samples": [row]}
