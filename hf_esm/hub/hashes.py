"""The hashes of a routed model's files, by which damage is noticed on loading."""

import hashlib
import json
from pathlib import Path

from ..checkpoints import CALIBRATION_FOLDER, HASHES_FILE, PICTURES_FOLDER, RECIPE_FILE, REPORT_FILE
from ..errors import HfEsmError


# What people edit, and what changes no answer.
_LEFT_OUT = (
    HASHES_FILE,
    "README.md",
    PICTURES_FOLDER,
    CALIBRATION_FOLDER,
    RECIPE_FILE,
    REPORT_FILE,
    "generation_config.json",
    "chat_template.jinja",
)


def write_hashes(folder: Path) -> None:
    """Record the hash of every file that changes what the model says: the Hub's client notices no flipped byte."""
    hashes = {str(path.relative_to(folder)): _hash(path) for path in _hashed(folder)}
    (folder / HASHES_FILE).write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")


def read_hashes(folder: Path, title: str) -> dict[str, str]:
    """What `write_hashes` recorded, by the file's path in the folder."""
    if not (folder / HASHES_FILE).is_file():
        raise HfEsmError(f"{title}: {HASHES_FILE} is missing, so that its files cannot be checked. Download it again.")
    try:
        found = dict(json.loads((folder / HASHES_FILE).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        found = {}
    if not found:
        raise HfEsmError(f"{title}: {HASHES_FILE} is damaged. Download it again.")
    return found


def verify_hashes(folder: Path, title: str) -> None:
    """Raise if a file is missing or not what was written."""
    for name, expected in read_hashes(folder, title).items():
        if not (folder / name).is_file():
            raise HfEsmError(f"{title}: {name} is missing. Download the whole model again.")
        if _hash(folder / name) != expected:
            path = (folder / name).resolve()  # in the Hub's cache, the client takes it as it is until it is deleted
            raise HfEsmError(
                f"{title}: {name} is damaged: its hash is not the one recorded. Delete {path} and download it again; "
                f"if you changed it yourself, remove its line from {HASHES_FILE}."
            )


def _hashed(folder: Path) -> list[Path]:
    files = {path: path.relative_to(folder).parts[0] for path in sorted(folder.rglob("*")) if path.is_file()}
    return [path for path, top in files.items() if top not in _LEFT_OUT and not top.startswith(".")]


def _hash(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
