"""Overrides: other weights of the tasks, another method or another α for some of a model's weights."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Optional

from ..architecture import KINDS, block_depths, depth_of, weight_kinds
from ..checkpoints import Checkpoint
from ..errors import HfEsmError
from ..methods import MergeMethod, describe_method, resolve_method
from ..utils import check_known, closest_name, finite_number


Gradient = float | tuple[float, ...]  # one number, or numbers that are interpolated over the blocks


@dataclass(frozen=True)
class Override:
    """What is set for the weights that `match` and `kind` select. What is None is not set.

    Attributes:
        match: regular expression, searched in the weight's name; None for all names.
        kind: one of `KINDS`; None for all kinds.
        weights: by task, the weight of its update; tasks that are not named keep theirs. Several numbers are
            interpolated linearly from the first block to the last.
        method: method that merges these weights, embeddings included.
        alpha: scale of their merged updates, whatever α is elsewhere; several numbers as in `weights`.
    """

    match: Optional[str] = None
    kind: Optional[str] = None
    weights: Optional[Mapping[str, Gradient]] = None
    method: Optional[MergeMethod] = None
    alpha: Optional[Gradient] = None

    def selects(self, name: str, kind: str) -> bool:
        """Return whether this is for a weight of a name and a kind."""
        return (self.match is None or bool(re.search(self.match, name))) and self.kind in (None, kind)

    def at(self, place: float) -> "Override":
        """Return the override at a place between the first block (0) and the last (1): numbers alone."""
        weights = None if self.weights is None else {t: interpolated(w, place) for t, w in self.weights.items()}
        return replace(self, weights=weights, alpha=None if self.alpha is None else interpolated(self.alpha, place))

    def describe(self) -> dict[str, Any]:
        """Return the override as recipes hold it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.method is not None:
            values["method"] = describe_method(self.method)
        if self.weights is not None:
            values["weights"] = {task: _plain(weight) for task, weight in self.weights.items()}
        return {name: _plain(value) for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        numbers = {"alpha": self.alpha} if self.alpha is not None else {}
        numbers |= {f"weight of {task}": weight for task, weight in (self.weights or {}).items()}
        parts = [f"{name} {_readable(value)}" for name, value in numbers.items()]
        selected = [f"names with {self.match!r}"] if self.match is not None else []
        selected += [self.kind] if self.kind is not None else []
        return f"{' of kind '.join(selected)}: " + ", ".join([*([self.method.name] if self.method else []), *parts])


@dataclass(frozen=True)
class Rule:
    """How one weight is merged.

    Attributes:
        method: method that merges it.
        weights: per expert, the weight of its update.
        alpha: scale of the merged update that an override sets; None if α is that of the merge or of the method.
        overridden: whether an override names the method.
    """

    method: MergeMethod
    weights: tuple[float, ...]
    alpha: Optional[float] = None
    overridden: bool = False


def resolve_overrides(overrides: Optional[Iterable[Mapping[str, Any]]], tasks: Iterable[str]) -> list[Override]:
    """Return the overrides of a merge, checked.

    Args:
        overrides: mappings with `match`, `kind` or both, and one or more of `weights`, `method` and `alpha`.
        tasks: names of the experts.

    Raises:
        HfEsmError: on an unknown key, kind, method or task, a value of another kind, or an entry that selects or sets
            nothing.
    """
    entries = [] if overrides is None else overrides
    if isinstance(entries, (str, Mapping)) or not isinstance(entries, Iterable):
        raise HfEsmError(
            f"`overrides` must be a list of mappings, as [{{'match': 'mlp', 'alpha': 0.5}}], not {entries!r}."
        )
    return [_resolved(entry, f"`overrides`, entry {i}", list(tasks)) for i, entry in enumerate(entries, start=1)]


def _resolved(entry: Any, where: str, tasks: list[str]) -> Override:
    if isinstance(entry, Override):
        return entry
    if not isinstance(entry, Mapping):
        raise HfEsmError(f"{where}: must be a mapping such as {{'match': 'mlp', 'alpha': 0.5}}, not {entry!r}.")
    check_known(entry, [field.name for field in fields(Override)], "key", where)
    values = {key: value for key, value in entry.items() if value is not None}
    if not values.keys() & {"match", "kind"}:
        raise HfEsmError(f"{where}: selects no weights. Add `match` or `kind`, or set this for the whole merge.")
    if not values.keys() & {"weights", "method", "alpha"}:
        raise HfEsmError(f"{where}: sets nothing. Add `weights`, `method` or `alpha`.")
    if "match" in values:
        _check_pattern(values["match"], where)
    if "kind" in values:
        check_known([values["kind"]], KINDS, "kind", where)
    if "method" in values:
        values["method"] = _resolved_method(values["method"], where)
    if "weights" in values:
        if not isinstance(values["weights"], Mapping):
            raise HfEsmError(f"{where}: `weights` must be numbers by task, not {values['weights']!r}.")
        check_known(values["weights"], tasks, "expert", f"{where}: `weights`")
        values["weights"] = {
            task: _gradient(value, f"{where}: `weights` of {task!r}") for task, value in values["weights"].items()
        }
    if "alpha" in values:
        values["alpha"] = _gradient(values["alpha"], f"{where}: `alpha`")
    return Override(**values)


def _check_pattern(pattern: Any, where: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise HfEsmError(f"{where}: `match` {pattern!r} is not a regular expression ({error}).") from None


def _resolved_method(method: Any, where: str) -> MergeMethod:
    if method == "auto":
        raise HfEsmError(f"{where}: 'auto' chooses the method of a whole merge. Name the method.")
    try:
        resolved = resolve_method(method)
    except HfEsmError as error:
        raise HfEsmError(f"{where}: {error}") from None
    if resolved.routes or resolved.needs_samples:
        does = "writes experts of its own" if resolved.routes else "learns from the whole model"
        raise HfEsmError(f"{where}: {resolved.name} {does}, so it cannot merge some weights alone. Name another.")
    return resolved


def _gradient(value: Any, where: str) -> Gradient:
    """Return a number, or a tuple of the numbers of a list."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise HfEsmError(f"{where} is an empty list. Give a number, or numbers from the first block to the last.")
        return tuple(finite_number(number, where) for number in value)
    return finite_number(value, where)


def interpolated(value: Gradient, place: float) -> float:
    """Return a number, or what a list of numbers gives at a place between its first (0) and its last (1), linearly."""
    if not isinstance(value, tuple):
        return value
    position = place * (len(value) - 1)
    before = min(int(position), len(value) - 1)
    after = min(before + 1, len(value) - 1)
    return value[before] + (position - before) * (value[after] - value[before])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _readable(value: Gradient) -> str:
    return " to ".join(f"{number:g}" for number in (value if isinstance(value, tuple) else (value,)))


def kinds_of(base: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """Return the kind of each weight of a base by canonical name (see `weight_kinds`); empty for buffers."""
    kinds = weight_kinds(base.skeleton)
    return {name: kinds.get(base.names[name], "") if name in base.trained else "" for name in names}


def select_overrides(base: Checkpoint, kinds: Mapping[str, str], overrides: Sequence[Override]) -> dict[str, Override]:
    """Return by canonical name what is set for each weight that an override selects: key by key, and of `weights`
    task by task, the last one's.

    Lists are interpolated at the weight's block. Weights before all blocks take the first number, those after them the
    last.

    Args:
        kinds: of the merged weights, by canonical name.

    Raises:
        HfEsmError: if an override selects no weight.
    """
    places = _places(base, kinds)
    selected: dict[str, Override] = {}
    for number, override in enumerate(overrides, start=1):
        found = [name for name, kind in kinds.items() if override.selects(base.names[name], kind)]
        if not found:
            raise HfEsmError(f"`overrides`, entry {number}: {_nothing_selected(override, base, kinds)}")
        for name in found:
            new = override.at(places[name])
            set_here = {f.name: getattr(new, f.name) for f in fields(new) if getattr(new, f.name) is not None}
            known = selected.get(name, Override())
            if new.weights is not None:
                set_here["weights"] = {**(known.weights or {}), **new.weights}
            selected[name] = replace(known, **set_here)
    return selected


def _nothing_selected(override: Override, base: Checkpoint, kinds: Mapping[str, str]) -> str:
    """Return the words of an error about an override that selects no merged weight."""
    named = [base.names[name] for name in kinds]
    if override.match is not None and not any(re.search(override.match, name) for name in named):
        words = {word for name in named for word in name.split(".")}
        closest = closest_name(override.match, words)
        meant = f" (did you mean {closest!r}?)" if closest else ""
        return f"no merged weight's name matches {override.match!r}{meant}; names are like {named[len(named) // 2]!r}."
    there = ", ".join(kind for kind in KINDS if kind in kinds.values())
    return f"no merged weight {f'that matches {override.match!r} ' if override.match else ''}is of kind " + (
        f"{override.kind!r}; there are {there}."
    )


def _places(base: Checkpoint, kinds: Mapping[str, str]) -> dict[str, float]:
    """Return where each weight is, by canonical name: 0 in the first block and before it, 1 in the last and after."""
    depths = block_depths(base.skeleton)
    places, passed = {}, 0.0
    for name in base.names:
        depth = depth_of(base.names[name], depths)
        if depth is not None:
            passed = 1.0
        places[name] = passed if depth is None else depth[0] / max(depth[1] - 1, 1)
    return {name: places[name] for name in kinds}
