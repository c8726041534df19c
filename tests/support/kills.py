"""Writers that are killed at one of their steps on the disk, by the hundred, and what they leave.

    python tests/support/faults.py --kills 1000 [--seed 0] [--kind merge]

A step is a call that changes the disk: a file opened for writing, a rename, a removal, a new folder, a change of mode.
The writer, a forked process, ends just before one of its steps, drawn at random; the file that it opened last may be
cut off anywhere in what was written to it. Then what has the output's name must be absent, whole as it was before, or
whole as it will be. The next run must succeed, or is refused where the output was whole already and is not to be
replaced. After it, there must be the same files as after a run that was not killed, and nothing else.
"""

import gc
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import safetensors.torch
import torch
from huggingface_hub import HfApi

from hf_esm import HfEsmError, RoutedModel, Scores, calibrate, compare, essential_components, merge_models, update_card
from hf_esm.data import save_samples
from hf_esm.utils import Work, atomic_file, publish_folder, recover, staging_folder
from support.helpers import text_samples
from support.routed_toys import task_texts, write_bert
from support.toys import base_model, lora_adapter


SECONDS = 120  # after which a run hangs


def merge(place: Path, *folders: str, method: str = "esm", **options: Any) -> None:
    """Merge with folders of their own, such as a `resume_dir`."""
    models, samples = place / "models", {task: task_texts(task, count=4) for task in "ab"}
    options = {"output_dir": place / "work" / "out", "method": method, "calibration": samples, **options}
    options |= {name: str(place / "work" / name) for name in folders}
    merge_models(models / "base", {task: models / task for task in "ab"}, progress=False, **options)


def learn(place: Path, **options: Any) -> None:
    """Merge with steps of learning, whose state is saved every other step."""
    samples = {task: task_texts(task, count=8) for task in "ab"}
    with patch("hf_esm.merging.refining.SAVE_EVERY", 2), patch("hf_esm.merging.learning.SAVE_EVERY", 2):
        merge(place, "resume_dir", **{"calibration": samples} | options)


def merge_adapters(place: Path) -> None:
    models, experts = place / "models", {task: place / "models" / f"{task}-lora" for task in "ab"}
    output = {"output_dir": place / "work" / "out", "progress": False, "output": "lora"}
    merge_models(models / "base", experts, method="mean", **output)


def add(place: Path) -> None:
    expert, statistics = place / "models" / "c", place / "statistics" / "c.safetensors"
    RoutedModel.from_pretrained(place / "routed").add_expert(
        "c", expert, statistics, output_dir=place / "work" / "out"
    )


def remove(place: Path) -> None:
    RoutedModel.from_pretrained(place / "routed").remove_expert("b", output_dir=place / "work" / "out")


def save(place: Path) -> None:
    model = RoutedModel.from_pretrained(place / "routed")
    for name, parameter in model.model.named_parameters():
        if "routed_experts" in name:
            parameter.data.mul_(2)
    model.save_pretrained(place / "work" / "out", overwrite=True)


def export(place: Path) -> None:
    """To a folder that may be there already."""
    RoutedModel.from_pretrained(place / "routed").export_lora(place / "work" / "out")


def push(place: Path) -> None:
    """Without the Hub: to a folder that it puts in the place of another."""

    def upload(self: HfApi, folder_path: Path, **_: Any) -> None:
        shutil.copytree(folder_path, place / "hub", dirs_exist_ok=True)

    hosted = SimpleNamespace(siblings=[SimpleNamespace(rfilename="model.safetensors", lfs=None)])
    with (
        patch.object(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id)),
        patch.object(HfApi, "model_info", lambda *_, **__: hosted),
        patch.object(HfApi, "upload_folder", lambda self, folder_path, **_: upload),
    ):
        RoutedModel.from_pretrained(place / "work" / "out").push_to_hub("me/routed", base_model="me/static")


def components(place: Path) -> None:
    models, output = place / "models", {"output_dir": place / "work" / "out", "progress": False}
    essential_components(models / "base", models / "a", task_texts("a", count=4), rank=2, **output)


def collect(place: Path) -> None:
    calibrate(place / "models" / "a", task_texts("a", count=4), progress=False).save(place / "work" / "a.safetensors")


