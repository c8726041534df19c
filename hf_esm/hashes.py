"""The hashes of a routed model's files, by which damage is noticed on loading."""

import hashlib
import json
from pathlib import Path

from .errors import HfEsmError
from .experts import FOLDER
from .proxies import PROXIES_FOLDER


HASHES_FILE = "hashes.json"


def write_hashes(folder: Path) -> None:
    """Record the hash of every weight file: the Hub's client notices no flipped byte."""
    hashes = {str(path.relative_to(folder)): _hash(path) for path in _hashed(folder)}
    (folder / HASHES_FILE).write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")


def verify_hashes(folder: Path, title: str) -> None:
    """Raise if a file is missing or not what was written."""
    if not (folder / HASHES_FILE).is_file():
        raise HfEsmError(f"{title}: {HASHES_FILE} is missing, so that its files cannot be checked. Download it again.")
    try:
        hashes = dict(json.loads((folder / HASHES_FILE).read_text(encoding="utf-8")))
    except ValueError:
        raise HfEsmError(f"{title}: {HASHES_FILE} is damaged. Download it again.") from None
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise HfEsmError(f"{title}: {name} is missing. Download the whole model again.")
        if _hash(folder / name) != expected:
            path = (folder / name).resolve()  # in the Hub's cache, the client takes it as it is until it is deleted
            raise HfEsmError(
                f"{title}: {name} is damaged: its hash is not the one recorded. Delete {path} and download it again."
            )


def _hashed(folder: Path) -> list[Path]:
    weights = [path.relative_to(folder) for path in sorted(folder.rglob("*.safetensors"))]
    weights = [folder / path for path in weights if path.parts[0] != PROXIES_FOLDER]
    return [*weights, folder / FOLDER / "adapter_config.json"]


def _hash(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
