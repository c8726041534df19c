"""A process whose Hub client knows the test server alone."""

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Optional

from support.hub_server import Handler, HubServer


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


class FaultyHandler(Handler):
    """Breaks answers as its server's `faults` say: faults in turn, by method and regular expression of the path."""

    def answer(self, content: Any = b"", status: int = 200, headers: Optional[dict[str, str]] = None) -> None:
        asked = f"{self.command} {self.path}"
        waiting = [faults for pattern, faults in self.hub.faults.items() if faults and re.match(pattern, asked)]
        fault = waiting[0].pop(0) if waiting else ""
        if fault.isdecimal():
            return super().answer({"error": f"fault {fault}"}, int(fault))
        if fault == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault in ("cut", "drop"):
            self.close_connection = True
            if fault == "cut":
                self.send_response(200)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
            return None
        return super().answer(content, status, headers)


def faulty_hub() -> HubServer:
    """A started server whose `faults`, by method and path, are lists of `FaultyHandler`'s faults."""
    server = HubServer({TOKEN: "me"})
    server.http.RequestHandlerClass, server.faults = FaultyHandler, {}
    return server.start()
