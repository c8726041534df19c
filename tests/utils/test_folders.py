"""Files and folders that appear when they are complete, whatever happens to their writers."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

from hf_esm import HfEsmError
from hf_esm.planning import check_replaceable
from hf_esm.utils import (
    Work,
    add_folders,
    atomic_file,
    end_published,
    new_folder,
    publish_folder,
    recover,
    staging_folder,
)


def test_a_file_gets_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "scores.json"
    with atomic_file(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    with atomic_file(path) as partial:
        partial.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]


def test_after_an_error_the_earlier_file_stays_and_nothing_is_next_to_it(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("first")
    with pytest.raises(RuntimeError), atomic_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_temporary_path_has_the_suffix_that_its_writer_needs(tmp_path):
    with atomic_file(tmp_path / "a.json") as json, atomic_file(tmp_path / "statistics.st", ".safetensors") as tensors:
        assert (json.suffix, tensors.suffix) == (".json", ".safetensors")
        json.touch()
        tensors.touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "statistics.st"]


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[tuple[bool, int]]:
    return {(path.is_dir(), path.stat().st_mode & 0o777) for path in [folder, *folder.rglob("*")]}


def test_modes_follow_the_umask_whatever_the_writer_chose(tmp_path, umask):
    with staging_folder(tmp_path / "out") as staging:
        (staging / "heads").mkdir(mode=0o700)
        for path in (staging / "model.safetensors", staging / "heads" / "head.safetensors"):
            path.touch(mode=0o600)
        publish_folder(staging, tmp_path / "out")
    assert modes(tmp_path / "out") == {(True, 0o777 & ~umask), (False, 0o666 & ~umask)}
    with atomic_file(tmp_path / "new" / "statistics.safetensors") as partial:
        partial.unlink()
        partial.touch(mode=0o600)
    assert modes(tmp_path / "new") == {(True, 0o777 & ~umask), (False, 0o666 & ~umask)}


def test_of_two_writers_of_a_name_the_later_is_refused(tmp_path):
    with staging_folder(tmp_path / "out") as staging, staging_folder(tmp_path / "out2"):
        with (
            pytest.raises(HfEsmError, match="out is being written by another process"),
            staging_folder(tmp_path / "out"),
        ):
            pass
        assert staging.is_dir()
        recover(tmp_path / "out")  # takes nothing from a living writer
        assert staging.is_dir()
    with staging_folder(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


WRITER = """
import sys
from functools import partial
from pathlib import Path
from hf_esm.utils import atomic_file, staging_folder
out = Path(sys.argv[1])
with staging_folder(out) as staging, atomic_file(out.parent / "statistics.safetensors") as partial:
    (staging / "half").write_text("half")
    partial.write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_writer_left_is_removed_by_the_next_and_its_lock_is_free(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "out")]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "ready\n"
    with pytest.raises(HfEsmError, match="another process"), staging_folder(tmp_path / "out"):
        pass
    with atomic_file(tmp_path / "statistics.safetensors") as partial:
        partial.write_text("whole")
        assert len(list(tmp_path.glob(".statistics.partial-*"))) == 2  # that of a living writer stays
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(list(tmp_path.iterdir())) == 4
    with staging_folder(tmp_path / "out") as staging, atomic_file(tmp_path / "statistics.safetensors") as partial:
        partial.write_text("new")
        publish_folder(staging, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "statistics.safetensors"]
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def earlier(tmp_path):
    """A folder that a merge wrote."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "merge_recipe.yaml").write_text("earlier")
    return tmp_path / "out"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", ["out", "folder"])
def test_an_earlier_folder_is_there_when_it_could_not_be_replaced(earlier, monkeypatch, error, failing):
    rename, failed = Path.rename, []

    def fail_once(path, target):
        if Path(target).name == failing and not failed:
            failed.append(target)
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(error), staging_folder(earlier) as staging:
        publish_folder(staging, earlier, overwrite=True)
    assert failed and list(earlier.parent.iterdir()) == [earlier]
    assert (earlier / "merge_recipe.yaml").read_text() == "earlier"
    with staging_folder(earlier) as staging:
        publish_folder(staging, earlier, overwrite=True)
    assert list(earlier.parent.iterdir()) == [earlier] and not list(earlier.iterdir())


def test_a_folder_is_given_back_whose_replacement_was_killed(earlier, tmp_path):
    (tmp_path / ".out.old-x").mkdir()
    earlier.rename(tmp_path / ".out.old-x" / "folder")
    (tmp_path / ".out.incomplete-x").mkdir()
    (tmp_path / ".other.incomplete-x").mkdir()
    with pytest.raises(HfEsmError, match="exists"):
        check_replaceable(earlier, overwrite=False)
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".other.incomplete-x"}
    assert (earlier / "merge_recipe.yaml").read_text() == "earlier"


def test_the_lock_of_a_writer_that_was_killed_after_all_is_removed_where_the_folder_is_refused(earlier, tmp_path):
    for refuse in (new_folder, partial(check_replaceable, overwrite=False)):
        (tmp_path / ".out.lock").touch()
        with pytest.raises(HfEsmError, match="exists"):
            refuse(earlier)
        assert list(tmp_path.iterdir()) == [earlier]


@pytest.mark.parametrize("closed", ["out", ""])
def test_a_folder_that_must_not_be_changed_is_refused_before_the_work(earlier, monkeypatch, closed):
    place = earlier if closed else earlier.parent
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place)
    with pytest.raises(HfEsmError, match=f"no permission to write to {place}. Choose another"):
        check_replaceable(earlier, overwrite=True)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_place_that_must_not_be_written_to_is_named(tmp_path, monkeypatch, number):
    def fail(*args, **kwargs):
        raise OSError(number, "no", str(tmp_path / ".out.lock"))

    monkeypatch.setattr(FileLock, "acquire", fail)
    monkeypatch.chdir(tmp_path)
    for output in (tmp_path / "out", Path("out")):
        with pytest.raises(HfEsmError, match=f"no permission to write to {tmp_path}. Choose"), staging_folder(output):
            pass


@pytest.fixture
def three(tmp_path):
    """A folder that has `mine`, and one with the folders `a` and `b` to be added to it."""
    for path in ("out/mine", "new/a", "new/b"):
        (tmp_path / path).mkdir(parents=True)
    return tmp_path / "out"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fail_from(monkeypatch, last, error):
    """Let renames of this name fail."""
    rename = Path.rename

    def fail(path, target):
        if (path.parent.name.startswith(".out.added-"), path.name) == (True, last):
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)


def test_folders_are_added_beside_others_all_or_none(three, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"):
        fail_from(patch, "b", OSError("no"))
        add_folders(tmp_path / "new", three)
    assert names(tmp_path) == ["out"] and names(three) == ["mine"]
    for name in "ab":
        (tmp_path / "new" / name).mkdir(parents=True)
    add_folders(tmp_path / "new", three)
    assert names(tmp_path) == ["out"] and names(three) == ["a", "b", "mine"]


def test_after_a_kill_the_next_writer_adds_the_other_folders(three, tmp_path):
    (tmp_path / "new" / "a").rename(three / "a")
    (tmp_path / "new").rename(tmp_path / ".out.added-x")
    with pytest.raises(HfEsmError, match="exists"):
        check_replaceable(three, overwrite=False)
    assert names(tmp_path) == ["out"] and names(three) == ["a", "b", "mine"]


@pytest.mark.parametrize("killed", ["before", "after", "inside", "at the end"])
def test_work_is_removed_whose_output_got_its_name_before_a_kill(tmp_path, killed):
    work = Work(str(tmp_path / "resume_dir"), {"the samples": 1})
    with staging_folder(tmp_path / "out") as staging:
        (work.begin(staging) / "merged").touch()
        work.publishing(staging)
        if killed == "before":
            (tmp_path / "out").mkdir()  # by another merge
        else:
            publish_folder(staging, tmp_path / "out")
    work.release()
    if killed == "inside":
        work.folder.rename(tmp_path / "resume_dir" / "merge-in-progress.done")
    if killed == "at the end":
        shutil.rmtree(work.folder)
    end_published(tmp_path / "resume_dir", tmp_path / "out")
    assert names(tmp_path) == (["out", "resume_dir"] if killed == "before" else ["out"])
    if killed == "before":
        assert (work.folder / "merged").exists()
    end_published(tmp_path / "none", tmp_path / "out")


def test_work_of_a_living_merge_stays(tmp_path):
    work = Work(str(tmp_path / "resume_dir"), {"the samples": 1})
    with staging_folder(tmp_path / "out") as staging:
        work.begin(staging)
        work.publishing(staging)
        publish_folder(staging, tmp_path / "out")
    end_published(tmp_path / "resume_dir", tmp_path / "out")
    assert work.folder.is_dir()
    work.end()
    assert names(tmp_path) == ["out"]
