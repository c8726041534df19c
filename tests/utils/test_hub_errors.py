from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import hf_raise_for_status

from hf_esm.errors import HfEsmError, HubError
from hf_esm.utils import ask_hub, hub_errors, plain_hub_errors


def from_server(kind):
    response = SimpleNamespace(headers={}, request=None, status_code=404, reason_phrase="Not Found")
    return kind("404 Not Found\nmore lines", response=response)


def answered(status, message=None, code=None, place="api/models/me/a", **headers):
    """What the client raises for an answer of the Hub."""
    headers |= {"X-Request-Id": "req-1"} | ({"X-Error-Code": code} if code else {})
    request = httpx2.Request("GET", f"https://hub/{place}")
    body = {"error": message} if message else {}
    headers |= {"X-Error-Message": message} if message else {}
    try:
        hf_raise_for_status(httpx2.Response(status, headers=headers, json=body, request=request))
    except errors.HfHubHTTPError as error:
        return error
    raise AssertionError


def unreachable(cause):
    error = errors.LocalEntryNotFoundError("Got: something\nAn error happened")
    error.__cause__ = cause
    return error


NO_TOKEN = "the access token is missing, wrong or expired. Log in (`hf auth login`) or pass another `token`."


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (from_server(errors.GatedRepoError), "access is restricted. Ask for it"),
        (from_server(errors.RepositoryNotFoundError), "not on the Hub, or private"),
        (from_server(errors.RevisionNotFoundError), "there is no such branch, tag or commit"),
        (from_server(errors.RemoteEntryNotFoundError), "the Hub refuses it (404 Not Found)."),
        (unreachable(None), "neither a folder nor wholly in the local cache"),
        (unreachable(answered(503)), "a fault of the Hub (503 Service Unavailable). Try again later."),
        (unreachable(answered(404, code="RepoNotFound")), "not on the Hub, or private"),
        (answered(500, "it burns"), "a fault of the Hub (500 Internal Server Error: it burns). Try again later."),
        (answered(429), "too many requests to the Hub (429 Too Many Requests). Try again in a few minutes."),
        (
            answered(429, RateLimit='"api";r=0;t=61'),
            "too many requests to the Hub (429 Too Many Requests). Try again in 61 seconds.",
        ),
        (answered(403, "no write token"), "the Hub refuses it (403 Forbidden: no write token)."),
        (answered(403), "the Hub refuses it (403 Forbidden)."),
        (answered(400, "the name\nis odd"), "the Hub refuses it (400 Bad Request: the name, and 1 line more)."),
        (answered(401, "Invalid credentials in Authorization header"), NO_TOKEN),
        (answered(401, "Invalid username or password.", place="api/repos/create"), NO_TOKEN),
        (answered(401, 'User Access Token "x" is expired'), NO_TOKEN),
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
    assert "more lines" not in str(raised.value) and "req-1" not in str(raised.value)


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
    with pytest.raises(type(error)) as raised:
        ask_hub("me/a", lambda: (_ for _ in ()).throw(error))
    assert raised.value is error


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (answered(429), 4),
        (answered(500), 4),
        (unreachable(answered(503)), 4),
        (answered(503, place="api/models/me/a/tree/main"), 1),  # the client has tried this one again
        (answered(403), 1),
        (unreachable(None), 1),
        (TimeoutError("slow"), 1),
    ],
)
@pytest.mark.parametrize("faults", [1, 3, 4])
def test_a_busy_hub_is_asked_again_and_other_answers_are_final(monkeypatch, error, calls, faults):
    waits, asked = [], []
    monkeypatch.setattr(hub_errors.time, "sleep", waits.append)

    def call():
        asked.append(1)
        if len(asked) <= faults:
            raise error
        return "answer"

    if faults < calls:
        assert ask_hub("me/a", call) == "answer"
    else:
        with pytest.raises(HubError, match=r"^me/a: "):
            ask_hub("me/a", call)
    assert len(asked) == min(calls, faults + 1)
    assert waits == [1, 2, 4][: len(asked) - 1]
