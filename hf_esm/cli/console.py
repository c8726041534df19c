"""What commands print."""

import os
import sys
from typing import Any


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
