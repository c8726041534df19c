"""Routed models with damaged files, on the Hub, and on the command line."""

import contextlib
import io
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import AutoPeftModel, PeftConfig, PeftModel
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from hf_esm import HfEsmError, RoutedModel, calibrate, evaluate, load_task_model
from hf_esm.cli.main import main
from hf_esm.hub import push_folder
from hf_esm.hub.changes import pushed_recipe, pushed_report
from support.hub import ABSENT, TOKEN, process
from support.hub_server import HubServer, Repo
from support.routed_toys import equal, expert, merge_bert, task_texts
from support.tiny import snapshot
from support.toys import LABELS, write_rows


pytestmark = pytest.mark.hub


TEXTS = [*task_texts("a", 7, 4), *task_texts("b", 8, 4)]


@pytest.fixture(scope="module")
def larger(models, merged):
    """The merged model with `c`, whose statistics are in its folder."""
    statistics = calibrate(models / "c", task_texts("c"), base=models / "base", progress=False)
    statistics.save(models / "c")
    return RoutedModel.from_pretrained(merged).add_expert("c", models / "c", output_dir=models / "larger").folder


@torch.no_grad()
def answers(model: str, **options: Any) -> tuple[list[str], dict[str, Tensor]]:
    """A model's tasks, and the logits of every task with its expert on the same texts."""
    routed = RoutedModel.from_pretrained(model, **options)
    batch = routed.processor(TEXTS, padding=True, return_tensors="pt")
    found = {}
    for task in routed.tasks:
        with routed.route(task):
            found[task] = routed.task_model(task)(**batch).logits
    return routed.tasks, found


def same(found: tuple, expected: tuple) -> bool:
    return found[0] == expected[0] and equal(found[1], expected[1])


