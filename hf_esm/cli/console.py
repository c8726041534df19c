"""What commands print."""

from typing import Any

from accelerate import PartialState


def say(line: Any) -> None:
    """Print on the main process alone."""
    if PartialState().is_main_process:
        print(line)
