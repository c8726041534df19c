"""Files of the Hub that were damaged on their way or in the cache are downloaded again, or refused."""

import shutil
from functools import partial
from hashlib import sha1, sha256
from pathlib import Path
from typing import Optional

import pytest
from huggingface_hub import HfApi, constants

from hf_esm import HfEsmError
from hf_esm.checkpoints import downloads, whole_folder
from support.hub import TOKEN, process


pytestmark = pytest.mark.hub

FILES = {"config.json": b'{"model_type": "bert"}', "model.safetensors": bytes(range(256))}


@pytest.fixture(scope="module")
def online(hub, home):
    with process(hub, home) as run:
        yield run


@pytest.fixture
def model(hub, online, tmp_path):
    """The name of a repository that is in no cache yet. Its first file is in Git, its second one beside it."""
    name = f"me/model{len(hub.repos)}"
    for path, content in FILES.items():
        (tmp_path / path).write_bytes(content)
    online(upload, name, tmp_path)
    yield name
    hub.faults.clear()


def upload(name: str, folder: Path) -> None:
    HfApi(token=TOKEN).create_repo(name)
    HfApi(token=TOKEN).upload_folder(repo_id=name, folder_path=folder)


def read(name: str, path: Optional[str] = None) -> dict[str, bytes] | Path:
    """What is read of a model; or where one of its files is in the cache."""
    folder = whole_folder(name, name)
    return (folder / path).resolve() if path else {path: (folder / path).read_bytes() for path in FILES}


def read_offline(name: str) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        return read(name)


def error_of(call) -> str:
    with pytest.raises(HfEsmError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fetches(hub, name: str, path: str) -> int:
    return sum(r.method == "GET" and r.path.startswith(f"/{name}/resolve") and r.path.endswith(path) for r in hub.log)


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize("path", FILES)
def test_a_file_that_arrives_damaged_is_downloaded_once_more(hub, online, model, path):
    hub.faults[f"GET .*{model}/resolve/.*{path}"] = ["flip"]
    assert online(read, model) == FILES
    assert fetches(hub, model, path) == 2


@pytest.mark.parametrize("path", FILES)
def test_a_file_that_always_arrives_damaged_is_refused_and_does_not_stay(hub, online, home, model, path):
    hub.faults[f"GET .*{model}/resolve/.*{path}"] = ["flip", "flip"]
    assert error_of(partial(online, read, model)).startswith(f"{model}: {path} arrived damaged twice: its hash")
    assert fetches(hub, model, path) == 2
    cached = {at.read_bytes() for at in home.glob(f"hub/*{model[3:]}/blobs/*")}
    assert cached & set(FILES.values()) == cached - {b""}
    assert online(read, model) == FILES  # as the error says: try again


@pytest.mark.parametrize("path", FILES)
def test_a_file_that_changed_in_the_cache_is_downloaded_again_and_others_are_not_read(hub, online, model, path):
    flip(online(read, model, path))
    hub.log.clear()
    assert online(read, model) == FILES
    assert {name: fetches(hub, model, name) for name in FILES} == {name: name == path for name in FILES}


def test_a_file_that_changed_in_the_cache_is_refused_offline(online, model):
    flip(online(read, model, "model.safetensors"))
    said = error_of(partial(online, read_offline, model))
    assert said.startswith(f"{model}: model.safetensors in the cache was damaged, and is deleted: the Hub cannot be")
    assert said.endswith("HF_HUB_OFFLINE is set. Unset it.")
    assert online(read, model) == FILES


def test_a_file_is_hashed_once(online, home, model):
    assert online(hashed, model) == sorted([".gitattributes", *FILES])
    assert online(hashed, model) == []
    for note in home.glob(f"hub/*{model[3:]}/hf_esm/*"):
        note.write_text("0 0")
    assert online(hashed, model) == sorted([".gitattributes", *FILES])


def hashed(name: str) -> list[str]:
    """The files that are read for their hash, when a process opens a model twice."""
    names = []

    def noted(path: Path, blob_id: str) -> bool:
        names.append(path.name)
        return inner(path, blob_id)

    with pytest.MonkeyPatch.context() as patch:
        inner = downloads._has_hash
        patch.setattr(downloads, "_checked", set())
        patch.setattr(downloads, "_has_hash", noted)
        read(name)
        read(name)
    return sorted(names)


def test_a_cache_that_may_not_be_written_is_hashed_once_in_a_process(online, home, model):
    online(read, model)
    for folder in home.glob(f"hub/*{model[3:]}/hf_esm"):
        shutil.rmtree(folder)
        folder.write_text("")  # in the place of the folder, which then cannot be made
    assert online(hashed, model) == sorted([".gitattributes", *FILES])


def test_the_hash_by_which_git_names_a_file_is_that_of_its_pointer_in_lfs(tmp_path):
    """Also where the cache has no links, whose target is named by the hash."""
    path, content = tmp_path / "model.safetensors", b"weights"
    path.write_bytes(content)
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content).hexdigest()}\nsize 7\n".encode()
    )
    for stored in (pointer, content):
        assert downloads._has_hash(path, sha1(b"blob %d\0" % len(stored) + stored).hexdigest())
    assert not downloads._has_hash(path, sha1(b"blob 7\0Weights").hexdigest())