def error_of(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(HfEsmError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- files that are not what was written


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the last tensor: the header stays whole
    path.write_bytes(content)


DAMAGES = {
    "the static model": ("model.safetensors", flip, "model.safetensors is damaged: its hash"),
    "the experts": ("routed/adapter_model.safetensors", flip, "routed/adapter_model.safetensors is damaged: its hash"),
    "their settings": ("routed/adapter_config.json", flip, "routed/adapter_config.json is damaged: its hash"),
    "the static model's settings": (
        "config.json",
        lambda path: path.write_text(path.read_text().replace("gelu", "relu")),
        "config.json is damaged: its hash",
    ),
    "a head's labels": (
        "heads/a/config.json",
        lambda path: path.write_text(path.read_text().replace("LABEL", "label") + " "),
        "heads/a/config.json is damaged: its hash",
    ),
    "hashes of another kind": ("hashes.json", lambda path: path.write_text("[1]"), "hashes.json is damaged"),
    "a head": ("heads/b/head.safetensors", flip, "heads/b/head.safetensors is damaged: its hash"),
    "no features": (
        "routed/router_features.safetensors",
        Path.unlink,
        "routed/router_features.safetensors is missing",
    ),
    "no head": ("heads/a/head.safetensors", Path.unlink, "heads/a/head.safetensors is missing"),
    "no hashes": ("hashes.json", Path.unlink, "hashes.json is missing"),
    "hashes of nothing": ("hashes.json", lambda path: path.write_text("{}"), "hashes.json is damaged"),
    "half the hashes": ("hashes.json", lambda path: path.write_text(path.read_text()[:40]), "hashes.json is damaged"),
    "no experts": ("routed/adapter_config.json", Path.unlink, "no experts in routed/"),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named(merged, tmp_path, name, damage, message):
    folder = shutil.copytree(merged, tmp_path / "model")
    assert same(answers(folder), answers(merged))
    damage(folder / name)
    assert error_of(RoutedModel.from_pretrained, folder).startswith(f"{folder}: {message}")


def test_calibration_samples_are_not_needed(merged, tmp_path):
    folder = shutil.copytree(merged, tmp_path / "model", ignore=shutil.ignore_patterns("calibration"))
    assert (merged / "calibration").is_dir()
    assert same(answers(folder), answers(merged))


def test_experts_are_refused_over_another_model(models, merged):
    other = AutoModel.from_pretrained(models / "base")
    assert "of another model than this BertModel" in error_of(PeftModel.from_pretrained, other, merged / "routed")
    PeftModel.from_pretrained(AutoModel.from_pretrained(merged), merged / "routed")


# ---- the Hub


@pytest.fixture(scope="module")
def online(hub, home, merged, larger):
    """A process that uses this Hub, on which `v1` of `me/routed` has two tasks, and `main` three."""
    with process(hub, home) as run:
        run(push_models, merged, larger)
        yield run


def push_models(merged: Path, larger: Path) -> None:
    routed = RoutedModel.from_pretrained(merged)
    routed.push_to_hub("me/routed", token=TOKEN)
    HfApi(token=TOKEN).create_tag("me/routed", tag="v1")
    RoutedModel.from_pretrained(larger).push_to_hub("me/routed", token=TOKEN)
    routed.push_to_hub("me/secret", private=True, token=TOKEN)
    routed.push_to_hub("me/static", token=TOKEN)
    routed.push_to_hub("me/adapter", base_model="me/static", token=TOKEN)


def files(hub: HubServer, name: str) -> dict[str, bytes]:
    repo = hub.repos[name]
    return {path: content for path, content in repo.commits[repo.refs["main"]].items() if path != ".gitattributes"}


def but_the_card(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files without the card, which names its repository."""
    return {path: content for path, content in files.items() if path != "README.md"}


def test_what_is_pushed_is_the_whole_folder_but_the_samples(hub, online, merged):
    on_disk = {str(path.relative_to(merged)): path for path in merged.rglob("*") if path.is_file()}
    samples = {name for name in on_disk if name.startswith("calibration/")}
    assert len(samples) == 2
    for name in ("me/static", "me/secret"):
        expected = {path: at.read_bytes() for path, at in on_disk.items() if path not in samples}
        expected["README.md"] = expected["README.md"].replace(b'"path/to/this/model"', f'"{name}"'.encode())
        recipe, report = (expected[file].decode() for file in ("merge_recipe.yaml", "merge_report.json"))
        expected |= {"merge_recipe.yaml": pushed_recipe(recipe).encode()}
        expected |= {"merge_report.json": pushed_report(report, recipe).encode()}
        assert files(hub, name) == expected
        assert not [path for path, content in expected.items() if str(merged.parent).encode() in content]
    assert b'RoutedModel.from_pretrained("me/static")' in files(hub, "me/static")["README.md"]
    assert hub.repos["me/secret"].private
    assert not hub.repos["me/static"].private
    card = ModelCard(files(hub, "me/static")["README.md"].decode())
    assert "esm++" in card.data.tags
    assert len(card.text) > 200


def test_a_pushed_model_comes_back_as_it_was_at_the_revision_asked_for(online, merged, larger):
    two, three = answers(merged), answers(larger)
    assert (len(two[0]), len(three[0])) == (2, 3)
    assert same(online(answers, "me/routed"), three)
    assert same(online(answers, "me/routed@v1"), two)
    assert same(online(load_at, "me/routed", "v1"), two)


def load_at(model: str, revision: Optional[str] = None, token: Optional[str] = None) -> tuple:
    return answers(model, revision=revision, token=token)


def test_a_private_model_is_its_owners(online, merged):
    assert error_of(online, load_at, "me/secret") == f"me/secret: {ABSENT}"
    assert same(online(load_at, "me/secret", None, TOKEN), answers(merged))


def test_what_is_in_the_cache_loads_offline(hub, online, home, larger):
    assert same(online(answers, "me/routed"), answers(larger))
    hub.log.clear()
    with process(hub, home, offline=True) as run:
        assert same(run(answers, "me/routed"), answers(larger))
        assert "nor wholly in the local cache" in error_of(run, answers, "me/nothing")
    assert hub.log == []


def twin(hub: HubServer, name: str) -> str:
    """The name of a copy of `me/static` that is in no cache."""
    known = hub.repos["me/static"]
    hub.repos[f"me/{name}"] = Repo(f"me/{name}", False, known.commits, dict(known.refs))
    return f"me/{name}"


def test_a_broken_connection_is_taken_up_where_it_broke(hub, online, merged):
    name = twin(hub, "cut")
    weights, any_file = f"GET .*{name}/resolve/.*adapter_model", f"HEAD .*{name}/resolve/"
    hub.faults |= {weights: ["cut", "drop"], any_file: ["503"]}
    hub.log.clear()
    assert same(online(answers, name), answers(merged))
    assert hub.faults[weights] == hub.faults[any_file] == []
    assert len([r for r in hub.log if r.method == "GET" and r.path.endswith("adapter_model.safetensors")]) == 3


@pytest.mark.cases(1)
@pytest.mark.parametrize(("fault", "message"), [("503", "503"), ("drop", "disconnected")])
def test_a_hub_that_fails_for_good_is_one_clear_error(hub, online, merged, fault, message):
    name = twin(hub, f"fails-{fault}")
    hub.faults[f"GET .*{name}/resolve/"] = [fault] * 1000
    try:
        said = error_of(online, answers, name)
    finally:
        hub.faults.clear()
    assert said.startswith(f"{name}: ")
    assert message in said
    assert same(online(answers, name), answers(merged))


def test_a_corrupt_download_is_downloaded_again(hub, online, merged):
    name = twin(hub, "corrupt")
    hub.faults[f"GET .*{name}/.*adapter_model.safetensors"] = ["flip"]
    assert same(online(answers, name), answers(merged))


@pytest.mark.cases(1)
@pytest.mark.parametrize("asked", ["POST .*/repos/create", "PUT .*/lfs/"])
def test_a_push_whose_connection_breaks_is_one_clear_error(hub, online, merged, asked):
    hub.faults[asked] = ["drop"] * 1000
    hub.blobs.clear()
    try:
        said = error_of(online, push, merged, "me/static", {})
    finally:
        hub.faults.clear()
    assert said.startswith("me/static: the connection to the Hub broke")
    online(push, merged, "me/static", {})


def test_a_task_that_has_gone_goes_from_the_hub_too(hub, online, merged, larger):
    online(push, larger, "me/changing", {})
    assert "heads/c/config.json" in files(hub, "me/changing")
    online(push, merged, "me/changing", {})
    assert {name for name in files(hub, "me/changing") if name.startswith("heads/")} == {
        name for name in files(hub, "me/static") if name.startswith("heads/")
    }


def test_gates_that_are_folded_now_go_from_the_hub_too(hub, online, tmp_path):
    for name, parts in {"kept": ["config.json", "refined/adapter_config.json"], "folded": ["config.json"]}.items():
        for part in parts:
            (tmp_path / name / part).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / part).write_text(f'"{name}"')
        online(partial(push_folder, token=TOKEN), tmp_path / name, "me/refined")
        assert sorted(set(files(hub, "me/refined")) - {".gitattributes"}) == parts


def test_a_push_survives_a_busy_hub(hub, online, merged):
    hub.faults["PUT .*/lfs/"] = ["503"]
    hub.blobs.clear()
    online(push_again, merged)
    assert hub.faults["PUT .*/lfs/"] == []
    assert but_the_card(files(hub, "me/again")) == but_the_card(files(hub, "me/static"))


def push_again(folder: Path) -> None:
    RoutedModel.from_pretrained(folder).push_to_hub("me/again", token=TOKEN)


@torch.no_grad()
def states(adapter: str) -> list[Tensor]:
    """Class of the static model, and hidden states with the adapter loaded by PEFT and by Transformers."""
    batch = {"input_ids": torch.arange(5, 17)[None]}
    models = [AutoPeftModel.from_pretrained(adapter), AutoModel.from_pretrained(adapter)]
    return [type(models[0].get_base_model()).__name__, *(model.eval()(**batch)[0] for model in models)]


def test_an_adapter_alone_finds_its_static_model(hub, online, merged):
    stored = files(hub, "me/adapter")
    assert stored.keys() >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not any(".safetensors" in name for name in stored.keys() - {"adapter_model.safetensors"})
    assert json.loads(stored["adapter_config.json"])["base_model_name_or_path"] == "me/static"
    card = ModelCard(stored["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == ("me/static", "peft")
    assert 'BertModel.from_pretrained("me/static")' in card.text and "2 tasks (a, b)" in card.text
    with torch.no_grad():
        expected = RoutedModel.from_pretrained(merged)(input_ids=torch.arange(5, 17)[None])[0]
    kind, *found = online(states, "me/adapter")
    assert kind == "BertModel"
    assert all(torch.equal(hidden, expected) for hidden in found)
    assert list(merged.parent.glob(".*")) == []  # nothing of the upload stays


def push_to_a_branch(folder: Path) -> None:
    RoutedModel.from_pretrained(folder).push_to_hub("me/branched", token=TOKEN)
    for _ in range(2):
        RoutedModel.from_pretrained(folder).push_to_hub("me/branched", token=TOKEN, revision="dev")


def test_a_push_to_a_branch_makes_it(hub, online, merged):
    online(push_to_a_branch, merged)
    assert hub.repos["me/branched"].refs.keys() >= {"main", "dev"}


def push(folder: Path, repo_id: str, options: dict) -> None:
    RoutedModel.from_pretrained(folder).push_to_hub(repo_id, token=TOKEN, **options)


@pytest.mark.parametrize(
    ("repo_id", "options", "message"),
    [
        ("me/static", {"private": True}, "me/static exists already, and is public"),
        ("me/a b", {}, "me/a b: the Hub refuses it"),
        ("me/new", {"base_model": "me/nope"}, "me/nope: not on the Hub, or private"),
        ("me/new", {"base_model": "me/static@main"}, "me/static@main is not the id of a model on the Hub"),
        ("me/new", {"base_model": "me/other"}, "me/other: its model.safetensors is not that of"),
    ],
)
def test_what_must_not_be_pushed_is_not(hub, online, merged, larger, models, tmp_path, repo_id, options, message):
    if "me/other" not in hub.repos:
        other = merge_bert(models, tmp_path / "other", "bc")
        online(push, other, "me/other", {})
    before = {name: files(hub, name) for name in hub.repos}
    assert message in error_of(online, push, merged, repo_id, options)
    assert {name: files(hub, name) for name in hub.repos} == before


# ---- the command line


def command(*arguments: Any) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def rows(models):
    """Rows of each task, labelled by its expert."""
    found = {}
    for task in "ab":
        texts = task_texts(task, 21, 12)
        tokenizer = AutoTokenizer.from_pretrained(models / task)
        with torch.no_grad():
            labels = [expert(task)(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for text in texts]
        lines = [{"text": text, "label": LABELS[task][label]} for text, label in zip(texts, labels)]
        found[task] = write_rows(models / f"{task}.jsonl", lines)
    return found


def test_predict_and_explain_say_what_the_api_says(merged, rows):
    routed, texts = RoutedModel.from_pretrained(merged), task_texts("b", 21, 12)
    for name, call in (("predict", routed.predict), ("explain", routed.explain)):
        status, out, _ = command(name, merged, rows["b"], "--batch-size", 5)
        assert status == 0
        said = [json.loads(line) for line in out.splitlines()]
        if name == "predict":
            assert [line.pop("input")["text"] for line in said] == texts  # in their order
        expected = [
            {n: v for n, v in vars(e).items() if name == "explain" or v != {}} for e in call(texts, batch_size=5)
        ]
        assert said == expected
    status, out, _ = command("predict", merged, rows["b"], "--probabilities")
    for line, expected in zip(out.splitlines(), routed.predict(texts, probabilities=True), strict=True):
        every = json.loads(line)["probabilities"]
        assert every == pytest.approx(expected.probabilities) and sum(every.values()) == pytest.approx(1)
        assert max(every, key=every.get) == expected.label and every[expected.label] == pytest.approx(expected.score)
    status, out, errors = command("explain", merged, rows["b"], "--quiet", "--batch-size", 5)
    assert [json.loads(line) for line in out.splitlines()] == said and errors == ""  # no bars of Transformers either
    status, out, _ = command("predict", merged, rows["b"], "--task", "a")
    assert {json.loads(line)["task"] for line in out.splitlines()} == {"a"}


def test_export_and_add_write_what_the_api_writes(models, merged, larger, tmp_path):
    status, out, _ = command("export", merged, "-o", tmp_path / "lora", "--task", "b")
    assert (status, out.splitlines()[0]) == (0, f"b: {tmp_path / 'lora' / 'b'}")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["b"]
    flags = ("--no-heads", "--base-model", "me/static")
    assert command("export", merged, "-o", tmp_path / "named", "--task", "a", *flags)[0] == 0
    config = PeftConfig.from_pretrained(tmp_path / "named" / "a")
    assert (config.base_model_name_or_path, config.modules_to_save) == ("me/static", None)
    PeftModel.from_pretrained(load_task_model(merged, "b"), tmp_path / "lora" / "b")
    PeftModel.from_pretrained(AutoModel.from_pretrained(merged), tmp_path / "named" / "a")
    words = ("add", merged, "--expert", f"c={models / 'c'}", "-o", tmp_path / "larger", "--json")
    status, out, _ = command(*words)
    assert (status, json.loads(out)) == (0, {"output_dir": str(tmp_path / "larger"), "tasks": ["a", "b", "c"]})
    assert same(answers(tmp_path / "larger"), answers(larger))
    texts = task_texts("c")
    (tmp_path / "c.txt").write_text("\n".join(texts))
    flags = ("--calibration", tmp_path / "c.txt", "--num-samples", "9", "--seed", "3")
    assert command("add", merged, "--expert", f"c={models / 'c'}", *flags, "-o", tmp_path / "read")[0] == 0
    given = {"calibration": texts, "num_samples": 9, "seed": 3, "output_dir": tmp_path / "expected"}
    expected = RoutedModel.from_pretrained(merged).add_expert("c", models / "c", **given)
    assert same(answers(tmp_path / "read"), answers(expected.folder))


def test_evaluate_routes_as_it_is_told(merged, rows, tmp_path):
    data = [part for task, path in rows.items() for part in ("--data", f"{task}={path}")]
    found = {}
    for route in ("routed", "oracle", "static"):
        status, out, _ = command("evaluate", merged, *data, "--route", route, "-o", tmp_path / route)
        assert status == 0
        found[route] = json.loads((tmp_path / route).read_text())
        assert found[route]["model"] == evaluate(merged, rows, route=route).model
        assert ("task found" in out) == (route == "routed")
    assert found["routed"]["routing"] == {"a": 1.0, "b": 1.0}
    assert found["oracle"]["model"] == {"a": 1.0, "b": 1.0}
    assert found["static"]["average"] < 1


def test_push_from_the_command_line(hub, online, merged, models):
    status, out, _ = online(command_with_token, "push", merged, "me/said", "--private")
    assert status == 0
    assert "me/said" in out
    assert hub.repos["me/said"].private
    assert but_the_card(files(hub, "me/said")) == but_the_card(files(hub, "me/static"))
    status, *_ = online(command_with_token, "push", merged, "me/said-adapter", "--adapter-over", "me/said")
    assert status == 0
    assert json.loads(files(hub, "me/said-adapter")["adapter_config.json"])["base_model_name_or_path"] == "me/said"
    status, _, errors = online(command_with_token, "push", merged, "other/said")
    assert status == 2
    assert errors == "hf-esm: other/said: the Hub refuses it (403 Forbidden).\n"
    assert "403" in errors


def command_with_token(*arguments: Any) -> tuple[int, str, str]:
    os.environ["HF_TOKEN"] = TOKEN
    try:
        return command(*arguments)
    finally:
        del os.environ["HF_TOKEN"]


WRONG = {
    "predict": (["predict", "{base}", "{rows}"], "no experts in routed/"),
    "predict, unknown task": (["predict", "{merged}", "{rows}", "--task", "c"], "no expert for 'c'; there are a, b"),
    "explain": (["explain", "{merged}", "{rows}.none"], "there is no file"),
    "export": (["export", "{merged}", "-o", "{out}", "--task", "c"], "no expert for 'c'; there are a, b"),
    "add, no name": (["add", "{merged}", "--expert", "c", "-o", "{out}"], "--expert takes NAME=VALUE, not 'c'"),
    "add": (["add", "{merged}", "--expert", "c={base}", "-o", "{out}"], "esm_statistics.safetensors: not a readable"),
    "push": (["push", "{base}", "me/never"], "not a folder that `hf-esm merge` wrote"),
    "push, no adapter": (["push", "{plain}", "me/never", "--adapter-over", "me/x"], "no experts in routed/"),
    "evaluate": (["evaluate", "{merged}", "--data", "c={rows}"], "no expert for 'c'; there are a, b"),
    "evaluate, unknown route": (["evaluate", "{merged}", "--data", "a={rows}", "--route", "x"], "invalid choice: 'x'"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_done_is_one_line_and_status_2(models, merged, rows, tmp_path, arguments, message):
    plain = models / "plain"
    if not plain.exists():
        merge_bert(models, plain, method="mean", rank=None)
    known = {"base": models / "base", "merged": merged, "rows": rows["a"], "out": tmp_path / "out", "plain": plain}
    before = snapshot(models)
    status, out, errors = command(*(argument.format(**known) for argument in arguments))
    assert (status, out) == (2, "")
    assert message in errors.splitlines()[-1]
    assert not list(tmp_path.iterdir())
    assert snapshot(models) == before
