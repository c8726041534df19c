"""Folders and files that get their name only when they are complete."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from ..errors import DiskFullError, HfEsmError
from .names import check_path


@contextlib.contextmanager
def atomic_file(path: Path, suffix: Optional[str] = None) -> Iterator[Path]:
    """A temporary path next to `path` to write to; the file gets its name when the block ends well.

    Until then an earlier file of that name stays. After an error, the temporary file is removed. Missing parent
    folders are made.

    Args:
        suffix: of the temporary path, for a writer that accepts no other; by default that of `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial{suffix or path.suffix}")
    try:
        with naming_full_disk(path):
            yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """An empty folder next to `output` to write to, removed in the end unless `publish_folder` has renamed it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.incomplete-", dir=output.parent))
    try:
        with naming_full_disk(output):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Name the file or folder that is written inside the block, if the disk is full; the system's error names none.

    Raises:
        DiskFullError: if the disk, or the user's share of it, is full.
    """
    try:
        yield
    except Exception as error:  # safetensors has an error of its own
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
        if isinstance(error, HfEsmError) or not full:
            raise
        reason = "No space left on device"
        raise DiskFullError(f"{path} cannot be written: {reason}. Free some, or choose another place.") from None


def publish_folder(folder: Path, output: Path, overwrite: bool = False) -> None:
    """Give a complete folder its name, in one step. An earlier folder is removed after that.

    Raises:
        HfEsmError: if `output` exists and is not to be overwritten.
    """
    folder.chmod(0o777 & ~_umask())
    if output.exists():
        if not overwrite:
            raise HfEsmError(f"{output} exists. Choose another `output_dir`, or pass `overwrite=True`.")
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent)) / "folder"
        output.rename(old)
        folder.rename(output)
        shutil.rmtree(old.parent)
    else:
        folder.rename(output)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def new_folder(folder: str | os.PathLike) -> Path:
    """The path of a folder for an adapter.

    Raises:
        HfEsmError: if the folder exists.
    """
    check_path(folder, "folder")
    folder = Path(folder).expanduser()
    if folder.exists():
        raise HfEsmError(f"{folder} exists. Choose another folder for the adapter.")
    return folder
