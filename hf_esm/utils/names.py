"""Names that become names of files and folders: those of tasks, and relative paths that a model's files name."""

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import HfEsmError


_LONGEST_NAME = 100  # of a task, in letters; many alphabets take 2 or 3 bytes a letter, and a file's name 255 bytes
_LONGEST_FILE = 200  # in bytes, which leaves room for suffixes

_LONGEST_PART, _LONGEST_PATH = 255, 4095  # of a path, in bytes

_RESERVED = ("base", "static", "none")  # as tasks: the base, no expert, none of the tasks

# Names that Windows takes for devices, whatever their suffix.
_DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[\d¹²³])(\..*)?", re.IGNORECASE)


def check_task_name(name: Any) -> None:
    """Raise unless a text can be the name of a task, and so that of files and folders on every system.

    Names from the settings of an adapter or a recipe are checked like those that a caller passes.

    Raises:
        HfEsmError: says which names can be.

    Example:
        >>> from hf_esm.utils import check_task_name
        >>> check_task_name("sst2")
        >>> check_task_name("../sst2")
        Traceback (most recent call last):
        hf_esm.errors.HfEsmError: '../sst2' cannot be the name of a task: use letters, digits, '.', '_' and '-', and \
none of base, static, none.
    """
    letters = isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*", name) and not name.endswith(".")
    if not letters or name in _RESERVED:
        quotes = "" if isinstance(name, str) else " (in YAML, put it in quotes)"
        shown = repr(name) if len(repr(name)) <= _LONGEST_NAME else f"{repr(name)[:_LONGEST_NAME]}…"
        raise HfEsmError(
            f"{shown} cannot be the name of a task{quotes}: use letters, digits, '.', '_' and '-', and none of "
            f"{', '.join(_RESERVED)}."
        )
    if _DEVICES.fullmatch(name):
        raise HfEsmError(
            f"{name!r} cannot be the name of a task: Windows takes a file of this name for a device. Choose another."
        )
    if len(name) > _LONGEST_NAME:
        raise HfEsmError(f"The task name {name[:20]!r}… has {len(name)} letters; use at most {_LONGEST_NAME}.")
    if len(name.encode()) > _LONGEST_FILE:
        raise HfEsmError(f"The task name {name[:20]!r}… has {len(name.encode())} bytes; use at most {_LONGEST_FILE}.")


def check_task_names(names: Iterable[Any]) -> None:
    """Raise unless all names can be names of tasks, side by side.

    Raises:
        HfEsmError: names the one that cannot be, or two that differ in case alone.

    Example:
        >>> from hf_esm.utils import check_task_names
        >>> check_task_names(["law", "Law"])
        Traceback (most recent call last):
        hf_esm.errors.HfEsmError: The tasks 'law' and 'Law' are one folder where case does not count, as on Windows \
and macOS. Rename one.
    """
    known: dict[str, str] = {}
    for name in names:
        check_task_name(name)
        other = known.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise HfEsmError(
                f"The tasks {other!r} and {name!r} are one folder where case does not count, as on Windows and macOS. "
                "Rename one."
            )


def check_path(path: Any, name: str) -> None:
    """Raise unless there can be a file or folder of this path, and JSON and YAML can hold it.

    Args:
        path: a path of the caller, who may also pass something else here, which is not checked.
        name: what the path is of, for the error.

    Raises:
        HfEsmError: if the path has a NUL, a part that is too long, or bytes that are no UTF-8.

    Example:
        >>> from hf_esm.utils import check_path
        >>> check_path("merged\0", "`output_dir`")
        Traceback (most recent call last):
        hf_esm.errors.HfEsmError: `output_dir`: the path 'merged\\x00' has a NUL character. Choose another.
    """
    if not isinstance(path, (str, os.PathLike)):
        return
    text = os.fspath(path)
    shown = repr(text) if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]!r}…"
    try:
        encoded = text.encode() if isinstance(text, str) else bytes(text.decode(), "utf-8")
    except UnicodeError:
        raise HfEsmError(f"{name}: the path {shown} is not UTF-8. Rename it.") from None
    if b"\0" in encoded:
        raise HfEsmError(f"{name}: the path {shown} has a NUL character. Choose another.")
    longest = max(map(len, encoded.split(b"/")), default=0)
    if longest > _LONGEST_PART or len(encoded) > _LONGEST_PATH:
        raise HfEsmError(
            f"{name}: the path {shown} is too long: {longest} bytes in one part and {len(encoded)} in all, of at most "
            f"{_LONGEST_PART} and {_LONGEST_PATH}. Choose another."
        )


def stays_inside(path: Any) -> bool:
    """Return whether a relative path, which a file of a model names, is inside the model's folder on every system."""
    if not isinstance(path, str) or not path or "\0" in path:
        return False
    kinds = (PurePosixPath(path), PureWindowsPath(path))
    return not any(kind.anchor or ".." in kind.parts for kind in kinds)
