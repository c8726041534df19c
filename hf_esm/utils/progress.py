"""Progress: bars where someone watches, and lines in the log elsewhere."""

import logging
import sys
import time
from collections.abc import Collection, Iterator
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import tqdm

from .sizes import readable_duration


T = TypeVar("T")
logger = logging.getLogger(__name__)

_EVERY = 10.0  # seconds between two lines


def tracked(items: Collection[T], name: str, shown: bool = True, leave: bool = True) -> Iterator[T]:
    """Iterate over items, and show on the main process how far that is and how long it will take.

    On a terminal and in a notebook that is a bar. Elsewhere, such as in a file, a line is logged every ten seconds, at
    the level `INFO`.

    Args:
        name: what is done with the items.
        shown: whether anything is shown.
        leave: whether a bar stays when it is full.
    """
    if shown and items and (sys.stderr.isatty() or "ipykernel" in sys.modules):
        yield from tqdm(items, desc=name, leave=leave)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if shown and done and now - last >= _EVERY and PartialState().is_local_main_process:
            left = readable_duration((now - start) / done * (len(items) - done))
            logger.info("%s: %d of %d, about %s left", name, done, len(items), left)
            last = now
        yield item
