"""Pushes to a busy Hub, pull requests, and files that tell something of the samples."""

import contextlib
import io
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_esm import ActivationStatistics, HfEsmError, InputStatistics
from hf_esm.checkpoints import whole_folder
from hf_esm.cli.main import main
from hf_esm.hub import push_folder
from hf_esm.utils import hub_errors
from support.hub import TOKEN, process


pytestmark = pytest.mark.hub

FEATURES = "routed/router_features.safetensors"
STATISTICS = "esm_statistics.safetensors"


@pytest.fixture(scope="module")
def online(hub, tmp_path_factory):
    with process(hub, tmp_path_factory.mktemp("home")) as run:
        run(hurry)
        yield run


def hurry() -> None:
    hub_errors._WAITS = (0, 0, 0)


@pytest.fixture(autouse=True)
def no_faults(hub):
    yield
    hub.faults.clear()


@pytest.fixture
def name(hub):
    return f"me/model{len(hub.repos)}"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "merged").mkdir()
    for file in ("merge_recipe.yaml", "config.json"):
        (tmp_path / "merged" / file).write_text("{}")
    return tmp_path / "merged"


def push(folder: Path, name: str, **options: Any) -> list[str]:
    """Push, and return the warnings."""
    log = io.StringIO()
    logger = logging.getLogger("hf_esm")
    handler = logging.StreamHandler(log)
    logger.addHandler(handler)
    try:
        push_folder(folder, name, token=TOKEN, **options)
    finally:
        logger.removeHandler(handler)
    return log.getvalue().splitlines()


def read(name: str) -> str:
    return (whole_folder(name, name) / "config.json").read_text()


def command(*words: Any, token: str = TOKEN) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        patch.setenv("HF_TOKEN", token)
        patch.setattr(logging.root, "handlers", [])  # that of an earlier command
        status = main([str(word) for word in words])
    return status, out.getvalue(), errors.getvalue()


def error_of(call: Any, *arguments: Any) -> str:
    with pytest.raises(HfEsmError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("429", "too many requests to the Hub (429"),
        ("500", "a fault of the Hub (500"),
        ("503", "a fault of the Hub (503"),
    ],
)
def test_a_busy_hub_is_asked_again_and_then_named(hub, online, folder, name, fault, said):
    create, information = "POST .*/repos/create", f"GET /api/models/{name}(/revision.*)?$"
    hub.faults |= {create: [fault] * 3, information: [fault] * 3}
    online(push, folder, name)
    assert online(read, name) == "{}"
    assert hub.faults[create] == hub.faults[information] == []
    other = f"{name}-other"
    hub.faults |= {create: [fault] * 99, f"GET /api/models/{other}(/revision.*)?$": [fault] * 99}
    assert error_of(online, push, folder, other).startswith(f"{other}: {said}")
    assert error_of(online, read, other).startswith(f"{other}: {said}")


def test_a_refusal_says_the_hubs_reason_and_a_wrong_token_to_log_in(online, folder):
    assert online(command, "push", folder, "you/model")[2].endswith("the Hub refuses it (403 Forbidden).\n")
    status, _, errors = online(partial(command, token="hf_expired"), "push", folder, "me/new")
    assert (status, "missing, wrong or expired. Log in (`hf auth login`)" in errors) == (2, True)


def test_the_command_line_makes_pull_requests_and_commits_with_a_message(hub, online, folder, name):
    words = ("push", folder, name, "--commit-message")
    assert online(command, *words, "first")[0] == 0
    (folder / "config.json").write_text("[]")
    status, out, _ = online(command, *words, "second", "--create-pr")
    assert (status, out) == (0, f"{hub.url}/{name}/discussions/1\n")
    repo = hub.repos[name]
    assert repo.titles == {"main": "first", "refs/pr/1": "second"}
    assert {ref: repo.commits[repo.refs[ref]]["config.json"] for ref in repo.titles} == {
        "main": b"{}",
        "refs/pr/1": b"[]",
    }
    status, _, errors = online(command, *words, "x", "--create-pr", "--revision", "dev")
    assert (status, "pass --create-pr or --revision, not both" in errors) == (2, True)


def test_an_unknown_option_makes_no_repository(hub, online, folder, name):
    with pytest.raises(HfEsmError, match=r"no option 'create_pull' \(did you mean 'create_pr'\?\)"):
        push_folder(folder, name, create_pull=True)
    assert name not in hub.repos


def test_files_that_tell_something_of_the_samples_are_named_before_they_go_up(online, folder, name):
    assert online(push, folder, name) == []
    for file in (FEATURES, STATISTICS):
        (folder / file).parent.mkdir(exist_ok=True)
        save_file({"x": torch.ones(1)}, folder / file)
    features, statistics = online(push, folder, name)
    assert f"{name}: {FEATURES} holds the mean features of every calibration sample. If the samples are" in features
    assert f"{name}: {STATISTICS} holds statistics and fingerprints of samples. If the samples are" in statistics
    assert "pass --private, or delete the file first" in online(command, "push", folder, name)[2]
    assert online(partial(push, private=True), folder, f"{name}-private") == []


def test_statistics_go_up_compressed(hub, online, folder, name, tmp_path):
    entry = InputStatistics(torch.randn(8, 8).triu(), torch.randn(8), 8)
    exact = ActivationStatistics({"a": entry}, {"a.weight": "a"}).save(folder).read_bytes()
    status, *_ = online(command, "push", folder, name, "--compress-statistics", 3, "--private")
    assert status == 0
    repo = hub.repos[name]
    (tmp_path / STATISTICS).write_bytes(repo.commits[repo.refs["main"]][STATISTICS])
    pushed = ActivationStatistics.load(tmp_path / STATISTICS)
    assert (pushed.provenance.compressed_rank, len(pushed["a.weight"].factor)) == (3, 3)
    assert repo.commits[repo.refs["main"]]["config.json"] == b"{}"
    assert (folder / STATISTICS).read_bytes() == exact
    (folder / STATISTICS).unlink()
    status, _, errors = online(command, "push", folder, name, "--compress-statistics", 3)
    assert (status, f"there is no {STATISTICS} in it. Leave --compress-statistics out." in errors) == (2, True)


def files_of(hub, name: str) -> dict[str, bytes]:
    repo = hub.repos[name]
    return repo.commits[repo.refs["main"]]


def test_the_card_that_is_pushed_loads_from_the_repository_and_the_folder_stays_as_it_is(online, hub, folder, name):
    (folder / "heads").mkdir()
    (folder / "heads" / "head.txt").symlink_to(folder / "config.json")  # as in a cache of the Hub
    card = '---\ntags:\n- merge\n---\n```python\nmodel = BertModel.from_pretrained("path/to/this/model")\n```\n'
    (folder / "README.md").write_text(card)
    for repository in (name, f"{name}-again"):
        online(push, folder, repository)
        pushed = files_of(hub, repository)["README.md"].decode()
        assert pushed == card.replace("path/to/this/model", repository)
        assert files_of(hub, repository)["heads/head.txt"] == b"{}"
    assert (folder / "README.md").read_text() == card
