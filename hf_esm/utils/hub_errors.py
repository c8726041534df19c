"""Errors of the Hub client in the words of the user who named the repository."""

from collections.abc import Iterator
from contextlib import contextmanager

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


_LOG_IN = "log in (`hf auth login`) or pass `token`"


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
    except LocalEntryNotFoundError:
        raise HubError(
            f"{title}: neither a folder nor wholly in the local cache, and the Hub cannot be reached. Check the "
            "name, or go online."
        ) from None
    except RevisionNotFoundError:
        raise HubError(f"{title}: there is no such branch, tag or commit in the repository.") from None
    except GatedRepoError:
        raise HubError(f"{title}: access is restricted. Ask for it on the model's page, and {_LOG_IN}.") from None
    except RepositoryNotFoundError:
        raise HubError(f"{title}: not on the Hub, or private. Check the id; if it is private, {_LOG_IN}.") from None
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, LocalTokenNotFoundError) as error:
        raise HubError(f"{title}: the Hub refuses it: {str(error).splitlines()[0]}") from None
    except OfflineModeIsEnabled:
        raise HubError(f"{title}: the Hub cannot be asked while HF_HUB_OFFLINE is set. Unset it.") from None
    except (NotASafetensorsRepoError, SafetensorsParsingError):
        raise
    except Exception as error:  # the HTTP library's own, after the client's retries, and what Xet raises
        from_network = isinstance(error, (ConnectionError, TimeoutError))
        if isinstance(error, (OSError, TypeError, ValueError)) and not from_network:
            raise
        raise HubError(f"{title}: the connection to the Hub broke ({error}). {again}") from error
