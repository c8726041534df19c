"""Folders and files that appear under their name when they are whole."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from ..errors import HfEsmError


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
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside `output` to write into. It is removed unless `publish_folder` has moved it away."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.incomplete-", dir=output.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish_folder(folder: Path, output: Path, overwrite: bool = False) -> None:
    """Give a finished folder its name, in one step. What stood there before goes only once the new one stands."""
    folder.chmod(0o777 & ~_umask())
    if output.exists():
        if not overwrite:
            raise HfEsmError(f"{output} exists. Choose another output folder, or pass overwrite.")
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
    """The path of a folder that does not exist yet."""
    folder = Path(folder).expanduser()
    if folder.exists():
        raise HfEsmError(f"{folder} exists. Choose another folder for the adapter.")
    return folder
