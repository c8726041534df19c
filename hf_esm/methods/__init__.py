"""Merge methods: each a dataclass of settings with a function of one layer's stack.

To add one, write such a dataclass (`name`, `default_alpha`, `tunable`, `needs_statistics`, `layer_exponent`, and
`merge(stack) -> Merged`) and give it a line in `METHODS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any, Protocol

from ..errors import HfEsmError
from .averaging import Mean, TaskArithmetic
from .concrete import ConcreteAdaMerging, ConcreteTaskArithmetic
from .essential import EssentialMerge, RoutedMerge
from .isotropic import IsoC, IsoCTS
from .regression import RegMean
from .singular_vectors import TSVC, TSVM
from .sparse import DARE, TIES
from .stack import Merged, Stack


class MergeMethod(Protocol):
    """What `merge_models` asks of a method.

    Attributes:
        name: its name in messages and recipes.
        default_alpha: the scale of the merged update where none is given.
        tunable: whether α means anything to it.
        needs_statistics: whether linear maps are merged with activation statistics.
        needs_samples: optional; whether something is learned on the calibration samples themselves before merging.
        layer_exponent: exponent of the scale between layers of one type, `(‖Δ_M‖ / mean ‖Δ_M‖)^layer_exponent`; 0 for
            none.
    """

    name: str
    default_alpha: float
    tunable: bool
    needs_statistics: bool
    layer_exponent: float

    def merge(self, stack: Stack) -> Merged:
        """Merge one weight of all experts."""


METHODS: dict[str, Callable[[], MergeMethod]] = {
    "mean": Mean,
    "task-arithmetic": TaskArithmetic,
    "ties": TIES,
    "dare": DARE,
    "regmean": RegMean,
    "concrete-task-arithmetic": ConcreteTaskArithmetic,
    "concrete-adamerging": ConcreteAdaMerging,
    "tsv-m": TSVM,
    "tsv-c": TSVC,
    "iso-c": IsoC,
    "iso-cts": IsoCTS,
    "esm": EssentialMerge,
    "esm-roberta": EssentialMerge.roberta,
    "esm-vit": EssentialMerge.vit,
    "esm++": RoutedMerge,
}

# Those whose outcome has an expert per task beside the static model: they also have `rank`, `router`, `expert_rank`.
ROUTED = (RoutedMerge, TSVC)


def resolve_method(method: str | Mapping[str, Any] | MergeMethod) -> MergeMethod:
    """A method from its name, from `{"name": …, setting: value}`, or as it is."""
    if isinstance(method, str):
        method = {"name": method}
    if not isinstance(method, Mapping):
        if not callable(getattr(method, "merge", None)):
            raise HfEsmError(f"method must be a name or settings, not {method!r}; there are {', '.join(METHODS)}.")
        return method
    settings = dict(method)
    name = settings.pop("name", None)
    if not isinstance(name, str) or name not in METHODS:
        raise HfEsmError(f"There is no method {name!r}; there are {', '.join(METHODS)}.")
    made = METHODS[name]()
    known = {field.name for field in fields(made)}
    if unknown := settings.keys() - known:
        raise HfEsmError(f"Method {name!r} has no setting {sorted(unknown)}; it has {sorted(known) or 'none'}.")
    for setting, value in settings.items():
        default = getattr(made, setting)
        kinds = {float: (float, int), tuple: (tuple, list)}.get(type(default), type(default))
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise HfEsmError(f"{name}: {setting} must be like {default!r}, not {value!r}.")
    return replace(made, **settings)


def describe_method(method: MergeMethod) -> dict[str, Any]:
    """A method as a recipe writes it: its name and every setting, so that a later default changes nothing."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(method).items()}
    return {"name": method.name, **settings}


__all__ = [
    "DARE",
    "METHODS",
    "ROUTED",
    "TIES",
    "TSVC",
    "TSVM",
    "ConcreteAdaMerging",
    "ConcreteTaskArithmetic",
    "EssentialMerge",
    "IsoC",
    "IsoCTS",
    "Mean",
    "MergeMethod",
    "Merged",
    "RegMean",
    "RoutedMerge",
    "Stack",
    "TaskArithmetic",
    "describe_method",
    "resolve_method",
]
