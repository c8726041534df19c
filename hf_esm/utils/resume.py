"""Work in progress that outlives an interrupt: where it stands, whose it is, and when it goes."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from ..errors import HfEsmError
from .fingerprints import fingerprint
from .folders import atomic_file


try:
    import fcntl
except ImportError:  # Windows: two merges at once in one place are not noticed
    fcntl = None


WORK_FOLDER = "merge-in-progress"


_MARK, _LOCK, _STAGING = "merge.json", "merge.lock", "staging"


class Work:
    """What a merge keeps in `resume_dir`, in a folder of its own there, until it ends well.

    Attributes:
        folder: where it stands; None without a `resume_dir`.
    """

    def __init__(self, resume_dir: Optional[str], parts: Mapping[str, Any]):
        """`parts` are what the work depends on, by what messages call them."""
        self.place = Path(resume_dir).expanduser() if resume_dir else None
        self.folder = self.place / WORK_FOLDER if self.place else None
        self.key = {what: fingerprint(part) for what, part in parts.items()}
        self._lock: Any = None

    @property
    def nbytes(self) -> int:
        """What it takes on the disk so far."""
        files = [path.stat() for path in self.folder.rglob("*") if path.is_file()] if self.folder else []
        return sum(512 * found.st_blocks if hasattr(found, "st_blocks") else found.st_size for found in files)

    def check(self) -> None:
        """Raise if what stands there is of another merge."""
        if self.folder is None or not self.folder.is_dir() or not any(self.folder.iterdir()):
            return
        try:
            found = dict(json.loads((self.folder / _MARK).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise HfEsmError(f"{self.folder} holds no work that can be gone on with. Remove it.") from None
        if other := [what for what in {**self.key, **found} if self.key.get(what) != found.get(what)]:
            raise HfEsmError(
                f"{self.folder} holds the work of another merge, of {' and '.join(other)} that are not these. Choose "
                "another resume_dir, or remove that folder to start again."
            )

    def begin(self, staging: Path) -> Path:
        """Make it this process's own, and remove what an interrupted merge left where it wrote its output."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.place / _LOCK).open("w")
        try:
            if fcntl:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HfEsmError(f"{self.folder} is in use by another merge. Wait for it, or choose another.") from None
        self.check()
        self._write(_MARK, json.dumps(self.key))
        if (self.folder / _STAGING).is_file():
            left = Path((self.folder / _STAGING).read_text(encoding="utf-8"))
            if ".incomplete-" in left.name:
                shutil.rmtree(left, ignore_errors=True)
        self._write(_STAGING, str(staging.absolute()))
        return self.folder

    def end(self) -> None:
        """All is published: the work goes, at once for whoever looks for it, and with it the folder if it is empty."""
        done = self.place / f"{WORK_FOLDER}.done"
        shutil.rmtree(done, ignore_errors=True)
        self.folder.rename(done)
        shutil.rmtree(done, ignore_errors=True)
        (self.place / _LOCK).unlink(missing_ok=True)
        self.release()
        if not any(self.place.iterdir()):
            self.place.rmdir()

    def release(self) -> None:
        """Let another merge go on with it."""
        if self._lock is not None:
            self._lock.close()

    def _write(self, name: str, text: str) -> None:
        with atomic_file(self.folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
