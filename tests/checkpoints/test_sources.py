"""Models from the Hub and to it, through the real client, against a local server.

The client reads where the Hub is when it is imported: what talks to it runs in a process of its own, as functions of
this module.
"""

import contextlib
import io
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, metadata_load
from transformers import AutoModel

from hf_esm import HfEsmError, calibrate, evaluate, load_recipe, load_task_model, merge_models
from hf_esm.checkpoints.layout import STATISTICS_FILE
from hf_esm.cli.main import main
from support.helpers import perturbed
from support.hub import ABSENT, TOKEN, process
from support.hub_server import HubServer
from support.toys import base_model, classifier, lora_adapter, texts, weights, write_models, write_rows


pytestmark = pytest.mark.hub


CALIBRATION = {task: texts(seed) for seed, task in enumerate("abc")}
quiet = partial(merge_models, progress=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The toy models, with weights too large for the first bytes of a file, licences, and statistics for two."""
    folder = write_models(tmp_path_factory.mktemp("models"), vocabulary=4000, base_name="me/base")
    for name in ("base", "a", "b"):
        (folder / name / "README.md").write_text("---\nlicense: mit\n---\n")
    shutil.copytree(folder / "b", folder / "b-later")
    perturbed(classifier(base_model(4000), "b"), 0.05, 99).save_pretrained(folder / "b-later")
    lora_adapter(base_model(4000), "c", "me/base", seed=8).save_pretrained(
        folder / "c-lora-later", save_embedding_layers=False
    )
    shutil.copytree(folder / "a", folder / "broken")
    (folder / "broken" / "model.safetensors").write_bytes(b"broken weights")
    shutil.copytree(folder / "a", folder / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, beside in {"c-lora-described": "config.json", "c-lora-and-model": "*"}.items():
        shutil.copytree(folder / "c-lora", folder / name)
        for path in (folder / "base").glob(beside):
            shutil.copy(path, folder / name)
    for task in "ac":
        model, base = folder / {"a": "a", "c": "c-lora"}[task], {"c": folder / "base"}.get(task)
        statistics = calibrate(model, CALIBRATION[task], base=base, progress=False)
        statistics.save(shutil.copytree(model, folder / f"{task}-data-free"))
    return folder


@pytest.fixture(scope="module")
def hub():
    server = HubServer({TOKEN: "me", "hf_other": "other"}).start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def online(hub, models, home):
    """A process with the toy models on the Hub."""
    with process(hub, home) as run:
        run(push_models, models)
        yield run


def push_models(folder: Path) -> None:
    api = HfApi(token=TOKEN)
    twins = {"secret": "b", "dry-base": "base", "dry-a": "a-data-free", "dry-c": "c-data-free"}
    for name in (
        "base",
        "a",
        "b",
        "c-lora",
        "a-data-free",
        "c-data-free",
        "empty",
        "broken",
        "c-lora-described",
        "c-lora-and-model",
        *twins,
    ):
        api.create_repo(f"me/{name}", private=name == "secret")
        api.upload_folder(repo_id=f"me/{name}", folder_path=folder / twins.get(name, name))
    api.create_tag("me/b", tag="v1")
    for name in ("b", "c-lora"):
        api.upload_folder(repo_id=f"me/{name}", folder_path=folder / f"{name}-later")


def commits(hub: HubServer, name: str) -> list[str]:
    """The commits of a repository, from the first with files."""
    return list(hub.repos[f"me/{name}"].commits)[1:]


def experts(hub: HubServer) -> dict[str, Any]:
    """Experts named in every way; the last two are pinned to commits that have been replaced since."""
    pinned = {"path": "me/c-lora", "revision": commits(hub, "c-lora")[0]}
    return {"a": "me/a", "b": "me/b@v1", "c": pinned}


def merge_and_push(experts: dict[str, Any], output: Path) -> tuple[str, list[Optional[str]]]:
    result = quiet("me/base", experts, calibration=CALIBRATION, output_dir=output)
    result.push_to_hub("me/merged", private=True, token=TOKEN)
    return str(result.plan), [model.revision for model in (result.plan.base, *result.plan.experts.values())]


@pytest.fixture(scope="module")
def merged(hub, online, tmp_path_factory):
    """The folder of a merge of Hub models, its messages and requests, and the commits in its plan."""
    hub.log.clear()
    output = tmp_path_factory.mktemp("hub") / "merged"
    plan, revisions = online(merge_and_push, experts(hub), output)
    return output, plan, revisions, list(hub.log)


def same_weights(found: Path, expected: Path) -> bool:
    found, expected = weights(found), weights(expected)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_models_of_the_hub_merge_as_their_folders_do_at_the_commits_asked_for(models, merged, tmp_path):
    local = {"a": models / "a", "b": models / "b", "c": models / "c-lora"}
    quiet(models / "base", local, calibration=CALIBRATION, output_dir=tmp_path / "expected")
    assert same_weights(merged[0], tmp_path / "expected")
    for task in ("b", "c"):
        later = {**local, task: models / f"{local[task].name}-later"}
        quiet(models / "base", later, calibration=CALIBRATION, output_dir=tmp_path / task)
        assert not same_weights(merged[0], tmp_path / task)


def test_every_revision_is_resolved_once_and_recorded(hub, merged):
    output, plan, revisions, log = merged
    expected = [commits(hub, name)[0] for name in ("base", "a", "b", "c-lora")]
    assert revisions == expected
    recipe = yaml.safe_load((output / "merge_recipe.yaml").read_text())
    recorded = [recipe["base"], *recipe["experts"].values()]
    names = ["me/base", "me/a", "me/b", "me/c-lora"]
    assert recorded == [{"path": name, "revision": sha} for name, sha in zip(names, expected)]
    assert f"  b: me/b @ {expected[2][:12]}, BertForSequenceClassification, 3 labels" in plan
    assert "licences   base: mit; a: mit; b: mit; c: not stated" in plan
    for name, revision in (("base", "main"), ("a", "main"), ("b", "v1")):
        by_name = [r.path for r in log if f"me/{name}/" in r.path and f"/{revision}" in r.path and r.status < 300]
        assert len(by_name) == 1, by_name


def repeat(recipe: Path, output: Path) -> None:
    quiet(**load_recipe(recipe), output_dir=output)


def test_the_recipe_repeats_the_merge_from_the_same_commits(online, merged, tmp_path):
    online(repeat, merged[0] / "merge_recipe.yaml", tmp_path / "again")
    assert same_weights(merged[0], tmp_path / "again")


def merge_offline(experts: dict[str, Any], output: Path) -> list[Optional[str]]:
    plan = quiet("me/base", experts, calibration=CALIBRATION, output_dir=output).plan
    return [model.revision for model in (plan.base, *plan.experts.values())]


def test_what_is_in_the_cache_merges_offline(hub, online, home, models, merged, tmp_path):
    output, _, revisions, _ = merged
    online(inspect, models)  # leaves the headers of `me/dry-a` alone
    hub.log.clear()
    with process(hub, home, offline=True) as run:
        assert run(merge_offline, experts(hub), tmp_path / "offline") == revisions
        absent = run(refusal, {"a": "me/a", "b": "me/never-asked-for"})
        without_weights = run(refusal, {"a": "me/a", "b": "me/dry-a"})
    for name, said in (("never-asked-for", absent), ("dry-a", without_weights)):
        assert said.startswith(f"expert 'b' (me/{name}): neither a folder nor wholly in the local cache")
    assert same_weights(output, tmp_path / "offline")
    assert hub.log == []


def refusal(experts: dict[str, Any], **arguments: Any) -> str:
    """The message of the one error."""
    try:
        quiet("me/base", experts, method="mean", **arguments)
    except HfEsmError as error:
        return str(error)
    return "nothing"


REFUSED = {  # the second expert, the token, and what the error says
    "unknown": ("me/nothing", None, ABSENT),
    "unknown tag": ("me/b@v9", None, "there is no such branch, tag or commit in the repository."),
    "unknown commit": (f"me/b@{'0' * 40}", None, "there is no such branch, tag or commit in the repository."),
    "no id": ("me/no thing", None, "neither a folder nor a Hub id."),
    "private": ("me/secret", None, ABSENT),
    "private, another's token": ("me/secret", "hf_other", ABSENT),
    "a token of nobody": ("me/secret", "hf_nobody", "the access token is missing, wrong or expired"),
    "two models": ("me/c-lora-and-model", None, "holds a full model and a PEFT adapter"),
    "no weights": ("me/empty", None, "there are no safetensors weights in it"),
    "a broken file": ("me/broken", None, "cannot be read"),
}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(("expert", "token", "message"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_cannot_be_had_is_one_clear_error(online, tmp_path, expert, token, message, dry_run):
    arguments = {"token": token, "output_dir": tmp_path / "out", "dry_run": dry_run}
    said = online(partial(refusal, {"a": "me/a", "b": expert}, **arguments))
    assert said.startswith(f"expert 'b' ({expert}): ")
    assert message in said
    assert "\n" not in said
    assert not list(tmp_path.iterdir())


def test_a_private_model_merges_with_its_owners_token(online):
    assert online(partial(refusal, {"a": "me/a", "b": "me/secret"}, token=TOKEN)) == "nothing"


def inspect(folder: Path) -> tuple[str, str]:
    """The plan of the dry run, and of that of the same models in folders."""
    plans = (
        quiet("me/dry-base", {"a": "me/dry-a", "c": "me/dry-c"}, method="mean", dry_run=True),
        quiet(folder / "base", {"a": folder / "a", "c": folder / "c-lora"}, method="mean", dry_run=True),
    )
    return tuple(str(plan).partition("  merged")[2].partition("  time")[0] for plan in plans)


def test_a_dry_run_downloads_no_weights(hub, online, home, models):
    hub.log.clear()
    from_hub, from_folders = online(inspect, models)
    assert from_hub == from_folders
    assert "12 linear maps" in from_hub
    size = (models / "a" / "model.safetensors").stat().st_size
    for name in ("dry-base", "dry-a"):
        read = [r for r in hub.log if r.path.startswith(f"/me/{name}/resolve/") and r.path.endswith(".safetensors")]
        assert 0 < sum(r.sent for r in read) < size / 2
        assert all(r.path.endswith("/model.safetensors") for r in read)
    # Of an adapter, what it changes is in the weights alone; they are small.
    found = {path.name for path in (home / "hub").glob("models--me--dry-*/snapshots/*/*.safetensors")}
    assert found == {"adapter_model.safetensors"}


def kinds(folder: Path) -> list[str]:
    """What an adapter is that has the config of a model beside it, on the Hub and in a folder."""
    experts = {"a": "me/a", "hub": "me/c-lora-described", "local": folder / "c-lora-described"}
    plan = quiet("me/base", experts, method="mean", dry_run=True)
    return [plan.experts[task].kind for task in ("hub", "local")]


def test_an_adapter_beside_a_config_is_an_adapter(online, models):
    assert online(kinds, models) == ["LoRA adapter"] * 2


def merge_without_data(output: Path) -> list[str]:
    return quiet("me/base", {"a": "me/a-data-free", "c": "me/c-data-free"}, output_dir=output).warnings


def test_experts_with_statistics_need_no_calibration(models, online, tmp_path):
    assert online(merge_without_data, tmp_path / "found") == []
    files = {task: models / f"{task}-data-free" / STATISTICS_FILE for task in "ac"}
    local = {"a": models / "a", "c": models / "c-lora"}
    quiet(models / "base", local, calibration=files, output_dir=tmp_path / "expected")
    assert same_weights(tmp_path / "found", tmp_path / "expected")


@torch.no_grad()
def logits(model: str) -> list[torch.Tensor]:
    """Of the merged body, and of each task's model."""
    ids = torch.arange(5, 12)[None]
    body = AutoModel.from_pretrained(model, token=TOKEN)(ids).last_hidden_state
    return [body] + [load_task_model(model, task, token=TOKEN)(ids).logits for task in "abc"]


def test_a_pushed_merge_loads_back_without_its_calibration_samples(hub, online, merged):
    repo = hub.repos["me/merged"]
    assert repo.private
    (sha,) = commits(hub, "merged")
    on_disk = {str(path.relative_to(merged[0])) for path in merged[0].rglob("*") if path.is_file()}
    samples = {f"calibration/{task}.safetensors" for task in "abc"}
    assert samples < on_disk
    assert repo.commits[sha].keys() - {".gitattributes"} == on_disk - samples
    assert {"model.safetensors", "config.json", "merge_recipe.yaml", "README.md"} < on_disk
    found, expected = online(logits, "me/merged"), logits(str(merged[0]))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert {x.shape[-1] for x in found[1:]} == {2, 3, 4}


def push_publicly(folder: Path) -> None:
    api = HfApi(token=TOKEN)
    api.create_repo("me/public")
    api.upload_folder(repo_id="me/public", folder_path=folder, ignore_patterns=["calibration/*"])
    api.create_tag("me/public", tag="v1")


def score(model: str, rows: str) -> tuple[dict[str, float], int, str]:
    """By the API and by the command line, with an adapter from the Hub as expert."""
    scores = evaluate(model, {"c": rows}, experts={"c": "me/c-lora"})
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = main(["evaluate", model, "--data", f"c={rows}", "--expert", "c=me/c-lora"])
    return scores.as_dict(), status, out.getvalue()


def test_a_merge_on_the_hub_is_evaluated_there(models, online, merged, tmp_path):
    rows = write_rows(tmp_path / "c.jsonl", [{"text": text, "label": i % 4} for i, text in enumerate(texts(9, 12))])
    online(push_publicly, merged[0])
    local = evaluate(merged[0], {"c": rows}, experts={"c": models / "c"}).as_dict()
    for name in ("me/public", "me/public@v1"):
        scores, status, said = online(score, name, rows)
        assert scores["model"] == local["model"]
        assert status == 0
        assert f"{100 * scores['model']['c']:.1f}" in said
    with pytest.raises(HfEsmError, match="me/nothing"):
        online(score, "me/nothing", rows)


def load_card(model: str) -> dict[str, Any]:
    card = ModelCard.load(model, token=TOKEN)
    card.validate()
    return card.data.to_dict()


def test_the_card_is_valid_and_names_the_models_that_went_in(online, merged):
    readme = merged[0] / "README.md"
    expected = {
        "base_model": ["me/base", "me/a", "me/b", "me/c-lora"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["merge", "hf_esm", "esm"],
    }
    assert metadata_load(readme) == expected
    assert ModelCard.load(readme).data.to_dict() == expected
    assert online(load_card, "me/merged") == expected
    for row in (
        "| a | [`me/a`](https://huggingface.co/me/a) @ [`",
        "| c | [`me/c-lora`](https://huggingface.co/me/c-lora) @ [`",
        "| LoRA adapter | not stated |",
        "| BertForSequenceClassification | mit |",
    ):
        assert row in readme.read_text()
