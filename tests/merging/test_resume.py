"""Merges that were interrupted and go on; memory that is bounded."""

import json
import re
from functools import partial
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Event
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hf_esm import EssentialMerge, HfEsmError, calibrate, merge_models
from hf_esm.merging import expert_statistics
from hf_esm.merging.jobs import Job, run_jobs
from hf_esm.merging.weights import UnitMerger, Worker
from hf_esm.utils.resume import WORK_FOLDER, Work
from hf_esm.utils.sizes import bytes_of
from support.processes import run_script
from support.routed_toys import task_texts
from support.tiny import forbid_calibration, snapshot


pytestmark = pytest.mark.slow


EMBEDDINGS = "embeddings.word_embeddings.weight"


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


# Of the 37 shared weights, the toys' experts change the twelve linear maps.
STOPS = {"calibrating": ("Calibrating", 1), "merging": ("Merging", 6), "writing": ("Writing", 4)}


@pytest.mark.parametrize(("stage", "count"), STOPS.values(), ids=STOPS)
def test_an_interrupted_merge_goes_on(models, whole, tmp_path, monkeypatch, stage, count):
    options = {"output_dir": tmp_path / "out", "resume_dir": str(tmp_path / "work")}
    with pytest.raises(Stopped):
        merge_models(**given(models), **options, callback=stop_at(stage, count))
    assert {path.name for path in tmp_path.iterdir()} == {"work"}  # nothing under the output's name
    calibrated, merged = [], []
    collect, merge = expert_statistics.calibrate_checkpoint, EssentialMerge.merge
    monkeypatch.setattr(
        "hf_esm.merging.expert_statistics.calibrate_checkpoint",
        lambda *args, **named: calibrated.append(args[5]) or collect(*args, **named),
    )
    monkeypatch.setattr(EssentialMerge, "merge", lambda self, stack: merged.append(stack.name) or merge(self, stack))
    merge_models(**given(models), **options)
    assert calibrated == (["c"] if stage == "Calibrating" else [])
    assert len(merged) == {"Calibrating": 12, "Writing": 0}.get(stage, len(merged))
    if stage == "Merging":
        assert 12 - 6 - 4 <= len(merged) <= 12 - 6 + 1
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_killed_merge_goes_on(models, whole, tmp_path):
    """The process is gone in the middle of a line of the journal."""
    script = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from pathlib import Path
from test_resume import given
from hf_esm import merge_models
models = Path({str(models)!r})
def die(description, done, total):
    if description == "Merging" and done == 6:
        os._exit(9)
