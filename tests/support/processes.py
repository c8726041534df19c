"""Scripts in processes of their own that start at once: forked from a process that has imported Transformers already.

Neither `hf_esm` nor `peft` is loaded in that process. It starts when the first script does, once a worker.
"""

import os
import sys
import traceback
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Optional


PRELOADED = ["transformers.modeling_utils", "transformers.generation", "accelerate", "datasets"]


def start_script(code: str, *arguments: Any, output: Path, environment: Optional[dict[str, str]] = None) -> Any:
    """The process that runs the code, with `sys.argv[1:]` the arguments; what it prints goes to the file `output`."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=execute, args=(code, [str(a) for a in arguments], str(output), environment or {}))
    process.start()
    return process


def run_script(code: str, *arguments: Any, timeout: float = 120) -> SimpleNamespace:
    """Run the code to its end; returns its `returncode` and the `output` that it printed."""
    with TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        process = start_script(code, *arguments, output=output)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        return SimpleNamespace(returncode=process.exitcode, output=output.read_text())


def execute(code: str, arguments: list[str], output: str, environment: dict[str, str]) -> None:
    """What the forked process does."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    assert not {"hf_esm", "peft"} & set(sys.modules)
    os.environ.update(environment)
    sys.argv = ["script", *arguments]
    try:
        exec(compile(code, "script", "exec"), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        sys.exit(1)
