"""List the merge methods, or say what one of them does and which settings it has. A setting is given by --set
NAME=VALUE, or in a recipe as method: {name: esm, gamma: 0.2}. The names refine and lines describe the settings of
--refine and --lines.
"""

import argparse
import inspect
import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from ..errors import HfEsmError
from ..methods import METHODS
from ..planning import LinesSettings, RefineSettings
from ..utils import check_known
from .console import Outcome


_STEPS = {"refine": RefineSettings, "lines": LinesSettings}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="method to describe, or refine, or lines (default: list the methods)")


def run(arguments: argparse.Namespace) -> Outcome:
    name = arguments.name
    if name is None:
        summaries = {name: _summary(name) for name in METHODS}
        text = _filled(f"{name}: {summary}" for name, summary in summaries.items())
        return Outcome(text, summaries, following="hf-esm methods NAME lists the settings of one of them")
    check_known([name], [*METHODS, *_STEPS], "method")
    settings = _STEPS[name]() if name in _STEPS else METHODS[name]()
    data = {f.name: {"value": getattr(settings, f.name), "help": f.metadata.get("help")} for f in fields(settings)}
    if name in _STEPS:
        lines = [f"settings for --{name} NAME=VALUE:", *map(_setting, fields(settings))]
        return Outcome(_filled(lines), {"name": name, "settings": data})
    return Outcome(_filled(_described(name)), {"name": name, "summary": _summary(name), "settings": data})


def _summary(name: str) -> str:
    """The first sentence of a method, or what a preset changes in a method."""
    try:
        method = METHODS[name]()
    except HfEsmError as error:  # of another package; the other methods can be used
        return f"{error}"
    if type(method)() != method:
        return f"{type(method)().name} with published settings"
    return f"{_first_sentence(type(method))}."


def _first_sentence(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").split()).partition(". ")[0].rstrip(".")


def _described(name: str) -> list[str]:
    """A method with its settings; of a preset, what it changes."""
    method = METHODS[name]()
    plain = type(method)()
    changed = [f for f in fields(method) if getattr(method, f.name) != getattr(plain, f.name)]
    if changed:
        shown = [f"  {f.name} = {getattr(method, f.name)!r}" for f in changed]
        return [f"{name}: {plain.name} with these settings; hf-esm methods {plain.name} says what they are", *shown]
    parent = type(method).__bases__[0]
    inherited = {f.name for f in fields(parent)} if is_dataclass(parent) else set()
    also = f" Settings of {parent.name}, and:" if inherited else ""
    own = [_setting(field) for field in fields(method) if field.name not in inherited]
    return [f"{name}: {_first_sentence(type(method))}.{also}", *(own or ["  no settings"])]


def _setting(field: Any) -> str:
    default = field.default if isinstance(field.default, (str, int, float, tuple, type(None))) else None
    return ": ".join(filter(None, (f"  {field.name} = {default!r}", field.metadata.get("help"))))


def _filled(lines: Iterable[str]) -> str:
    width = shutil.get_terminal_size().columns - 2
    return "\n".join(textwrap.fill(line, width, subsequent_indent=" " * 6) for line in lines)
