"""Fingerprints of models, data and code: cache keys, and the check that a resumed merge has the same inputs."""

import os
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Optional

from datasets.fingerprint import Hasher


def data_identity(data: Any) -> Any:
    """Identity of data: sizes and times of files, or a hash of the content of anything else."""
    if isinstance(data, (str, os.PathLike)):
        return files_identity(Path(data).expanduser()) or str(data)
    if isinstance(data, Mapping) and not isinstance(data.get("path"), (str, os.PathLike)):
        return {name: data_identity(value) for name, value in data.items()}
    if isinstance(data, Mapping):  # for `datasets.load_dataset`, or a file with what is said of it
        named = data.get("data_files") or []
        named = list(named.values()) if isinstance(named, Mapping) else named
        places = [data["path"], *([named] if isinstance(named, str) else named)]
        places = [place for entry in places for place in ([entry] if isinstance(entry, (str, os.PathLike)) else entry)]
        return [Hasher.hash(dict(data)), [files_identity(Path(place).expanduser()) for place in places]]
    return Hasher.hash(data)


def code_identity(function: Any) -> Any:
    """Identity of a function, or of a dataclass that holds functions: a hash of its code, and the file of its module,
    since it may call other functions there. A function of the running script has its code alone.
    """
    if not callable(function) and is_dataclass(function):
        kind = type(function)  # whose methods take part in what it does
        return [code_identity(kind), *(code_identity(getattr(function, field.name)) for field in fields(function))]
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    file = getattr(module, "__file__", None) if getattr(module, "__name__", "__main__") != "__main__" else None
    return [Hasher.hash(function), files_identity(Path(file)) if file and callable(function) else None]


def processor_identity(processor: Any) -> Any:
    """Identity of a tokenizer, processor or extractor: kind, vocabularies and settings. Use does not change it."""
    parts = [processor, getattr(processor, "tokenizer", None)]
    vocabularies = [Hasher.hash(sorted(part.get_vocab().items())) for part in parts if hasattr(part, "get_vocab")]
    settings = [part.to_dict() for part in parts if hasattr(part, "to_dict")]
    return [type(processor).__name__, getattr(processor, "name_or_path", None), vocabularies, settings]


def fingerprint(*parts: Optional[Any]) -> str:
    """A short hash of all parts together."""
    return Hasher.hash(parts)


def files_identity(place: Path) -> list[tuple[str, int, int]]:
    """Absolute path, size and time of change of a file, or of every file below a folder."""
    paths = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
