"""What commands print: all that a user may want to know, less under `--quiet`, and plain data under `--json`."""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any, Optional


@dataclass(frozen=True)
class Outcome:
    """What a command ends with.

    Attributes:
        text: the account for a reader; empty if it was printed on the way.
        data: the same as plain data, which `--json` prints.
        result: what the command was called for, such as a folder, which `--quiet` prints; by default `text`.
        notes: lines for the user that are no part of the output; they go to standard error.
        where: what was written, if `text` does not say so.
        load: the Python code that loads it.
        following: the command to go on with.
    """

    text: Any
    data: Any
    result: Any = None
    notes: Sequence[str] = ()
    where: Optional[Any] = None
    load: str = ""
    following: str = ""

    @property
    def closing(self) -> list[str]:
        """The lines that say where the result is, how it is loaded, and what to do next."""
        known = {"written": self.where, "load": self.load, "next": self.following}
        return [f"  {name:8} {line}" for name, line in known.items() if line]


def routed_outcome(folder: Any, tasks: Sequence[str]) -> Outcome:
    """The outcome of a command that writes a routed model."""
    return Outcome(
        f"{folder}: {', '.join(tasks)}",
        {"output_dir": folder, "tasks": tasks},
        folder,
        load=f"hf_esm.RoutedModel.from_pretrained({str(folder)!r})",
        following=f"hf-esm predict {folder} FILE, or hf-esm push {folder} ME/NAME",
    )


@contextmanager
def as_loud_as(command: argparse.Namespace) -> Iterator[None]:
    """Run a command as loud as the user asked: what it prints on the way goes nowhere under `--quiet`, and to standard
    error under `--json`. Otherwise the log says how far the work is.
    """
    from ..checkpoints import quiet_loading  # only now: the chosen command has loaded it

    logger = logging.getLogger("hf_esm")
    before = logger.level
    if command.quiet:
        command.progress = False
    logger.setLevel(logging.ERROR if command.quiet else logging.INFO)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, warnings.catch_warnings():
            if command.quiet:
                warnings.simplefilter("ignore")
            place = nowhere if command.quiet else sys.stderr if command.json else sys.stdout
            with redirect_stdout(place), quiet_loading() if command.quiet else nullcontext():
                yield
    finally:
        logger.setLevel(before)


def show(outcome: Outcome, command: argparse.Namespace) -> None:
    """Print the outcome of a command as the user asked."""
    if command.json:
        say(as_json(outcome.data, indent=1))
        return
    if command.quiet:
        say(outcome.text if outcome.result is None else outcome.result)
        return
    for note in outcome.notes:
        say(f"note: {note}", file=sys.stderr)
    lines = [str(outcome.text)] if outcome.text else []
    if lines := [*lines, *outcome.closing]:
        say("\n".join(lines))


def as_json(value: Any, indent: Optional[int] = None) -> str:
    """Plain data as JSON; pictures and the like in words."""
    from ..utils import without_nan  # only now: `--help` needs none of it

    return json.dumps(without_nan(value), indent=indent, ensure_ascii=False, default=_shown)


def _shown(value: Any) -> Any:
    """What is no JSON: a tensor as a list, a path as text, and all else, such as a picture, in words."""
    if isinstance(value, os.PathLike):
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else f"<{type(value).__name__}>"


def say(line: Any, **options: Any) -> None:
    """Print on the main process alone, as long as someone reads.

    Args:
        options: of `print`.
    """
    from accelerate import PartialState  # only now: `--help` needs none of it

    if PartialState().is_main_process:
        try:
            print(line, **options)
        except BrokenPipeError:
            _print_nowhere()


def end_output() -> None:
    """Write what was printed, while an error of that can still be caught."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _print_nowhere()


def _print_nowhere() -> None:
    """Let the work go on after the reader of the output left, as `head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
