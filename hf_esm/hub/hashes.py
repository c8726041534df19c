"""Hashes of a routed model's files, which reveal damaged files when the model is loaded."""

import hashlib
import json
from pathlib import Path

from ..checkpoints import (
    CALIBRATION_FOLDER,
    CARD_FILE,
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    HASHES_FILE,
    PICTURES_FOLDER,
    RECIPE_FILE,
    REPORT_FILE,
)
from ..errors import DamagedFileError


# Files that people edit, or that do not change the model's output.
_LEFT_OUT = (
    HASHES_FILE,
    CARD_FILE,
    PICTURES_FOLDER,
    CALIBRATION_FOLDER,
    RECIPE_FILE,
    REPORT_FILE,
    GENERATION_CONFIG,
    CHAT_TEMPLATE,
)


def write_hashes(folder: Path) -> None:
    """Record the hash of every file that changes the model's output. The Hub's client does not notice flipped bits."""
    hashes = {str(path.relative_to(folder)): _hash(path) for path in _hashed(folder)}
    (folder / HASHES_FILE).write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")


def read_hashes(folder: Path, title: str) -> dict[str, str]:
    """The hashes that `write_hashes` recorded, by path in the folder.

    Args:
        folder: a routed model's folder.
        title: the model, as the user named it.
    """
    if not (folder / HASHES_FILE).is_file():
        raise DamagedFileError(
            f"{title}: {HASHES_FILE} is missing, so that its files cannot be checked. Download it again."
        )
    try:
        hashes = dict(json.loads((folder / HASHES_FILE).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        hashes = {}
    if not hashes:
        raise DamagedFileError(f"{title}: {HASHES_FILE} is damaged. Download it again.")
    return hashes


def verify_hashes(folder: Path, title: str) -> None:
    """Refuse a folder in which a file is missing, or differs from its recorded hash."""
    for name, expected in read_hashes(folder, title).items():
        if not (folder / name).is_file():
            raise DamagedFileError(f"{title}: {name} is missing. Download the whole model again.")
        if _hash(folder / name) != expected:
            path = (folder / name).resolve()  # the Hub's client uses the file in its cache until the file is deleted
            raise DamagedFileError(
                f"{title}: {name} is damaged: its hash is not the one recorded. Delete {path} and download it again; "
                f"if you changed it yourself, remove its line from {HASHES_FILE}."
            )


def _hashed(folder: Path) -> list[Path]:
    top_level = {path: path.relative_to(folder).parts[0] for path in sorted(folder.rglob("*")) if path.is_file()}
    return [path for path, top in top_level.items() if top not in _LEFT_OUT and not top.startswith(".")]


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
