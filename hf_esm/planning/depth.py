"""LiNeS (arXiv 2410.17146): a scale of the merged update that grows linearly with depth."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Optional

from ..errors import HfEsmError
from ..methods import MergeMethod
from ..utils import check_fields, check_known, finite_number


@dataclass(frozen=True)
class LinesSettings:
    """Settings of LiNeS: how the scale of merged updates grows from the first block of a model to the last.

    Without end points, as published: the scale of block `l` of `L` is `a + α l / (L − 1)`, where `a` is
    `‖Σ Δ_t‖₁ / (T ‖Δ_M‖₁)`, with the norms of all updates that α scales: for task arithmetic, `1 / T`. With end
    points, the scale is `α (first + (last − first) l / (L − 1))`.

    Attributes:
        first: factor of α in the first block.
        last: factor of α in the last block.

    Raises:
        HfEsmError: if a value is no number, or one is missing.
    """

    first: Optional[float] = field(default=None, metadata={"help": "factor of alpha in the first block"})
    last: Optional[float] = field(default=None, metadata={"help": "factor of alpha in the last block"})

    def __post_init__(self) -> None:
        check_fields(self, "`lines`")
        if (self.first is None) != (self.last is None):
            missing = "last" if self.last is None else "first"
            raise HfEsmError(f"`lines`: '{missing}' is missing. Give both end points, or true for the published ones.")

    def describe(self) -> bool | dict[str, float]:
        """Return the settings as recipes hold them."""
        return True if self.first is None or self.last is None else {"first": self.first, "last": self.last}

    def __str__(self) -> str:
        ends = "" if self.first is None else f" from {self.first:g} to {self.last:g} times alpha"
        return f"scaled by depth (LiNeS){ends}"


def resolve_lines(lines: bool | Mapping[str, Any] | LinesSettings | None) -> Optional[LinesSettings]:
    """Return the settings that `lines` says: True for the published scale, a mapping of end points, or None.

    Raises:
        HfEsmError: on a setting that does not exist, or a value that is no number.
    """
    if isinstance(lines, LinesSettings):
        return lines
    if lines is None or isinstance(lines, bool):
        return LinesSettings() if lines else None
    if not isinstance(lines, Mapping):
        raise HfEsmError(f"`lines` must be true, false or the end points {{first: …, last: …}}, not {lines!r}.")
    check_known(lines, [setting.name for setting in fields(LinesSettings)], "setting", "`lines`")
    return LinesSettings(**{name: finite_number(value, f"`lines`: {name}") for name, value in lines.items()})


def check_lines(lines: Optional[LinesSettings], method: MergeMethod) -> None:
    """Raise an error if a method has no α that could grow with depth."""
    if lines is not None and not method.tunable:
        raise HfEsmError(
            f"`lines`: {method.name} has no alpha that could grow with depth. Use 'task-arithmetic' or another "
            "method, or leave `lines` out."
        )
