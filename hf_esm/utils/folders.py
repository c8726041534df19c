"""Folders and files that get their name only when they are complete."""

import contextlib
import errno
import glob
import os
import platform
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import psutil
from filelock import FileLock, Timeout

from ..errors import DiskFullError, HfEsmError
from .names import check_path


# The folder inside `.NAME.old-…` that a new one replaces.
_REPLACED = "folder"


@contextlib.contextmanager
def atomic_file(path: Path, suffix: Optional[str] = None) -> Iterator[Path]:
    """A temporary path next to `path` to write to; the file gets its name when the block ends well.

    Until then an earlier file of that name stays. After an error, the temporary file is removed; after a kill, the
    next writer of that name removes it. Missing parent folders are made.

    Args:
        suffix: of the temporary path, for a writer that accepts no other; by default that of `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    host = re.sub(r"\W", "", platform.node())
    for left in path.parent.glob(f".{glob.escape(path.stem)}.partial-{host}-*"):
        if not psutil.pid_exists(int(left.name.split("-")[-2])):
            left.unlink(missing_ok=True)
    name = f".{path.stem}.partial-{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}{suffix or path.suffix}"
    partial = path.with_name(name)
    try:
        with naming_full_disk(path):
            partial.touch()
            mode = partial.stat().st_mode  # as the umask says; some writers take no notice of it
            yield partial
            partial.chmod(mode & 0o777)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def only_user(lock: Path, message: str) -> Iterator[None]:
    """Hold the lock file `lock`, which goes with the process, and is removed in the end.

    Raises:
        HfEsmError: with this message, if another one holds it; if there is no permission to write there.
    """
    held = FileLock(lock, thread_local=False)
    try:
        held.acquire(blocking=False)
    except Timeout:
        raise HfEsmError(message) from None
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        place = lock.parent.absolute()
        raise HfEsmError(f"There is no permission to write to {place}. Choose another place.") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            lock.unlink(missing_ok=True)
        held.release()


def only_writer(output: Path) -> contextlib.AbstractContextManager[None]:
    """Keep other writers of the folder `output` out.

    Raises:
        HfEsmError: if there is another one.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    message = f"{output} is being written by another process. Wait until that has ended, or choose another name."
    return only_user(_lock(output), message)


def _lock(output: Path) -> Path:
    return output.parent / f".{output.name}.lock"  # also of the current folder, which has no name


@contextlib.contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """An empty folder next to `output` to write to, removed in the end unless `publish_folder` has renamed it.

    Until then, no other process can write to `output`. What writers that were killed left next to it is removed.

    Raises:
        HfEsmError: if another process writes to `output`.
    """
    with only_writer(output):
        _sweep(output)
        folder = output.parent / f".{output.name}.incomplete-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        try:
            with naming_full_disk(output):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def recover(output: Path) -> None:
    """Clean up after a writer of `output` that was killed: remove what it left; give back what it was replacing; add
    the folders that were whole and not all in `output`.
    """
    if _lock(output).exists() or any(_leftovers(output)):
        with contextlib.suppress(HfEsmError), only_writer(output):
            _sweep(output)


def _leftovers(output: Path) -> Iterator[Path]:
    for kind in ("old", "incomplete", "added"):
        yield from output.parent.glob(f".{glob.escape(output.name)}.{kind}-*")


def _sweep(output: Path) -> None:
    for left in list(_leftovers(output)):
        if (left / _REPLACED).is_dir() and not output.exists():  # killed between the two steps of `publish_folder`
            (left / _REPLACED).rename(output)
        if left.name.startswith(f".{output.name}.added-") and output.is_dir():  # killed inside `add_folders`
            _move(left, output)
        shutil.rmtree(left, ignore_errors=True)


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
    """Give a complete folder its name. Access to its files is as the umask says. An earlier folder is removed in the
    end; after an error or an interrupt, it is there as before.

    Raises:
        HfEsmError: if `output` exists and is not to be overwritten.
    """
    give_access(folder)
    if not output.exists():
        folder.rename(output)
        return
    if not overwrite:
        raise HfEsmError(f"{output} exists. Choose another `output_dir`, or pass `overwrite=True`.")
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    try:
        output.rename(aside / _REPLACED)
        folder.rename(output)
    except BaseException:
        if not output.exists():
            (aside / _REPLACED).rename(output)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def add_folders(folder: Path, output: Path) -> None:
    """Give the complete folders in `folder` their names in the folder `output`, beside what is there: all or, after an
    error, none. After a kill, the next `recover(output)` goes on. Access is as for `publish_folder`.
    """
    give_access(folder)
    added = output.parent / f".{output.name}.added-{uuid.uuid4().hex[:8]}"
    names = [path.name for path in folder.iterdir()]
    folder.rename(added)
    try:
        _move(added, output)
    except BaseException:
        for name in names:
            if not (added / name).exists():
                (output / name).rename(added / name)
        raise
    finally:
        shutil.rmtree(added, ignore_errors=True)


def _move(folder: Path, output: Path) -> None:
    """Move what is in a folder to another one that lacks it."""
    for path in sorted(folder.iterdir()):
        if not (output / path.name).exists():
            path.rename(output / path.name)


def give_access(folder: Path) -> None:
    """Set the modes of a folder and of all in it to what the umask says; some writers take no notice of it."""
    with tempfile.TemporaryDirectory(dir=folder) as probe:  # the umask can only be read by changing it
        made, touched = Path(probe) / "folder", Path(probe) / "file"
        made.mkdir()
        touched.touch()
        modes = made.stat().st_mode & 0o777, touched.stat().st_mode & 0o777
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(modes[0] if path.is_dir() else modes[1])


def new_folder(folder: str | os.PathLike) -> Path:
    """The path of a folder for an adapter.

    Raises:
        HfEsmError: if the folder exists.
    """
    check_path(folder, "folder")
    folder = Path(folder).expanduser()
    recover(folder)
    if folder.exists():
        raise HfEsmError(f"{folder} exists. Choose another folder for the adapter.")
    return folder
