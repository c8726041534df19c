"""What every process of `test_distributed.py` runs: several merges, each with a record of what it did and returned.

accelerate launch … merge_on_ranks.py FOLDER, where FOLDER has the toy models and `cases.json`.
"""

import contextlib
import io
import json
import os
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState

from hf_esm import merge_models
from hf_esm.cli.main import main


FOLDER = Path(sys.argv[1])
EXAMPLE = Path(__file__).parents[2] / "examples" / "merge_distributed.py"
STATE = Accelerator().state  # not `PartialState`, which does not know of `--cpu` when it comes first
RANK = STATE.process_index
touched: set[str] = set()


def watch(event: str, arguments: tuple) -> None:
    """Note what this process creates, renames or writes below the folder; safetensors files show by their renaming."""
    writes = event in ("os.mkdir", "os.rename", "os.rmdir", "os.remove")
    if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if writes and os.fspath(arguments[0]).startswith(str(FOLDER)):
        touched.add(os.path.relpath(arguments[0], FOLDER))


class Terminal(io.StringIO):
    """Where progress is shown as bars."""

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def recorded(name: str, stream: type[io.StringIO] = io.StringIO):
    """Write down what the block said, did and returned, on this rank."""
    touched.clear()
    record: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(stream()) as err:
        yield record
    record |= {"touched": sorted(touched), "stdout": out.getvalue(), "stderr": err.getvalue()}
    (FOLDER / f"{name}-{RANK}.json").write_text(json.dumps(record))


def describe(result) -> dict:
    """What must be the same on every process."""
    return {
        "method": result.plan.method.name,
        "alpha": result.alpha,
        "alpha_scores": result.alpha_scores,
        "weights": [asdict(report) for report in result.weights],
        "warnings": result.warnings,
        "chosen_by": result.chosen_by,
        "choice": result.choice,
        "agreement": {task: asdict(found) for task, found in result.agreement.items()},
        "refined": result.refined,
        "output_dir": str(result.output_dir),
        "plan": str(result.plan.heads),
    }


def broken(*arguments, **named):
    raise OSError("the disk of this process is full")


sys.addaudithook(watch)
cases = json.loads((FOLDER / "cases.json").read_text())
for name, arguments in cases.items():
    with recorded(name, Terminal) as record:
        calls: list = []
        result = merge_models(
            **arguments, output_dir=FOLDER / name / "found", callback=lambda *call, calls=calls: calls.append(call)
        )
        record |= {"result": describe(result), "calls": len(calls)}

FAILURES = {  # what breaks on the second process
    "loading": "hf_esm.checkpoints.FolderCheckpoint.load_model",
    "running": "hf_esm.calibration.collection.batch_for",
    "merging": "hf_esm.EssentialMerge.merge",
    "writing": "hf_esm.merging.output.to_stored",
    "experts": "hf_esm.merging.routed_experts.expert_factors",
}
for stage, place in FAILURES.items():
    with recorded(f"failing {stage}") as record, pytest.MonkeyPatch.context() as patch:
        if RANK == 1:
            patch.setattr(place, broken)
        shards = {"max_shard_size": "20KB", "method": "esm++", "progress": False}
        try:
            merge_models(**{**cases["sharded"], **shards}, output_dir=FOLDER / "failed")
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"
        PartialState().wait_for_everyone()
        record["left"] = sorted(path.name for path in FOLDER.iterdir() if "failed" in path.name)

with recorded("temporary") as record:  # no output folder: every process can load what stands in the temporary one
    result = merge_models(**{**cases["same statistics"], "progress": False})
    model = result.load_model()
    record["norm"] = float(torch.cat([p.flatten() for p in model.parameters()]).norm())
    PartialState().wait_for_everyone()
    folder = result.output_dir
    del result
    PartialState().wait_for_everyone()
    record["left"] = folder.exists()

files = {task: str(FOLDER / f"{task}.jsonl") for task in ("a", "b")}
models = {task: str(FOLDER / task) for task in ("a", "b")}
pairs = {
    flag: [f"{task}={path}" for task, path in entries.items()]
    for flag, entries in (("expert", models), ("calibration", files))
}
with recorded("example"):
    sys.argv = [str(EXAMPLE), "--base", str(FOLDER / "base"), "--expert", *pairs["expert"]]
    sys.argv += ["--calibration", *pairs["calibration"], "--output-dir", str(FOLDER / "example" / "found")]
    runpy.run_path(str(EXAMPLE), run_name="__main__")

with recorded("command line") as record:
    flags = [part for flag in pairs for pair in pairs[flag] for part in (f"--{flag}", pair)]
    record["status"] = main(
        ["merge", "--base", str(FOLDER / "base"), *flags, "--output-dir", str(FOLDER / "command line" / "found")]
    )
PartialState().destroy_process_group()
