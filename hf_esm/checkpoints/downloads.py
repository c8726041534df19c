"""What the Hub client has in its cache: hashed at its first use, and downloaded again if it is damaged."""

import hashlib
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Optional

from huggingface_hub import RepoFile, get_cached_repo_tree, hf_hub_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from ..errors import DamagedFileError
from ..utils import plain_hub_errors


logger = logging.getLogger(__name__)

# Folder beside the blobs of a repository in the cache, with a file for each hash that was found right: it holds the
# size and the time of change of the file that has the hash.
_NOTES = "hf_esm"

_THREADS = 8  # as many as the client downloads with

# What was hashed by this process, by path, size and time of change: where the cache may not be written.
_checked: set[tuple[str, str]] = set()


def check_downloads(title: str, repo_id: str, folder: Path, token: Optional[str | bool], names: Iterable[str]) -> None:
    """Compare files with the hashes that the Hub names. A file that has another hash is dropped, and downloaded again.

    A file is hashed once, and again when it changed. Without a listing of the commit in the cache (one that an older
    client filled, offline), nothing is compared.

    Args:
        title: what messages begin with: the model, as the user named it.
        repo_id: its id on the Hub.
        folder: the snapshot of one commit in the cache.
        token: access token for the Hub.
        names: paths of the files in it.

    Raises:
        DamagedFileError: if a file has another hash once more after the second download.
        HubError: if a damaged file cannot be downloaded again.
    """
    cache = folder.parents[2]
    try:
        tree = get_cached_repo_tree(repo_id, revision=folder.name, cache_dir=cache)
    except CachedRepoTreeNotFoundError:
        return
    wanted = set(names)
    files = [file for file in tree if file.path in wanted]
    with ThreadPoolExecutor(_THREADS) as pool:
        damaged = [file for file, intact in zip(files, pool.map(lambda f: _is_intact(folder, f), files)) if not intact]
    for file in damaged:
        path = folder / file.path
        logger.warning("%s: %s in the cache is damaged, and is downloaded again.", title, file.path)
        _blob(path).unlink(missing_ok=True)
        with plain_hub_errors(f"{title}: {file.path} in the cache was damaged, and is deleted"):
            try:
                hf_hub_download(
                    repo_id, file.path, revision=folder.name, token=token, cache_dir=cache, force_download=True
                )
            except ValueError as error:  # around what the Hub said
                raise error.__cause__ or error from None
        if not _is_intact(folder, file):
            _blob(path).unlink(missing_ok=True)
            raise DamagedFileError(
                f"{title}: {file.path} arrived damaged twice: its hash is not the one that the Hub names. Look for a "
                "fault of the network or the disk, and try again."
            )


def _is_intact(folder: Path, file: RepoFile) -> bool:
    """Whether a file of a snapshot has the hash that the Hub names."""
    path = folder / file.path
    note = folder.parents[1] / _NOTES / file.blob_id
    try:
        status = path.stat()
        state = f"{status.st_size} {status.st_mtime_ns}"
        known = (str(path.resolve()), state)
        if known in _checked or _read(note) == state:
            return True
        intact = _has_hash(path, file.blob_id)
    except FileNotFoundError:  # another process has just deleted it
        return False
    if not intact:
        return False
    _checked.add(known)
    with suppress(OSError):
        note.parent.mkdir(exist_ok=True)
        note.write_text(state)
    return True


def _read(note: Path) -> str:
    try:
        return note.read_bytes().decode(errors="replace")
    except OSError:  # it is not there, or another user's
        return ""


def _has_hash(path: Path, blob_id: str) -> bool:
    """Return whether a file has the hash by which the Hub names it: Git's, of the file or, where the file is in LFS,
    of the pointer with its SHA-256. The client's listing does not say which.
    """
    with path.open("rb") as file:
        digest, size = sha_fileobj(file).hex(), file.tell()
        if _blob(path).name == digest:  # the client names what is in LFS by the hash that the Hub told it
            return True
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n"
        if git_hash(pointer.encode()) == blob_id:
            return True
        file.seek(0)
        found = hashlib.sha1(b"blob %d\0" % size)
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest() == blob_id


def _blob(path: Path) -> Path:
    """Return what a file of a snapshot links to; the file itself where the system has no links."""
    return Path(os.path.abspath(path.parent / os.readlink(path))) if path.is_symlink() else path
