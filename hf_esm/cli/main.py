"""The command line: `hf-esm COMMAND …`."""

import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Optional

from datasets import disable_progress_bars

from ..errors import HfEsmError
from ..utils import in_flags
from .parser import build_parser


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 bad input."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    disable_progress_bars()
    try:
        with _interruptible():
            given.run(given)
    except HfEsmError as error:
        print(f"hf-esm: {in_flags(str(error), given.flags)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        going_on = " The same command goes on with the work." if getattr(given, "resume_dir", None) else ""
        print(f"hf-esm: stopped before the output was written.{going_on}", file=sys.stderr)
        return 130
    except Exception as error:
        if given.traceback:
            raise
        print(f"hf-esm: {type(error).__name__}: {error}\n(--traceback shows where)", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _interruptible() -> Iterator[None]:
    """Within it, SIGTERM is taken as Ctrl-C is, so that what was begun is cleared away."""
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be taken
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
