"""Work in progress that outlives an interrupt."""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Optional

from ..errors import HfEsmError
from .fingerprints import fingerprint
from .folders import atomic_file, only_user


WORK_FOLDER = "merge-in-progress"


_MARK, _LOCK, _STAGING, _WHOLE = "merge.json", "merge.lock", "staging", "whole"


class Work:
    """The work of a merge that outlives an interrupt: a folder below `resume_dir`, removed when the merge succeeds.

    Attributes:
        place: the `resume_dir`, or None.
        folder: the folder of the work, or None without a `resume_dir`.
        key: fingerprints of everything that the work depends on, by their names in messages.
    """

    def __init__(self, resume_dir: Optional[str], parts: Mapping[str, Any]):
        """Describe the work without touching the disk.

        Args:
            resume_dir: the folder that the caller chose for the work, if any.
            parts: everything that the work depends on, by the names that messages use.
        """
        self.place = Path(resume_dir).expanduser() if resume_dir else None
        self.folder = self.place / WORK_FOLDER if self.place else None
        self.key = {name: fingerprint(part) for name, part in parts.items()}
        self._lock = ExitStack()

    @property
    def nbytes(self) -> int:
        """Bytes that the work takes on the disk so far."""
        files = [path.stat() for path in self.folder.rglob("*") if path.is_file()] if self.folder else []
        return sum(512 * file.st_blocks if hasattr(file, "st_blocks") else file.st_size for file in files)

    def check(self) -> None:
        """Check that an earlier merge, whose work is in the folder, had the same inputs.

        Raises:
            HfEsmError: if it had others, or if the folder contains something else.
        """
        if self.folder is None or not self.folder.is_dir():
            return
        # A merge that was killed before it wrote its mark leaves at most the mark's temporary file.
        if all(".partial" in path.name for path in self.folder.iterdir()):
            return
        try:
            key = dict(json.loads((self.folder / _MARK).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise HfEsmError(f"{self.folder} does not contain a merge that can be resumed. Remove it.") from None
        if different := [name for name in {**self.key, **key} if self.key.get(name) != key.get(name)]:
            raise HfEsmError(
                f"{self.folder} contains the work of another merge, which differs in {' and '.join(different)}. "
                "Choose another `resume_dir`, or remove that folder to start again."
            )

    def begin(self, staging: Path) -> Path:
        """Lock the folder for this process, and remove the unfinished output of an interrupted merge.

        Args:
            staging: the folder in which this merge writes its output.

        Raises:
            HfEsmError: if another merge uses the folder, or the work in it is of a merge with other inputs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        message = f"{self.folder} is in use by another merge. Wait, or choose another `resume_dir`."
        self._lock.enter_context(only_user(self.place / _LOCK, message))
        self.check()
        self._write(_MARK, json.dumps(self.key))
        (self.folder / _WHOLE).unlink(missing_ok=True)
        if (self.folder / _STAGING).is_file():
            left = Path((self.folder / _STAGING).read_text(encoding="utf-8"))
            if ".incomplete-" in left.name:
                shutil.rmtree(left, ignore_errors=True)
        self._write(_STAGING, str(staging.absolute()))
        return self.folder

    def publishing(self, staging: Path) -> None:
        """Note that the output in `staging` is whole and gets its name next; see `end_published`."""
        self._write(_WHOLE, _identity(staging))

    def end(self) -> None:
        """Remove the work after the output was published, and the `resume_dir` if it is empty then."""
        _remove(self.folder)
        self.release()
        with suppress(OSError):  # there is something else
            self.place.rmdir()

    def release(self) -> None:
        """Unlock the folder, so that another merge can resume."""
        self._lock.close()

    def _write(self, name: str, text: str) -> None:
        with atomic_file(self.folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def end_published(resume_dir: str, output: Path) -> None:
    """Remove the work of a merge that was killed after `output` had got its name, and the `resume_dir` if it is empty
    then. Other work stays.
    """
    place = Path(resume_dir).expanduser()
    folder, whole = place / WORK_FOLDER, place / WORK_FOLDER / _WHOLE
    if any(path.exists() for path in (whole, _done(folder), place / _LOCK)):
        with suppress(HfEsmError), only_user(place / _LOCK, f"{folder} is in use by another merge."):
            shutil.rmtree(_done(folder), ignore_errors=True)
            if whole.is_file() and output.is_dir() and whole.read_text(encoding="utf-8") == _identity(output):
                _remove(folder)
    with suppress(OSError):  # there is something else, or nothing at all
        place.rmdir()


def _remove(folder: Path) -> None:
    """Remove the folder of a merge's work, which is no work from the first step on."""
    shutil.rmtree(_done(folder), ignore_errors=True)
    folder.rename(_done(folder))
    shutil.rmtree(_done(folder), ignore_errors=True)


def _done(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.done")


def _identity(folder: Path) -> str:
    """What a folder keeps when it gets another name."""
    status = folder.stat()
    return f"{status.st_dev} {status.st_ino}"
