"""The arguments of `merge_models` from a recipe and flags: what `merge`, `inspect` and `compare` share."""

import argparse
import inspect
import shutil
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import yaml

from ..errors import HfEsmError
from ..methods import METHODS
from ..planning import MergeOptions, load_recipe
from .flags import add_flags, options_of, pairs
from .parser import CommandParser


def add_merge_arguments(parser: CommandParser, leave_out: Collection[str] = ()) -> None:
    """Add the recipe, the models and their data, and a flag for every field of `MergeOptions` that is not left out."""
    parser.make_epilog = describe_methods
    parser.add_argument("recipe", nargs="?", help="YAML file with the arguments of merge_models")
    parser.add_argument("--base", help="Hub id or folder of the base")
    parser.add_argument("--expert", action="append", metavar="TASK=MODEL", help="an expert; repeat for each")
    parser.add_argument("--calibration", action="append", metavar="TASK=FILE", help="its samples or statistics")
    parser.add_argument("--validation", action="append", metavar="TASK=FILE", help="labelled rows, for --alpha auto")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="a setting of the method; see below")
    add_flags(parser, MergeOptions, leave_out)


def merge_request(arguments: argparse.Namespace, for_comparison: bool = False) -> dict[str, Any]:
    """The arguments of `merge_models`, or of `compare`, from a recipe and the flags that override it."""
    request = load_recipe(arguments.recipe, for_comparison) if arguments.recipe else {}
    if arguments.base:
        request["base"] = arguments.base
    for name, flag in (("experts", "expert"), ("calibration", "calibration"), ("validation", "validation")):
        if named := pairs(getattr(arguments, flag), f"--{flag}"):
            before = request.get(name) or {}
            if not isinstance(before, Mapping):
                raise HfEsmError(f"--{flag}: the recipe gives {name} as {before!r}; name them there one by one.")
            request[name] = {**before, **named}
    if "base" not in request or "experts" not in request:
        raise HfEsmError("Name a recipe, or --base and --expert TASK=MODEL for each expert.")
    request |= options_of(arguments, MergeOptions)
    if arguments.set:
        method = request.get("method", "esm")
        method = {"name": method} if isinstance(method, str) else dict(method)
        settings = {name: yaml_value(text, "--set") for name, text in pairs(arguments.set, "--set").items()}
        request["method"] = method | settings
    return request


def yaml_value(text: str, flag: str) -> Any:
    """The value that a text is in YAML, such as `0.2`, `true` or `[query, key]`."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise HfEsmError(f"{flag}: {text!r} is not a YAML value.") from None


def describe_methods() -> str:
    """Every method once with its settings, and what the presets change in them."""
    lines, width = ["methods, and their settings for --set NAME=VALUE:"], shutil.get_terminal_size().columns - 2
    for name in METHODS:
        try:
            method = METHODS[name]()
        except HfEsmError as error:  # of another package; the other methods can be used
            lines.append(f"  {name}: {error}")
            continue
        plain = type(method)()
        changed = [f for f in fields(method) if getattr(method, f.name) != getattr(plain, f.name)]
        if changed:
            settings = ", ".join(f"{f.name}={getattr(method, f.name)!r}" for f in changed)
            lines.append(f"  {name}: {plain.name} with {settings}")
            continue
        parent = type(method).__bases__[0]
        inherited = {f.name for f in fields(parent)} if is_dataclass(parent) else set()
        also = f" Settings of {parent.name}, and:" if inherited else ""
        summary = " ".join((inspect.getdoc(type(method)) or "").split()).partition(". ")[0].rstrip(".")
        lines.append(f"  {name}: {summary}.{also}")
        for field in fields(method):
            if field.name not in inherited:
                setting = f"    {field.name} = {getattr(method, field.name)!r}"
                lines.append(": ".join(filter(None, (setting, field.metadata.get("help")))))
    return "\n".join(textwrap.fill(line, width, subsequent_indent=" " * 8) for line in lines)
