"""Checks of what a caller passes: unknown names, with the likeliest one that was meant, and values of settings."""

import difflib
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from numbers import Integral, Real
from typing import Any, Optional, TypeVar

from ..errors import HfEsmError


Options = TypeVar("Options")


# The largest number of the dtype that weights are computed in.
_LARGEST = 3.4028234663852886e38

# How errors describe a type, and which values have it. A bool is not a number.
_KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (Integral,)),
    float: ("a finite number", (Real,)),
    str: ("a text", (str,)),
    os.PathLike: ("a path", (os.PathLike,)),
    tuple: ("a list", (tuple, list)),
    list: ("a list", (tuple, list)),
    Iterable: ("a list", (Iterable,)),
    Mapping: ("a mapping", (Mapping,)),
    dict: ("a mapping", (Mapping,)),
}


def closest_name(name: Any, known: Iterable[str]) -> Optional[str]:
    """The known name that was likeliest meant by a misspelt one, or None if none is near."""
    by_lower = {entry.lower(): entry for entry in known}
    matches = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return by_lower[matches[0]] if matches else None


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Words for an error about an unknown name: ` (did you mean 'gamma'?)`, or nothing if no known name is near."""
    closest = closest_name(name, known)
    return f" (did you mean {closest!r}?)" if closest else ""


def check_known(names: Iterable[Any], known: Iterable[str], kind: str, where: str = "") -> None:
    """Raise for the first of `names` that is not among the known ones.

    Args:
        names: what the caller wrote.
        known: what there is, in the order of the error's list.
        kind: what the names are, such as `"method"` or `"setting"`.
        where: what the error begins with: a file, an argument or a method.

    Raises:
        HfEsmError: names the unknown one, the likeliest known one, and all that are known.

    Example:
        >>> check_known(["gama"], ["gamma", "factor"], "setting", "esm")
        Traceback (most recent call last):
        hf_esm.errors.HfEsmError: esm: there is no setting 'gama' (did you mean 'gamma'?); there are gamma, factor.
    """
    known = list(known)
    for name in names:
        if name not in known:
            start = f"{where}: there" if where else "There"
            meant = did_you_mean(name, known)
            raise HfEsmError(f"{start} is no {kind} {name!r}{meant}; there are {', '.join(known) or 'none'}.")


def finite_number(value: Any, name: str, wanted: str = "a finite number") -> float:
    """Return a number, or the number that a text holds (YAML reads 1e-3 as a text).

    Args:
        name: of the argument.
        wanted: what the argument takes.

    Raises:
        HfEsmError: names the argument, if the value is not a finite number.
    """
    number = value
    if isinstance(value, str):
        with suppress(ValueError):
            number = float(value)
    if isinstance(number, bool) or not isinstance(number, Real) or not -_LARGEST <= number <= _LARGEST:
        raise HfEsmError(f"{name} must be {wanted}, not {value!r}.")
    return float(number)


def from_arguments(options: type[Options], arguments: Mapping[str, Any]) -> Options:
    """Return a dataclass of options from the arguments (`locals()`) of a function that has one for each field."""
    return options(**{option.name: arguments[option.name] for option in fields(options)})


def check_fields(options: Any, where: str = "") -> None:
    """Raise if a field of a dataclass has a value of another type than its annotation, or outside its range.

    A field's range is in its metadata: `least` and `most` are allowed values, `above` and `below` are not; `choices`
    lists all that are allowed, of which errors name those that are not empty. Where an annotation cannot be resolved,
    the type of the default counts. A tuple may be given as a list, a float as an int; numbers are finite. Fields of
    any type but bool, int, float, str, tuple, list, mappings and classes are not checked. `help` and `search` in the
    metadata are for others to read: see `MergeMethod`.

    Args:
        options: an instance of a dataclass.
        where: the name of a method, whose setting the error names; without it, the error names an argument.

    Raises:
        HfEsmError: names the field, what it takes, and the value.
    """
    for field, types_ in _typed_fields(options):
        value = getattr(options, field.name)
        if not _fits(value, types_, field.metadata):
            start = f"{where}: {field.name}" if where else f"`{field.name}`"
            raise HfEsmError(f"{start} must be {_describe(types_, field, value)}, not {value!r}.")


def number_fields(options: Any) -> set[str]:
    """Return the names of a dataclass's fields that may hold a float."""
    return {field.name for field, types_ in _typed_fields(options) if float in types_}


def _typed_fields(options: Any) -> Iterator[tuple[Field, list[Any]]]:
    """Yield the fields of a dataclass, and the types that each may have; none if any may."""
    try:
        hints = typing.get_type_hints(type(options))
    except (NameError, TypeError):  # annotations that are imported for type checkers alone
        hints = {}
    for field in fields(options):
        yield field, _types_of(hints.get(field.name), field)


def _types_of(annotation: Any, field: Field) -> list[Any]:
    """The types that a field may have; empty if any may."""
    if annotation is None:
        annotation = Any if field.default is MISSING or field.default is None else type(field.default)
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts = [typing.get_origin(part) or part for part in (typing.get_args(annotation) if union else [annotation])]
    return parts if all(isinstance(part, type) and part not in (Any, object) for part in parts) else []


def _fits(value: Any, types_: list[Any], limits: Mapping[str, Any]) -> bool:
    if types_ and not _has_type(value, types_):
        return False
    if value is None:
        return True
    if "choices" in limits:
        return value in limits["choices"]
    if not isinstance(value, Real) or isinstance(value, bool):
        return True
    return (
        (isinstance(value, Integral) or -_LARGEST <= value <= _LARGEST)
        and value >= limits.get("least", value)
        and value <= limits.get("most", value)
        and not ("above" in limits and value <= limits["above"])
        and not ("below" in limits and value >= limits["below"])
    )


def _has_type(value: Any, types_: list[Any]) -> bool:
    if isinstance(value, bool):
        return bool in types_
    return isinstance(value, tuple(cls for kind in types_ for cls in _KINDS.get(kind, ("", (kind,)))[1]))


def _describe(types_: list[Any], field: Field, value: Any) -> str:
    """What a field takes, such as `a whole number, 1 or more`."""
    limits = field.metadata
    if "choices" in limits:
        choices = [str(choice) for choice in limits["choices"] if choice not in ("", None)]
        return f"one of {', '.join(choices)}{did_you_mean(value, choices)}"
    names = [_KINDS.get(kind, (f"a {kind.__name__}",))[0] for kind in types_ if kind is not type(None)]
    words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
    bounds = " and ".join(f"{word} {limits[limit]}" for limit, word in words.items() if limit in limits)
    return ", ".join(filter(None, (" or ".join(dict.fromkeys(names)) or "a finite number", bounds)))
