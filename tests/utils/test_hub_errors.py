from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from hf_esm.errors import HfEsmError, HubError
from hf_esm.utils import plain_hub_errors


def from_server(kind):
    return kind("403 Forbidden\nmore lines", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (from_server(errors.HfHubHTTPError), "the Hub refuses it: 403 Forbidden"),
        (from_server(errors.GatedRepoError), "access is restricted. Ask for it"),
        (from_server(errors.RepositoryNotFoundError), "not on the Hub, or private"),
        (from_server(errors.RevisionNotFoundError), "there is no such branch, tag or commit"),
        (errors.LocalEntryNotFoundError("x"), "neither a folder nor wholly in the local cache"),
        (errors.HFValidationError("no id"), "the Hub refuses it: no id"),
        (errors.LocalTokenNotFoundError("no token"), "the Hub refuses it: no token"),
        (errors.OfflineModeIsEnabled("x"), "the Hub cannot be asked while HF_HUB_OFFLINE is set"),
        (errors.HTTPError("reset"), "the connection to the Hub broke (reset). Push again."),
        (ConnectionResetError("reset"), "the connection to the Hub broke (reset). Push again."),
        (TimeoutError("slow"), "the connection to the Hub broke (slow). Push again."),
    ],
)
def test_what_the_client_raises_becomes_one_sentence_about_the_named_repository(error, expected):
    with pytest.raises(HubError) as raised, plain_hub_errors("expert 'a' (me/a)", again="Push again."):
        raise error
    assert str(raised.value).startswith(f"expert 'a' (me/a): {expected}")
    assert "more lines" not in str(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        TypeError("no argument 'x'"),
        HfEsmError("ours"),
        errors.SafetensorsParsingError("x"),
        errors.NotASafetensorsRepoError("x"),
    ],
)
def test_errors_that_are_not_the_hubs_pass(error):
    with pytest.raises(type(error)) as raised, plain_hub_errors("me/a"):
        raise error
    assert raised.value is error
