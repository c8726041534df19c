"""Merge methods: each a dataclass of settings with a function of one layer's stack.

To add one, write such a dataclass, a `MergeMethod` with `name` and `merge(stack) -> Merged`, and give it a line in
`METHODS`.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields, replace
from typing import Any

from ..errors import HfEsmError
from .averaging import Mean, TaskArithmetic
from .concrete import ConcreteAdaMerging, ConcreteTaskArithmetic
from .essential import EssentialMerge, RoutedMerge
from .isotropic import IsoC, IsoCTS
from .regression import RegMean
from .singular_vectors import TSVC, TSVM
from .sparse import DARE, TIES
from .stack import MergeMethod


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


def resolve_method(method: str | Mapping[str, Any] | MergeMethod) -> MergeMethod:
    """A method from its name, from `{"name": …, setting: value}`, or a copy of one, which may learn something."""
    if isinstance(method, str):
        method = {"name": method}
    if not isinstance(method, Mapping):
        if not isinstance(method, MergeMethod):
            raise HfEsmError(f"method must be a name or settings, not {method!r}; there are {', '.join(METHODS)}.")
        return replace(method)
    settings = dict(method)
    if "name" not in settings:
        raise HfEsmError(f"method: settings need a name, as in {{'name': 'esm', …}}; there are {', '.join(METHODS)}.")
    name = settings.pop("name")
    if not isinstance(name, str) or name not in METHODS:
        raise HfEsmError(f"There is no method {name!r}; there are {', '.join(METHODS)}.")
    made = METHODS[name]()
    known = {field.name for field in fields(made)}
    if unknown := settings.keys() - known:
        raise HfEsmError(f"Method {name!r} has no setting {sorted(unknown)}; it has {sorted(known) or 'none'}.")
    for setting, value in settings.items():
        default = getattr(made, setting)
        if isinstance(default, float) and isinstance(value, str):  # YAML takes 1e-3 for text
            with suppress(ValueError):
                settings[setting] = float(value)
    return replace(made, **settings)


def describe_method(method: MergeMethod) -> dict[str, Any]:
    """A method as a recipe writes it: its name and every setting, so that a later default changes nothing."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(method).items()}
    return {"name": method.name, **settings}