def samples(place: Path) -> None:
    save_samples(text_samples(1), place / "work" / "a.safetensors")


def card(place: Path) -> None:
    update_card(place / "work" / "out", Scores({"a": 0.5, "b": 0.25}, {}), {})


def comparison(place: Path) -> None:
    models = place / "models"
    rows = {task: [{"text": t, "label": 0} for t in task_texts(task, count=3)] for task in "ab"}
    arguments = {"calibration": {task: task_texts(task, count=3) for task in "ab"}, "progress": False}
    experts = {task: models / task for task in "ab"}
    compare(models / "base", experts, test=rows, methods=["mean"], output_dir=place / "work" / "out", **arguments)


def folder(place: Path) -> None:
    """What every merge that resumes does, without a merge: hundreds in a second."""
    output, work = place / "work" / "out", Work(str(place / "work" / "resume_dir"), {"the samples": 1})
    work.check()
    with staging_folder(output) as staging:
        with atomic_file(work.begin(staging) / "merged") as partial:
            partial.write_text("merged")
        (staging / "heads").mkdir()
        for name in ("config.json", "heads/config.json"):
            (staging / name).write_text(f'{{"name": "{name}"}}')
        publish_folder(staging, output, overwrite=True)
        work.end()


@dataclass(frozen=True)
class Writer:
    """A kind of writer.

    Attributes:
        run: writes to `place / "work"`, and reads what else is in `place`.
        earlier: what is copied to `work` before, by its name in `place`.
        outputs: what appears at once, by its name in `work`.
        varies: patterns of files that hold times.
        share: how often it is drawn, compared with other kinds.
    """

    run: Callable[[Path], None]
    earlier: dict[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("out",)
    varies: tuple[str, ...] = ("merge_report.json",)
    share: int = 10


OVER_MERGED, OVER_ROUTED = {"merged": "out"}, {"routed": "out"}


def merging(*folders: str, **options: Any) -> Callable[[Path], None]:
    return lambda place: merge(place, *folders, **options)


def learning(**options: Any) -> Callable[[Path], None]:
    return lambda place: learn(place, **options)


WRITERS = {
    "folder": Writer(folder, OVER_MERGED),
    "merge": Writer(merge),
    "merge over another": Writer(merging(overwrite=True), OVER_MERGED),
    "merge that keeps statistics": Writer(merging("statistics_dir")),
    "merge that resumes": Writer(merging("resume_dir"), share=30),
    "merge that resumes over another": Writer(merging("resume_dir", overwrite=True), OVER_ROUTED, share=20),
    "merge that does both": Writer(merging("resume_dir", "statistics_dir"), share=20),
    "routed": Writer(merging(method="esm++")),
    "routed that resumes": Writer(merging("resume_dir", method="esm++", overwrite=True), OVER_ROUTED, share=20),
    "alpha": Writer(merging("resume_dir", alpha="auto")),
    "refined": Writer(learning(refine={"components": 2, "steps": 7})),
    "gates": Writer(learning(refine={"components": 2, "steps": 5, "keep_adapter": True}, method="mean")),
    "mask": Writer(learning(method={"name": "concrete-adamerging", "steps": 3, "coefficient_steps": 3})),
    "lora": Writer(merge_adapters),
    "added expert": Writer(add),
    "removed expert": Writer(remove),
    "saved model": Writer(save, OVER_ROUTED),
    "export": Writer(export),
    "export beside others": Writer(export, OVER_MERGED, outputs=("out/a", "out/b")),
    "push": Writer(push, OVER_ROUTED),
    "components": Writer(components),
    "statistics": Writer(collect, {"statistics/c.safetensors": "a.safetensors"}, outputs=("a.safetensors",)),
    "samples": Writer(samples, {"statistics/c.safetensors": "a.safetensors"}, outputs=("a.safetensors",)),
    "card": Writer(card, OVER_MERGED, outputs=("out/README.md",)),
    "comparison": Writer(comparison, outputs=("out/report.json",), varies=("*.json", "report.*", "*.png")),
}


# ---- one kill


CHANGES = ("os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.chmod", "os.truncate", "os.link")


class Steps:
    """Counts the changes of the disk below a folder, and kills the process before one of them.

    Attributes:
        place: the folder.
        count: changes so far.
        last: number of the change, from 0, before which the process is killed.
        cut: share of the file opened last that stays then.
    """

    def __init__(self, place: Path):
        self.place, self.count, self.last, self.cut = str(place), 0, None, None
        self._opened: tuple[str, int] | None = None
        self._serialize = safetensors.torch.serialize_file
        sys.addaudithook(self._see)  # for the life of the process
        safetensors.torch.serialize_file = self._write_in_rust

    def step(self, opened: str | None = None, kept: int | None = None) -> None:
        """Count a change.

        Args:
            opened: a file that it opens, to write to its end.
            kept: bytes of the file that stay.
        """
        if self.count == self.last:
            self.last = None  # what follows is a change, too
            if self.cut is not None and self._opened and os.path.isfile(self._opened[0]):
                path, first = self._opened
                os.truncate(path, first + int(self.cut * (os.path.getsize(path) - first)))
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1
        self._opened = None if kept is None else (opened, kept)

    def _see(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR) and self._inside(path):
                kept = 0 if flags & os.O_TRUNC or not os.path.exists(path) else os.path.getsize(path)
                self.step(str(path), kept if mode and mode[0] in "wax" else None)
        elif event in CHANGES and (self._inside(arguments[0]) or arguments[-1] not in (-1, None)):
            self.step()  # also of a name in an opened folder, as rmtree removes

    def _inside(self, path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and str(path).startswith(self.place)

    def _write_in_rust(self, tensors: Any, path: Any, *arguments: Any, **named: Any) -> None:
        if self._inside(path):
            self.step(str(path), 0)
        self._serialize(tensors, path, *arguments, **named)


@dataclass
class Run:
    """What came of a run in a process of its own.

    Attributes:
        refused: the message of an `HfEsmError`.
        error: any other exception, with its traceback, or how the process ended otherwise.
    """

    refused: str = ""
    error: str = ""


def forked(
    writer: Writer,
    steps: Steps,
    last: int | None = None,
    cut: float | None = None,
) -> Run:
    """Run a writer in a copy of this process, which is killed before step number `last`."""
    place = Path(steps.place).parent
    said = place / "said.json"
    said.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        try:
            signal.alarm(SECONDS)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            tempfile.tempdir = str(place / "temporary")
            run, steps.count, steps.last, steps.cut = Run(), 0, last, cut
            try:
                writer.run(place)
                steps.step()
            except HfEsmError as error:
                run.refused = str(error)
            except BaseException:
                run.error = traceback.format_exc(limit=-6)
            said.write_text(json.dumps(vars(run)))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and last is not None:
        return Run()
    if not said.is_file():
        return Run(error=f"the process ended with status {status}")
    return Run(**json.loads(said.read_text()))


def contents(path: Path, varies: tuple[str, ...] = ()) -> dict[str, str]:
    """Digest of each file at or below a path; of those that vary, whether they can be parsed."""
    found = {"": "folder" if path.is_dir() else "file"} if path.exists() else {}
    for part in [path] if path.is_file() else sorted(path.rglob("*")):
        name = str(part.relative_to(path))
        if part.is_dir():
            found[name] = "folder"
        elif any(fnmatch(part.name, pattern) for pattern in varies):
            found[name] = "whole" if part.suffix != ".json" or is_json(part) else "damaged"
        else:
            found[name] = hashlib.sha256(part.read_bytes()).hexdigest()
    return found


def is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True


class Killer:
    """Kills writers of one kind.

    Attributes:
        place: holds what writers read, and `work`, which they write to.
        before, after: contents of the outputs before, and of `work` after a run that is not killed.
        count: steps of that run.
    """

    def __init__(self, name: str, steps: Steps):
        self.writer, self.steps, self.work, self.place = (
            WRITERS[name],
            steps,
            Path(steps.place),
            Path(steps.place).parent,
        )
        self._begin()
        self.before = {name: self._contents(name) for name in self.writer.outputs}
        steps.count = 0
        self.writer.run(self.place)  # here, so that copies of this process need not import anything
        self.count, self.after = steps.count + 1, self._contents()

    def _contents(self, name: str = "") -> dict[str, str]:
        return contents(self.work / name, self.writer.varies)

    def _begin(self) -> None:
        for name in ("work", "temporary", "hub"):
            shutil.rmtree(self.place / name, ignore_errors=True)
        for name in ("work", "temporary"):
            (self.place / name).mkdir()
        for source, target in self.writer.earlier.items():
            copy = shutil.copytree if (self.place / source).is_dir() else shutil.copy
            copy(self.place / source, self.work / target)

    def kill(self, draw: random.Random) -> list[str]:
        """Kill a writer, now and then also the next one; returns what is wrong."""
        self._begin()
        faults, where = [], []
        for _ in range(draw.choice([1, 1, 1, 2])):
            last, cut = draw.randrange(self.count), draw.choice([None, draw.random()])
            where.append(str(last))
            run = forked(self.writer, self.steps, last, cut)
            if run.error:
                faults.append(run.error)
            faults += self._damaged()
        whole = any(self._contents(name) == below(self.after, name) for name in self.writer.outputs)
        run = forked(self.writer, self.steps)
        if whole and "exists" in run.refused:
            run = Run()
        faults += [said for said in (run.refused, run.error) if said]
        found = self._contents()
        left = found.keys() - self.after.keys()
        faults += [f"left {name}" for name in sorted(left) if os.path.dirname(name) not in left]
        faults += [f"missing {name}" for name in sorted(self.after.keys() - found.keys())]
        faults += [
            f"other {name}" for name in sorted(found.keys() & self.after.keys()) if found[name] != self.after[name]
        ]
        return [f"killed before step {' and '.join(where)} of {self.count}: {fault}" for fault in faults]

    def _damaged(self) -> list[str]:
        """What is neither as before nor as after, though it has the name of an output."""
        faults = []
        for name in self.writer.outputs:
            new = below(self.after, name)
            if self._contents(name) not in ({}, self.before[name], new):
                faults.append(f"{name} is half-written")
            recover(self.work / name)
            if self.before[name] and self._contents(name) not in (self.before[name], new):
                faults.append(f"the earlier {name} is lost")
        return faults


def below(found: dict[str, str], name: str) -> dict[str, str]:
    """Of the contents of a folder, those of a file or folder in it."""
    inside = {"": found[name]} if found[name] == "folder" else {"": "file", ".": found[name]}
    return inside | {path[len(name) + 1 :]: kind for path, kind in found.items() if path.startswith(f"{name}/")}


# ---- the loop


def write_inputs(place: Path) -> None:
    """What the writers read."""
    write_bert(place / "models")
    for task in "ab":
        lora_adapter(base_model(), task, str(place / "models" / "base")).save_pretrained(
            place / "models" / f"{task}-lora", save_embedding_layers=False
        )
    (place / "work").mkdir()
    merge(place, method="mean", output_dir=place / "merged")
    merge(place, method="esm++", output_dir=place / "routed")
    statistics = calibrate(
        place / "models" / "c", task_texts("c", count=4), base=place / "models" / "base", progress=False
    )
    statistics.save(place / "statistics" / "c.safetensors")


def drawn(count: int, seed: int, kinds: list[str]) -> Counter:
    """How many writers of each kind are killed, of `count`."""
    return Counter(random.Random(seed).choices(kinds, [WRITERS[name].share for name in kinds], k=count))


def try_kills(counts: Mapping[str, int], seed: int, only: int | None = None) -> list[str]:
    """Kill writers, this many of each kind. Returns a line for each fault.

    Args:
        only: the number of the one of each kind that is killed; the others are skipped.
    """
    torch.set_num_threads(1)  # a copy of a process has one thread
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        write_inputs(place)
        steps = Steps(place / "work")
        for name, count in counts.items():
            killer = Killer(name, steps)
            gc.collect()
            gc.freeze()  # what a copy of this process touches is copied
            for number in range(count) if only is None else [only]:
                found = killer.kill(random.Random(f"{seed} {name} {number}"))
                faults += [f"{name} {number}: {fault}" for fault in found]
    return faults
