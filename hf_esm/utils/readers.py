"""The boundary of every reader: what other libraries raise about a file becomes one sentence that names the file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from ..errors import DamagedFileError, HfEsmError
from .sentences import reason_of


AGAIN = "Copy or download it again."


@contextmanager
def reading(path: str | os.PathLike, named: str = "", remedy: str = AGAIN) -> Iterator[None]:
    """Turn every exception inside the block into a `DamagedFileError`, but errors of this package and interrupts.

    Libraries raise whatever their parsers raise: RecursionError for deep JSON, KeyError, AssertionError. Only reading
    belongs inside the block, so that faults of this package keep their own class.

    Args:
        path: the file that is read.
        named: how messages name the file; by default by its path.
        remedy: what to do about a damaged file. One that may not be read gets a remedy of its own.

    Example:
        >>> import json
        >>> from hf_esm.utils import reading
        >>> with reading("bert/config.json"):
        ...     json.loads("{")
        Traceback (most recent call last):
        hf_esm.errors.DamagedFileError: bert/config.json is damaged and cannot be read (Expecting property name \
enclosed in double quotes: line 1 column 2 (char 1)). Copy or download it again.
    """
    place = named or path
    try:
        yield
    except (HfEsmError, MemoryError):
        raise
    except Exception as error:
        if _is_locked(path, error):  # safetensors says of such a file that there is none
            raise HfEsmError(f"{place} may not be read by this user. Change the permissions of {path}.") from None
        if isinstance(error, FileNotFoundError):
            raise DamagedFileError(f"{place} is missing. {remedy}") from None
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else reason_of(error)
        raise DamagedFileError(f"{place} is damaged and cannot be read ({reason}). {remedy}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, on the CPU.

    Raises:
        DamagedFileError: if the file is missing, or cannot be read.
    """
    with reading(path):
        return load_file(path)


def _is_locked(path: str | os.PathLike, error: Exception) -> bool:
    """Whether a file is there and may not be read."""
    if isinstance(error, OSError):
        try:
            Path(path).open("rb").close()
        except PermissionError:
            return True
        except OSError:
            return False
    return False


def is_file(path: Path) -> bool:
    """Return whether there is a file.

    Raises:
        HfEsmError: if its folder may not be looked into.
    """
    try:
        return path.is_file()
    except PermissionError:
        raise HfEsmError(f"{path} may not be read by this user. Change the permissions of its folder.") from None
