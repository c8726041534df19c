"""A process whose Hub client knows the test server alone."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from support.hub_server import HubServer


TOKEN = "hf_me"
ABSENT = "not on the Hub, or private. Check the id; if it is private, log in (`hf auth login`) or pass `token`."


@contextmanager
def process(hub: HubServer, home: Path, offline: bool = False) -> Iterator[Callable]:
    """Runs functions in a process whose client knows this Hub alone."""
    before = dict(os.environ)
    for name in before:
        if (name.startswith("HF_") and not name.startswith("HF_ESM_")) or name.lower().endswith("_proxy"):
            del os.environ[name]
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    os.environ.update(settings, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=120)
    finally:
        os.environ.clear()
        os.environ.update(before)
