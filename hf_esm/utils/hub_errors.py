"""Errors of the Hub client in the words of the user who named the repository."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Optional, TypeVar

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from ..errors import HubError
from .sentences import reason_of


T = TypeVar("T")

_LOG_IN = "log in (`hf auth login`) or pass `token`"
_NO_TOKEN = "the access token is missing, wrong or expired. Log in (`hf auth login`) or pass another `token`."
_UNREACHABLE = (
    "neither a folder nor wholly in the local cache, and the Hub cannot be reached. Check the name, or go online."
)

_BUSY = (429, 500, 502, 503, 504)

_WAITS = (1, 2, 4)  # seconds before another try

# Requests that the client repeats by itself.
_REPEATED = re.compile("/(tree|resolve)/")


def ask_hub(title: str, call: Callable[[], T], again: str = "Try again.") -> T:
    """Return what a call of the Hub client returns; call again, up to three times, while the Hub is busy.

    The client repeats listings, downloads and commits by itself, but neither the request that comes before them nor
    those that make a repository.

    Args:
        title, again: as for `plain_hub_errors`.

    Raises:
        HubError: see `plain_hub_errors`.
    """
    with plain_hub_errors(title, again):
        for wait in _WAITS:
            try:
                return call()
            except (HfHubHTTPError, LocalEntryNotFoundError) as error:
                answer = _answer(error)
                if answer is None or answer.response.status_code not in _BUSY:
                    raise
                if _REPEATED.search(str(answer.response.url)):
                    raise
            time.sleep(wait)
        return call()


@contextmanager
def plain_hub_errors(title: str, again: str = "Try again.") -> Iterator[None]:
    """Turn errors of the Hub client inside the block into `HubError`.

    Errors that are not the Hub's pass: of the local disk, of arguments, and of the contents of safetensors files.

    Args:
        title: what the message begins with: the model or repository, as the user named it.
        again: what the user can do when the connection breaks.
    """
    try:
        yield
    except LocalEntryNotFoundError as error:
        answer = _answer(error)
        raise HubError(f"{title}: {_refusal(answer) if answer else _UNREACHABLE}") from None
    except RevisionNotFoundError:
        raise HubError(f"{title}: there is no such branch, tag or commit in the repository.") from None
    except GatedRepoError:
        raise HubError(f"{title}: access is restricted. Ask for it on the model's page, and {_LOG_IN}.") from None
    except HfHubHTTPError as error:
        raise HubError(f"{title}: {_refusal(error)}") from None
    except (EntryNotFoundError, HFValidationError, LocalTokenNotFoundError) as error:
        raise HubError(f"{title}: the Hub refuses it: {reason_of(error)}.") from None
    except OfflineModeIsEnabled:
        raise HubError(f"{title}: the Hub cannot be asked while HF_HUB_OFFLINE is set. Unset it.") from None
    except (NotASafetensorsRepoError, SafetensorsParsingError):
        raise
    except Exception as error:  # the HTTP library's own, after the client's retries, and what Xet raises
        from_network = isinstance(error, (ConnectionError, TimeoutError))
        if isinstance(error, (OSError, TypeError, ValueError)) and not from_network:
            raise
        raise HubError(f"{title}: the connection to the Hub broke ({error}). {again}") from error


def _answer(error: Exception) -> Optional[HfHubHTTPError]:
    """Return the answer of the Hub that an error is or comes from, if the Hub answered."""
    return next((one for one in (error, error.__cause__) if isinstance(one, HfHubHTTPError)), None)


def _refusal(error: HfHubHTTPError) -> str:
    """Say what an answer of the Hub means, and what to do."""
    status, reason = error.response.status_code, _reason(error)
    if isinstance(error, RepositoryNotFoundError) and "expired" not in reason:  # 401 and 404, of one that is private
        return f"not on the Hub, or private. Check the id; if it is private, {_LOG_IN}."
    if status == 401:
        return _NO_TOKEN
    if status == 429:
        seconds = re.search(r"Retry after (\d+) seconds", str(error))
        when = f"in {seconds[1]} seconds" if seconds else "in a few minutes"
        return f"too many requests to the Hub ({reason}). Try again {when}."
    if status >= 500:
        return f"a fault of the Hub ({reason}). Try again later."
    return f"the Hub refuses it ({reason})."


def _reason(error: HfHubHTTPError) -> str:
    """Return the status of an answer, and the reason that the Hub gives."""
    status = f"{error.response.status_code} {error.response.reason_phrase}"
    said = reason_of(ValueError(error.server_message)) if error.server_message else ""
    return f"{status}: {said}" if said and said.lower() not in status.lower() else status
