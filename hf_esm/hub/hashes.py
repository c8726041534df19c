"""Hashes of a routed model's files, which reveal damaged, missing and added files when the model is loaded."""

import hashlib
import json
from collections.abc import Iterator
from fnmatch import fnmatch
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
    SCORES_PICTURE,
    STATISTICS_FILE,
    check_routed,
    read_routed_settings,
    weight_files,
)
from ..errors import DamagedFileError
from ..utils import reading, stays_inside


# Files and folders that do not change the model's output. Statistics have a checksum of their own.
_LEFT_OUT = (
    HASHES_FILE,
    CARD_FILE,
    PICTURES_FOLDER,
    SCORES_PICTURE,
    CALIBRATION_FOLDER,
    RECIPE_FILE,
    REPORT_FILE,
    STATISTICS_FILE,
)

# Kinds of files that a library may load because they are there.
_LOADED = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.py")

_AGAIN = "Download it again."


def write_hashes(folder: Path) -> None:
    """Record the hash of every file that changes the model's output. The Hub's client does not notice flipped bits."""
    hashes = {name: _hash(folder / name) for name in _hashed(folder)}
    (folder / HASHES_FILE).write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")


def read_hashes(folder: Path, title: str) -> dict[str, str]:
    """The hashes that `write_hashes` recorded, by path in the folder.

    Args:
        folder: a routed model's folder.
        title: the model, as the user named it.

    Raises:
        DamagedFileError: if there are none, or they cannot be read, or are of files outside of the folder.
    """
    path = folder / HASHES_FILE
    if not path.is_file():
        raise DamagedFileError(f"{title}: {HASHES_FILE} is missing, so that its files cannot be checked. {_AGAIN}")
    with reading(path, f"{title}: {HASHES_FILE}", _AGAIN):
        hashes = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(hashes, dict) or not hashes or not all(isinstance(value, str) for value in hashes.values()):
        raise DamagedFileError(f"{title}: {HASHES_FILE} is damaged. {_AGAIN}")
    if outside := [name for name in hashes if not stays_inside(name)]:
        raise DamagedFileError(
            f"{title}: {HASHES_FILE} names {outside[0]!r}, which is not in the model's folder. Do not use this model."
        )
    return hashes


def verify_routed(folder: Path, title: str, allow_pickle: bool = False) -> None:
    """Refuse a routed model's folder whose files are not those that were written; see `verify_hashes`.

    Args:
        folder: a routed model's folder.
        title: the model, as the user named it.
        allow_pickle: whether the static model may be in `.bin` files, which can run code when they are read.

    Raises:
        HfEsmError: if there are no experts, or names in the files cannot be used.
    """
    check_routed(folder, title)
    verify_hashes(folder, title)
    read_routed_settings(folder, title)
    weight_files(folder, title, allow_pickle)


def verify_hashes(folder: Path, title: str) -> None:
    """Refuse a folder in which a file is missing, differs from its recorded hash, or may be loaded and has no hash."""
    hashes = read_hashes(folder, title)
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise DamagedFileError(f"{title}: {name} is missing. Download the whole model again.")
        if (found := _hash(folder / name)) != expected:
            path = (folder / name).resolve()  # the Hub's client uses the file in its cache until the file is deleted
            raise DamagedFileError(
                f"{title}: {name} is damaged: its hash is not the one recorded. Delete {path} and download it again; "
                f"if you changed it yourself, its line in {HASHES_FILE} must be {_line(name, found)}."
            )
    for name in _hashed(folder):
        if name not in hashes and any(fnmatch(name, kind) for kind in _LOADED) and not _unlisted(name, hashes, folder):
            raise DamagedFileError(
                f"{title}: {name} was added to the model: {HASHES_FILE} does not list it. Remove the file; if you "
                f"added it yourself, add to {HASHES_FILE} the line {_line(name, _hash(folder / name))}."
            )


def _unlisted(name: str, hashes: dict[str, str], folder: Path) -> bool:
    """Whether a file is one that hf_esm 0.1.0 did not list, in a model that it wrote: it listed no settings of
    generation, which every model that writes has.
    """
    by_that_version = GENERATION_CONFIG not in hashes and (folder / GENERATION_CONFIG).is_file()
    return by_that_version and name in (GENERATION_CONFIG, CHAT_TEMPLATE)


def _line(name: str, digest: str) -> str:
    return f"{json.dumps(name)}: {json.dumps(digest)}"


def _hashed(folder: Path) -> Iterator[str]:
    """Yield the paths in the folder of the files that change the model's output."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] not in _LEFT_OUT and not name.parts[0].startswith("."):
            yield name.as_posix()


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with reading(path, remedy=_AGAIN), path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
