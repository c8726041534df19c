"""The boundary of every reader: what other libraries raise about a file becomes one sentence that names the file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DamagedFileError, HfEsmError
from .sentences import reason_of


AGAIN = "Copy or download it again."


@contextmanager
def reading(place: str | os.PathLike, remedy: str = AGAIN) -> Iterator[None]:
    """Turn every exception inside the block into a `DamagedFileError`, but errors of this package and interrupts.

    Libraries raise whatever their parsers raise: RecursionError for deep JSON, KeyError, AssertionError. Only reading
    belongs inside the block, so that faults of this package keep their own class.

    Args:
        place: the file that is read, with the name of its model where that is known.
        remedy: what to do about a damaged file. One that may not be read, or is not there, gets a remedy of its own.

    Example:
        >>> import json
        >>> from hf_esm.utils import reading
        >>> with reading("bert/config.json"):
        ...     json.loads("{")
        Traceback (most recent call last):
        hf_esm.errors.DamagedFileError: bert/config.json is damaged (Expecting property name enclosed in double \
quotes: line 1 column 2 (char 1)). Copy or download it again.
    """
    try:
        yield
    except (HfEsmError, MemoryError):
        raise
    except PermissionError as error:
        path = error.filename or place
        raise HfEsmError(
            f"{place} may not be read by this user ({error.strerror}). Change the permissions of {path}."
        ) from None
    except FileNotFoundError:
        raise DamagedFileError(f"{place} is missing. {remedy}") from None
    except RecursionError:
        raise DamagedFileError(f"{place} is damaged (it is nested too deeply). {remedy}") from None
    except Exception as error:
        raise DamagedFileError(f"{place} is damaged ({reason_of(error)}). {remedy}") from None


def is_file(path: Path) -> bool:
    """Return whether there is a file, and say so if the folder may not be looked into.

    Raises:
        HfEsmError: if the folder may not be read, in which `Path.is_file` finds nothing.
    """
    try:
        path.stat()
    except PermissionError as error:
        raise HfEsmError(
            f"{path} may not be read by this user ({error.strerror}). Change the permissions of its folder."
        ) from None
    except (OSError, ValueError):
        return False
    return path.is_file()
