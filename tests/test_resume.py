"""Merges that were interrupted and go on; memory that is bounded."""

import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest
import torch
from routed_toys import task_texts
from safetensors.torch import load_file
from tiny import snapshot

from hf_esm import EssentialMerge, HfEsmError, merge_models
from hf_esm.passes import _side_by_side


def given(models, **changes):
    calibration = {task: task_texts(task, count=8) for task in "abc"}
    experts = {task: models / task for task in "abc"}
    return {"base": models / "base", "experts": experts, "calibration": calibration, "progress": False, **changes}


@pytest.fixture(scope="module")
def whole(models):
    return load_file(merge_models(**given(models), output_dir=models / "whole").output_dir / "model.safetensors")


class Stopped(Exception):
    pass


def stop_at(stage, count):
    def callback(description, done, total):
        if description == stage and done > count:
            raise Stopped

    return callback


STOPS = {"calibrating": ("Calibrating", 1), "merging": ("Merging", 9), "writing": ("Writing", 4)}


@pytest.mark.parametrize(("stage", "count"), STOPS.values(), ids=STOPS)
def test_an_interrupted_merge_goes_on(models, whole, tmp_path, monkeypatch, stage, count):
    options = {"output_dir": tmp_path / "out", "resume_dir": str(tmp_path / "work")}
    with pytest.raises(Stopped):
        merge_models(**given(models), **options, callback=stop_at(stage, count))
    assert {path.name for path in tmp_path.iterdir()} == {"work"}  # nothing under the output's name
    calibrated, merged = [], []
    collect, merge = __import__("hf_esm.calibrating").calibrating.calibrate_checkpoint, EssentialMerge.merge
    monkeypatch.setattr(
        "hf_esm.calibrating.calibrate_checkpoint", lambda *args: calibrated.append(args[-1]) or collect(*args)
    )
    monkeypatch.setattr(EssentialMerge, "merge", lambda self, stack: merged.append(stack.name) or merge(self, stack))
    merge_models(**given(models), **options)
    assert calibrated == (["c"] if stage == "Calibrating" else [])
    assert len(merged) == {"Calibrating": 37, "Writing": 0}.get(stage, len(merged))
    if stage == "Merging":
        assert 37 - 9 - 4 <= len(merged) <= 37 - 9 + 1
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_killed_merge_goes_on(models, whole, tmp_path):
    """The process is gone in the middle of a line of the journal."""
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_resume import given
from hf_esm import merge_models
models = Path({str(models)!r})
def die(description, done, total):
    if description == "Merging" and done == 12:
        os._exit(9)
folder = Path({str(tmp_path)!r})
merge_models(**given(models), output_dir=folder / "out", resume_dir=str(folder / "work"), callback=die)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert not (tmp_path / "out").exists()
    journal = tmp_path / "work" / "updates-0.journal"
    assert journal.read_text()
    with journal.open("a") as file:
        file.write('{"half a')
    merge_models(**given(models), output_dir=tmp_path / "out", resume_dir=str(tmp_path / "work"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


CHANGES = {
    "another method": {"method": "tsv-m"},
    "another setting": {"method": {"name": "esm", "gamma": 0.1}},
    "other samples": {"calibration": {task: task_texts(task, 1, 8) for task in "abc"}},
    "fewer experts": {"experts": ["a", "b"], "calibration": {task: task_texts(task, count=8) for task in "ab"}},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_the_work_of_another_merge_is_refused(models, tmp_path, changes):
    with pytest.raises(Stopped):
        merge_models(**given(models), resume_dir=str(tmp_path / "work"), callback=stop_at("Merging", 5))
    before = snapshot(tmp_path)
    if "experts" in changes:
        changes = {**changes, "experts": {task: models / task for task in changes["experts"]}}
    with pytest.raises(HfEsmError, match="work of another merge"):
        merge_models(**given(models, **changes), resume_dir=str(tmp_path / "work"))
    assert snapshot(tmp_path) == before


def test_a_folder_with_something_else_in_it_is_refused(models, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(HfEsmError, match="or something else"):
        merge_models(**given(models), resume_dir=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_memory_bounds_what_is_merged_side_by_side():
    """Three experts: a unit of `n` elements takes `4 n (2 · 3 + 6)` bytes."""
    running, most = set(), []

    def merge(unit, found):
        assert found == unit
        running.add(unit[0])
        most.append(len(running))
        torch.randn(200, 200).sum()
        running.discard(unit[0])
        return {unit[0]: None}

    units = [[str(i)] for i in range(20)]
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        one = 4 * 1000 * 12
        found = list(_side_by_side(units, lambda unit: 1000, list, merge, iter, 3, one))
    finally:
        torch.set_num_threads(threads)
    assert max(most) == 1
    assert [next(iter(part)) for part in found] == [unit[0] for unit in units]


@pytest.mark.parametrize(("room", "ahead"), [(0, True), (4 * 5_000_000 * (12 + 3), True), (4 * 5_000_000 * 14, False)])
def test_the_next_large_weight_is_read_while_one_is_merged_if_there_is_room(room, ahead):
    units, begun, during = [["a"], ["b"], ["c"]], {name: Event() for name in "abc"}, []

    def read(unit):
        begun[unit[0]].set()
        return unit

    def merge(unit, found):
        assert found == unit
        following = {"a": "b", "b": "c"}.get(unit[0])
        during.append(following is not None and begun[following].wait(10 if ahead else 0.2))
        return {unit[0]: None}

    found = list(_side_by_side(units, lambda unit: 5_000_000, read, merge, iter, 3, room))
    assert [next(iter(part)) for part in found] == ["a", "b", "c"]
    assert during == [ahead, ahead, False]


@pytest.mark.parametrize(("value", "message"), [("1KB", "needs .*Give at least that"), ("much", "a size such as")])
def test_too_little_memory_is_said_before_any_work(models, tmp_path, value, message):
    with pytest.raises(HfEsmError, match=message):
        merge_models(**given(models), max_memory=value, output_dir=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    merge_models(**given(models), max_memory="1GB", output_dir=tmp_path / "out")
