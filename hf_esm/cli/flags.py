"""Flags that are made from the fields of a dataclass, the values that they give, and messages that name flags."""

import argparse
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, Optional

from ..errors import HfEsmError


_NUMBERS = {int: "a whole number", float: "a number"}


def add_flags(
    parser: argparse.ArgumentParser, options: type, leave_out: Collection[str] = (), **defaults: Any
) -> None:
    """Add a flag for every field of a dataclass, with the help of its metadata.

    Args:
        options: the dataclass. A flag that is not used leaves nothing in the namespace.
        leave_out: names of fields without a flag.
        defaults: default values that the help names instead of those of the fields.
    """
    hints = typing.get_type_hints(options)
    group = parser.add_argument_group("options")
    for field in fields(options):
        if field.name in leave_out:
            continue
        default = defaults.get(field.name, None if field.default is MISSING else field.default)
        shown = f" (default: {default})" if default is not None and default is not False else ""
        taken_as = _taken_as(hints[field.name])
        common = {"dest": field.name, "default": argparse.SUPPRESS}
        switch = f"; --no-{_flag(field.name)[2:]}" if taken_as.get("nargs") == "*" else ""
        group.add_argument(_flag(field.name), help=field.metadata["help"] + shown + switch, **common, **taken_as)
        if taken_as.get("nargs") == "*":
            no = f"--no-{field.name.replace('_', '-')}"
            group.add_argument(no, help=argparse.SUPPRESS, **common, action="store_const", const=False)


def _taken_as(annotation: Any) -> dict[str, Any]:
    """How argparse takes the values of a field with this annotation."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    types_ = [typing.get_origin(part) or part for part in (typing.get_args(annotation) if union else [annotation])]
    if bool in types_ and Mapping in types_:
        return {"action": "extend", "nargs": "*", "metavar": "NAME=VALUE"}
    if bool in types_:
        return {"action": argparse.BooleanOptionalAction}
    if Mapping in types_ and str not in types_:
        return {"action": "extend", "nargs": "+", "metavar": "NAME=VALUE"}
    if Iterable in types_:
        return {"action": "extend", "nargs": "+", "metavar": "NAME"}
    return {"type": _converter(types_), "metavar": "VALUE"}


def _converter(types_: Collection[Any]) -> Callable[[str], Any]:
    numbers = [kind for kind in types_ if kind in _NUMBERS]

    def convert(text: str) -> Any:
        for kind in numbers:
            try:
                return kind(text)
            except ValueError:
                continue
        if str in types_:
            return text
        raise argparse.ArgumentTypeError(f"{text!r} is not {' or '.join(_NUMBERS[kind] for kind in numbers)}")

    return convert


def options_of(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """The values of the flags that were used, by the fields of the dataclass."""
    used = {f.name: getattr(arguments, f.name) for f in fields(options) if hasattr(arguments, f.name)}
    for name in {"columns", "weights"} & used.keys():
        used[name] = pairs(used[name], _flag(name))
    if "heads" in used and len(used["heads"]) == 1 and used["heads"][0] in ("auto", "merge", "keep"):
        used["heads"] = used["heads"][0]
    return used


def pairs(items: Optional[Iterable[str]], flag: str) -> dict[str, str]:
    """Split every `NAME=VALUE` of a flag.

    Raises:
        HfEsmError: if a name or value is missing, or a name comes twice.
    """
    values: dict[str, str] = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not name or not value:
            raise HfEsmError(f"{flag} takes NAME=VALUE, not {item!r}.")
        if name in values:
            raise HfEsmError(f"{flag} names {name!r} twice.")
        values[name] = value
    return values


def count(text: str) -> int:
    """The type of a flag that takes a whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def add_trust_flags(parser: argparse.ArgumentParser, pickle: bool = True) -> None:
    """Add `--trust-remote-code` and, with `pickle`, `--allow-pickle`."""
    if pickle:
        parser.add_argument("--allow-pickle", action="store_true", help="read .bin checkpoints (can run code)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")


def in_flags(message: str, flags: Collection[str]) -> str:
    """Rewrite the arguments that a message names in backticks as flags of the command line, as far as there are flags.

    Errors and warnings name arguments as a Python caller writes them; the command line passes them through here.

    Example:
        >>> in_flags("Choose another `output_dir`, or pass `overwrite=True`.", ["--output-dir", "--overwrite"])
        'Choose another --output-dir, or pass --overwrite.'
        >>> in_flags("`alpha='auto'` needs `validation` or `score_fn`.", ["--alpha", "--validation"])
        '--alpha auto needs --validation or `score_fn`.'
    """

    def rewrite(match: re.Match) -> str:
        name, value = _flag(match[1]), match[2]
        flag = next((flag for flag in (name, name.removesuffix("s")) if flag in flags), None)
        if flag is None:
            return match[0]
        if value in (None, "", "True"):
            return flag
        return f"{flag} " + re.sub(r"'(\w+)': ", r"\1=", value).strip("'\"{}[]")

    return re.sub(r"`(\w+)(?:=([^`]*))?`", rewrite, message)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
