"""From the words of a command to an exit status."""

import gc
import logging
import signal
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Optional

from ..errors import HfEsmError
from .console import as_loud_as, end_output, show
from .device import on_device
from .flags import in_flags
from .parser import parse


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run one command.

    Args:
        arguments: its words; by default those that the process was started with.

    Returns:
        The exit status: 0 done, 1 failed, 2 bad input, 130 interrupted. A reader of the output that leaves, as `head`
        does, stops the output and not the work.
    """
    _print_anything()
    try:
        with _importing() if arguments is None else nullcontext():
            command = parse(arguments)
    finally:
        end_output()  # of `--help`
    _prepare_output(command.flags)
    try:
        with _interruptible(), on_device(getattr(command, "device", None)), as_loud_as(command):
            outcome = command.run(command)
        show(outcome, command)
        end_output()
    except HfEsmError as error:
        return _fail(in_flags(str(error), command.flags), 2)
    except KeyboardInterrupt:
        resumes = " The same command continues the work." if getattr(command, "resume_dir", None) else ""
        return _fail(f"stopped before the output was written.{resumes}", 130)
    except Exception as error:
        if command.traceback:
            raise
        if isinstance(error, OSError):  # of the disk or the network, in words of its own
            place = f"{error.filename}: " if error.filename else ""
            return _fail(f"{place}{error.strerror or error}\n(--traceback shows where)", 1)
        return _fail(f"internal error ({type(error).__name__}: {error})\n(--traceback shows where)", 1)
    return 0


@contextmanager
def _importing() -> Iterator[None]:
    """Do not look for garbage among what a command imports, all of which stays: that takes a quarter of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _print_anything() -> None:
    """Let the terminal print letters that its encoding lacks, such as α in ASCII, as their codes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str, status: int) -> int:
    print(f"hf-esm: {message}", file=sys.stderr)
    return status


class _FlagFormatter(logging.Formatter):
    """Warnings of this package name flags, as its errors do; lines of progress are plain."""

    def __init__(self, flags: Collection[str]):
        super().__init__("%(levelname)s: %(message)s")
        self.flags = flags

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record) if record.levelno > logging.INFO else record.getMessage()
        return in_flags(text, self.flags) if record.name.startswith("hf_esm") else text


def _prepare_output(flags: Collection[str]) -> None:
    from datasets import disable_progress_bars  # only now: every command that was chosen has loaded it

    disable_progress_bars()
    handler = logging.StreamHandler()
    handler.setFormatter(_FlagFormatter(flags))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C inside the block, so that what was begun is removed."""
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be taken
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
