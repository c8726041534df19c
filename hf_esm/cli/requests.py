"""The arguments of `merge_models` from a recipe and flags: what `merge`, `inspect` and `compare` share."""

import argparse
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import HfEsmError
from ..planning import MergeOptions, load_recipe
from .device import add_device_flag
from .flags import add_flags, options_of, pairs
from .parser import CommandParser
from .values import by_task, plain_or_yaml, yaml_value


def add_merge_arguments(parser: CommandParser, leave_out: Collection[str] = ()) -> None:
    """Add the recipe, the models and their data, and a flag for every field of `MergeOptions` that is not left out."""
    parser.add_argument("recipe", nargs="?", help="YAML file with the arguments of merge_models")
    parser.add_argument("--base", help="Hub id or folder of the base (default: that of all adapters)")
    parser.add_argument("--expert", action="append", metavar="TASK=MODEL", help="an expert; repeat for each")
    parser.add_argument("--calibration", action="append", metavar="TASK=FILE", help="its samples or statistics")
    parser.add_argument(
        "--validation", action="append", metavar="TASK=FILE", help="labelled rows, for --method auto and --alpha auto"
    )
    parser.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="a setting of the method, or of esm (hf-esm methods NAME)",
    )
    add_device_flag(parser)
    add_flags(parser, MergeOptions, leave_out)


def merge_request(arguments: argparse.Namespace, command: str = "merge") -> dict[str, Any]:
    """The arguments of `merge_models`, or of `compare`, from a recipe and the flags that override it."""
    request = load_recipe(arguments.recipe, command) if arguments.recipe else {}
    if arguments.base:
        request["base"] = plain_or_yaml(arguments.base, "--base")
    update_by_task(request, arguments, experts="expert", calibration="calibration", validation="validation")
    if "experts" not in request:
        raise HfEsmError("Name a recipe, or --base and --expert TASK=MODEL for each expert.")
    request.setdefault("base", None)
    request |= _plain_values(options_of(arguments, MergeOptions))
    for name in ("refine", "lines"):
        if isinstance(words := getattr(arguments, name, None), list):
            request[name] = _settings(words, f"--{name}") or True
    if arguments.set:
        method = request.get("method", "esm")
        method = {"name": method} if isinstance(method, str) else dict(method)
        if method.get("name") == "auto":
            raise HfEsmError("--set changes a setting of one method, but auto chooses one. Name it: --method esm.")
        request["method"] = method | _settings(arguments.set, "--set")
    return request


def is_recipe(text: str) -> bool:
    """Whether a word that names a model, or a recipe, names a recipe."""
    return text.endswith((".yaml", ".yml")) and not Path(text).expanduser().is_dir()


def update_by_task(request: dict[str, Any], arguments: argparse.Namespace, **flags: str) -> None:
    """Add to the arguments of a call what flags name by task.

    Args:
        request: the arguments, which the flags override task by task.
        flags: the flag of each argument, such as `experts="expert"`.
    """
    for name, flag in flags.items():
        words = getattr(arguments, flag)
        if name == "calibration" and words and len(words) == 1 and Path(words[0]).expanduser().is_dir():
            request[name] = words[0]  # the folder of all statistics
        elif named := by_task(words, f"--{flag}"):
            before = request.get(name) or {}
            if not isinstance(before, Mapping):
                raise HfEsmError(f"--{flag}: the recipe gives {name} as {before!r}; name them there one by one.")
            request[name] = {**before, **named}


def _plain_values(used: dict[str, Any]) -> dict[str, Any]:
    """The values of flags, those that are written as YAML read."""
    if "overrides" in used:
        used["overrides"] = [yaml_value(text, "--overrides") for text in used["overrides"]]
    for name in {"alpha", "metric", "tokenizer", "method"} & used.keys():
        if isinstance(used[name], str):
            used[name] = plain_or_yaml(used[name], f"--{name}")
    return used


def _settings(words: Iterable[str], flag: str) -> dict[str, Any]:
    """The settings that the words `NAME=VALUE` of a flag give, with values as YAML reads them."""
    return {name: yaml_value(text, flag) for name, text in pairs(words, flag).items()}
