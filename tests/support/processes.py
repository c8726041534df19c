"""Scripts in processes of their own that start at once: forked from a process that has imported Transformers already.

Neither `hf_esm` nor `peft` is loaded in that process. It starts when the first script does, once a worker.
"""

import os
import signal
import socket
import subprocess
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


RANK_1 = """
import runpy, sys, warnings
warnings.simplefilter("ignore")
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def launch(script, folder):
    """Run a script on two processes: the first under `accelerate launch --cpu --num_processes 2`, the second with the
    variables that the launcher sets. On CPUs Accelerate leaves starting the others to MPI, which sets them, too.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = {"--num_processes": "2", "--num_machines": "1", "--mixed_precision": "no", "--dynamo_backend": "no"}
    flags = ["--cpu", *(part for pair in flags.items() for part in pair), "--main_process_port", port]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    second = {**common, "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    first = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *flags, str(script), str(folder)],
        env={**os.environ, **common, "RANK": "0", "LOCAL_RANK": "0", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output = folder / "output of rank 1"
    process = start_script(RANK_1, script, folder, output=output, environment={**second, "ACCELERATE_USE_CPU": "true"})
    try:
        said = first.communicate(timeout=240)[0]
        process.join(60)
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
        process.kill()
    assert [first.returncode, process.exitcode] == [0, 0], said + output.read_text()