folder = Path({str(tmp_path)!r})
merge_models(**given(models), output_dir=folder / "out", resume_dir=str(folder / "work"), callback=die)
"""
    ran = run_script(script)
    assert ran.returncode == 9, ran.output
    assert not (tmp_path / "out").exists()
    journal = tmp_path / "work" / WORK_FOLDER / "updates-0.journal"
    assert journal.read_text()
    with journal.open("a") as file:
        file.write('{"half a')
    merge_models(**given(models), output_dir=tmp_path / "out", resume_dir=str(tmp_path / "work"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


CHANGES = {
    "the method or its settings": {"method": {"name": "esm", "gamma": 0.1}},
    "the samples or statistics and the method or its settings": {"method": "tsv-m", "calibration": None},
    "the samples or statistics": {"calibration": {task: task_texts(task, 1, 8) for task in "abc"}},
    "`batch_size`": {"batch_size": 3},
    "the experts and the samples or statistics": {
        "experts": ["a", "b"],
        "calibration": {task: task_texts(task, count=8) for task in "ab"},
    },
}


@pytest.mark.parametrize(("what", "changes"), CHANGES.items(), ids=CHANGES)
def test_the_work_of_another_merge_is_refused(models, tmp_path, what, changes):
    with pytest.raises(Stopped):
        merge_models(**given(models), resume_dir=str(tmp_path / "work"), callback=stop_at("Merging", 5))
    before = snapshot(tmp_path)
    if "experts" in changes:
        changes = {**changes, "experts": {task: models / task for task in changes["experts"]}}
    with pytest.raises(HfEsmError, match=f"work of another merge, which differs in {what}\\."):
        merge_models(**given(models, **changes), resume_dir=str(tmp_path / "work"))
    assert snapshot(tmp_path) == before


def test_statistics_that_were_collected_anew_are_noticed(models, tmp_path):
    """At the same place, of as many samples."""
    place = {task: str(tmp_path / "statistics" / f"{task}.safetensors") for task in "abc"}
    options = {"calibration": place, "resume_dir": str(tmp_path / "work")}
    for seed in (0, 1):
        for task in "abc":
            calibrate(models / task, task_texts(task, seed, 8), progress=False).save(place[task])
        if seed == 0:
            with pytest.raises(Stopped):
                merge_models(**given(models, **options), callback=stop_at("Merging", 5))
    with pytest.raises(HfEsmError, match="work of another merge"):
        merge_models(**given(models, **options))


def test_what_else_stands_in_the_folder_stays(models, whole, tmp_path):
    """Notes, the statistics that are kept, even the output."""
    (tmp_path / "notes.txt").write_text("mine")
    options = {"resume_dir": str(tmp_path), "statistics_dir": str(tmp_path), "output_dir": tmp_path / "out"}
    with pytest.raises(Stopped):
        merge_models(**given(models), **options, callback=stop_at("Merging", 5))
    merge_models(**given(models), **options)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "out", *(f"{t}.safetensors" for t in "abc")}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(found[name], tensor, atol=1e-5) for name, tensor in whole.items())
    again = merge_models(**given(models, calibration=tmp_path))
    assert torch.equal(again.load_model().state_dict()[EMBEDDINGS], found[EMBEDDINGS])


def test_nothing_is_lost_where_the_output_cannot_get_its_name(models, whole, tmp_path, monkeypatch):
    options = {"output_dir": tmp_path / "out", "resume_dir": str(tmp_path / "work")}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"):
        patch.setattr("hf_esm.merging.run.publish_folder", lambda *args: (_ for _ in ()).throw(OSError("no")))
        merge_models(**given(models), **options)
    merged = []
    patched = EssentialMerge.merge
    monkeypatch.setattr(EssentialMerge, "merge", lambda self, stack: merged.append(stack) or patched(self, stack))
    merge_models(**given(models), **options)
    assert not merged
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_the_work_of_a_merge_that_was_killed_after_all_is_removed_by_the_next_run(models, tmp_path, monkeypatch):
    options = {"output_dir": tmp_path / "out", "resume_dir": str(tmp_path / "work")}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Work, "end", lambda self: (_ for _ in ()).throw(Stopped))
        merge_models(**given(models, method="mean", calibration=None), **options)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "work"}
    with pytest.raises(HfEsmError, match="out exists"):
        merge_models(**given(models, method="mean", calibration=None), **options)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("damage", ["gone", "cut", "a flipped bit", "half a line, twice"])
def test_merged_weights_that_are_not_there_are_not_believed_in(models, whole, tmp_path, damage):
    options = {"output_dir": tmp_path / "out", "resume_dir": str(tmp_path / "work")}
    with pytest.raises(Stopped):
        merge_models(**given(models), **options, callback=stop_at("Merging", 4))
    updates = tmp_path / "work" / WORK_FOLDER / "updates-0.safetensors"
    if damage == "gone":
        updates.unlink()
    elif damage == "a flipped bit":
        name = next(iter(json.loads(updates.with_suffix(".journal").read_text().splitlines()[0])))
        header = int.from_bytes(updates.read_bytes()[:8], "little")
        content = bytearray(updates.read_bytes())
        start, _ = json.loads(content[8 : 8 + header])[name]["data_offsets"]
        content[8 + header + start] ^= 1
        updates.write_bytes(content)
        with pytest.raises(HfEsmError, match="was changed after the merge was interrupted"):
            merge_models(**given(models), **options)
        return
    elif damage == "cut":
        updates.write_bytes(updates.read_bytes()[:-10])
        with pytest.raises(HfEsmError, match="was changed after the merge was interrupted"):
            merge_models(**given(models), **options)
        return
    else:
        for _ in range(2):
            with updates.with_suffix(".journal").open("a") as file:
                file.write('{"half a')
            with pytest.raises(Stopped):
                merge_models(**given(models), **options, callback=stop_at("Merging", 1))
    merge_models(**given(models), **options)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_two_merges_do_not_share_their_work(models, tmp_path):
    with pytest.raises(Stopped):
        merge_models(**given(models), resume_dir=str(tmp_path / "work"), callback=stop_at("Merging", 5))
    (tmp_path / ".out.incomplete-x").mkdir()
    other = Work(str(tmp_path / "work"), {})
    other.key = json.loads((other.folder / "merge.json").read_text())
    other.begin(tmp_path / ".out.incomplete-x")
    try:
        with pytest.raises(HfEsmError, match="in use by another merge"):
            merge_models(**given(models), resume_dir=str(tmp_path / "work"))
    finally:
        other.release()
    merge_models(**given(models), resume_dir=str(tmp_path / "work"), output_dir=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}  # nor what the killed one was writing


def test_a_merge_that_was_killed_before_its_first_file_can_be_resumed(models, tmp_path):
    (tmp_path / "work" / WORK_FOLDER).mkdir(parents=True)
    (tmp_path / "work" / WORK_FOLDER / ".merge.partial-host-1-0a0a0a0a.json").write_text("{")
    merge_models(**given(models), resume_dir=str(tmp_path / "work"), output_dir=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_memory_bounds_what_is_merged_side_by_side():
    met, pair = [], Barrier(2)

    def merge(name):
        try:
            pair.wait(0.1)  # for another one that is being merged
            met.append(name)
        except BrokenBarrierError:
            pair.reset()
        return name

    jobs = [Job(partial(str, i), merge, input_bytes=10, total_bytes=100, alone=False) for i in range(4)]
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = list(run_jobs(jobs, max_memory=100))
        assert not met
        list(run_jobs(jobs, max_memory=200))
        assert met
    finally:
        torch.set_num_threads(threads)
    assert found == ["0", "1", "2", "3"]


@pytest.mark.parametrize(("room", "ahead"), [(None, True), (110, True), (109, False)])
def test_the_next_weight_is_read_while_a_large_one_is_merged_if_there_is_room(room, ahead):
    begun, during = {name: Event() for name in "abc"}, []

    def read(name):
        begun[name].set()
        return name

    def merge(name):
        following = {"a": "b", "b": "c"}.get(name)
        during.append(following is not None and begun[following].wait(10 if ahead else 0.2))
        return name

    jobs = [Job(partial(read, name), merge, input_bytes=10, total_bytes=100, alone=True) for name in "abc"]
    assert list(run_jobs(jobs, room)) == ["a", "b", "c"]
    assert during == [ahead, ahead, False]


@pytest.mark.parametrize(
    ("elements", "device", "alone"), [(5_000_000, None, True), (1000, None, False), (1000, "cuda", True)]
)
def test_large_weights_and_those_on_a_gpu_are_merged_by_themselves(elements, device, alone):
    """Three experts: a weight of `n` elements takes `4 n (2 · 3 + 6)` bytes."""
    base = SimpleNamespace(shape=lambda name: (elements, 1), skeleton=torch.nn.Module())
    plan = SimpleNamespace(base=base, experts=dict.fromkeys("abc"))
    worker = Worker(device=device and torch.device(device))
    job = UnitMerger(plan, {}, {}, worker).job(["weight"])
    assert job.alone == alone
    assert (job.input_bytes, job.total_bytes) == (4 * 3 * elements, 4 * elements * 12)


def test_work_that_is_on_the_disk_already_wants_no_room(models, tmp_path, monkeypatch):
    options = {"output_dir": tmp_path / "out", "resume_dir": str(tmp_path / "work")}
    with pytest.raises(Stopped):
        merge_models(**given(models), **options, callback=stop_at("Merging", 9))
    taken = Work(str(tmp_path / "work"), {}).nbytes
    assert taken > 10_000
    wanted = re.search("needs ([0-9.]+ .?B)", refused_for_room(models, options, monkeypatch, 1))[1]
    fresh = {**options, "resume_dir": str(tmp_path / "other")}
    more = re.search("needs ([0-9.]+ .?B)", refused_for_room(models, fresh, monkeypatch, 1))[1]
    assert bytes_of(more, "") - bytes_of(wanted, "") == pytest.approx(taken, rel=0.2)


def refused_for_room(models, options, monkeypatch, free):
    with monkeypatch.context() as patch, pytest.raises(HfEsmError, match="on this disk") as caught:
        patch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=free))
        merge_models(**given(models), **options)
    return str(caught.value)


@pytest.mark.parametrize("what", ["output_dir", "statistics_dir", "resume_dir"])
@pytest.mark.parametrize("place", ["file/below", "file", 5])
def test_folders_that_cannot_be_are_refused_before_any_work(models, tmp_path, monkeypatch, what, place):
    forbid_calibration(monkeypatch)
    (tmp_path / "file").touch()
    place = tmp_path / place if isinstance(place, str) else place
    with pytest.raises(HfEsmError, match=f"`{what}` must be a text or a path|is a file. Choose|file exists. Choose"):
        merge_models(**given(models, **{what: place}))


@pytest.mark.parametrize(("value", "message"), [("1KB", "needs .*Give at least that"), ("much", "a size such as")])
def test_too_little_memory_is_said_before_any_work(models, tmp_path, value, message):
    with pytest.raises(HfEsmError, match=message):
        merge_models(**given(models), max_memory=value, output_dir=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    merge_models(**given(models), max_memory="1GB", output_dir=tmp_path / "out")
