"""Cards as the Hub takes them: their metadata, what their snippets load, and what changes with the experts."""

import json
import re
from dataclasses import replace

import pytest
import torch
import yaml

from hf_esm import Scores, merge_models, update_card
from hf_esm.checkpoints import ModelSource
from hf_esm.hub import licence_metadata, public_name
from hf_esm.hub.cards import write_adapter_card
from hf_esm.hub.changes import card_with_experts, pushed_card, pushed_recipe, pushed_report
from hf_esm.merging.card import write_card
from hf_esm.metrics.metric import ACCURACY
from hf_esm.metrics.scores import Outcome
from support.card_rules import LICENCES, checked_metadata
from support.routed_toys import task_texts, write_bert


COMMIT = "0123456789abcdef" * 2 + "01234567"
DATA = {"a": {"path": "glue", "name": "sst2", "split": "validation", "revision": COMMIT}, "b": [{"text": "t"}]}


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    models = write_bert(folder / "models")
    experts = {task: models / task for task in "ab"}
    calibration = {task: task_texts(task, 3, 24) for task in "ab"}
    return merge_models(
        models / "base", experts, method="esm++", calibration=calibration, output_dir=folder / "merged", progress=False
    )


def card_of(result, folder, licences, **sources):
    plan = replace(result.plan, licences=dict(zip(("base", "a", "b"), licences)))
    write_card(folder, replace(result, plan=plan), sources, [24, 24])
    return (folder / "README.md").read_text()


def test_the_card_of_local_models_tells_no_path_and_how_to_install(routed):
    card = (routed.output_dir / "README.md").read_text()
    metadata = checked_metadata(card, routed.output_dir, routed.output_dir.parent)
    assert "base_model" not in metadata and metadata["pipeline_tag"] == "feature-extraction"
    assert metadata["tags"] == ["merge", "hf_esm", "esm++"]
    assert "pip install hf_esm" in card and "(https://arxiv.org/abs/2602.20208)" in card
    assert "| the base | `base` | BertModel | not stated |" in card and "| a | `a` |" in card
    assert "No data chose the method or α" in card and "\n\n\n" not in card


def test_the_card_of_models_of_the_hub_links_them_and_their_commits(routed, tmp_path):
    sources = {name: ModelSource(name, repo_id=f"me/{name}", revision=COMMIT) for name in ("base", "a")}
    sources["b"] = ModelSource("b", repo_id="me/a", subfolder="b", revision=COMMIT)
    card = card_of(routed, tmp_path, ["mit", "mit", "mit"], **sources)
    metadata = checked_metadata(card, routed.output_dir.parent)
    assert metadata["base_model"] == ["me/base", "me/a"] and metadata["base_model_relation"] == "merge"
    assert metadata["license"] == "mit"
    assert "[`me/a`](https://huggingface.co/me/a)" in card


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (["mit", "mit"], {"license": "mit"}),
        (["Our own/licence!", "Our own/licence!"], {"license": "other", "license_name": "our-own-licence"}),
        (["mit", "apache-2.0"], {}),
        (["mit", "not stated"], {}),
        (["not stated"], {}),
    ],
)
def test_a_licence_is_one_that_the_hub_knows(stated, expected):
    assert licence_metadata(stated) == expected
    assert all(licence_metadata([licence]) == {"license": licence} for licence in LICENCES)


def test_names_of_models_are_links_or_folders_without_their_place(tmp_path):
    link = public_name("me/x", "me/x", COMMIT, None)
    page = "https://huggingface.co/me/x"
    assert link == f"[`me/x`]({page}) @ [`{COMMIT[:12]}`]({page}/tree/{COMMIT})"
    folder = tmp_path / "my models" / "bert of me"
    assert public_name(str(folder), None, None, folder) == "`bert of me`"
    for source, shown in (("/srv/models/x", "x"), ("me/x", "me/x")):
        assert public_name(f"a live Bert of {source}", None, None, None) == f"`a live Bert of {shown}`"
    assert public_name("", None, None, None) == "a live model"


def test_a_pushed_card_loads_from_the_repository_also_when_it_is_pushed_again(routed):
    card = (routed.output_dir / "README.md").read_text()
    first = pushed_card(card, "me/routed")
    assert "path/to/this/model" not in first and first.count('"me/routed"') == card.count('"path/to/this/model"') > 3
    assert first.replace("me/routed", "path/to/this/model") == card
    second = pushed_card(first, "you/other")
    assert '"me/routed"' not in second and second == pushed_card(card, "you/other")
    named = pushed_card("---\nmodel-index:\n- name: merged\n  results: []\n---\nmodel = 1\n", "you/other")
    assert named == "---\nmodel-index:\n- name: other\n  results: []\n---\nmodel = 1\n"


def test_a_pushed_recipe_names_no_folder_of_its_owner(tmp_path):
    recipe = {
        "base": {"path": "me/base", "revision": COMMIT},
        "experts": {"a": str(tmp_path / "my models" / "bert-a"), "b": {"path": r"C:\models\b", "task": "b"}},
        "calibration": {"a": "calibration/a.safetensors", "b": {"samples": str(tmp_path / "b.jsonl")}},
        "overrides": [{"match": "/query", "alpha": 0.5}],
    }
    note = "# After this merge, 'c' was added, from {} (licence: mit)."
    text = pushed_recipe(yaml.safe_dump(recipe) + f"\n{note.format(tmp_path / 'c')}\n")
    assert str(tmp_path) not in text and "C:" not in text
    assert text.splitlines()[:2] == [
        note.format("c"),
        "# Not on the Hub, so that only the name is left. Put the path of yours: experts.a, experts.b, "
        "calibration.b.samples.",
    ]
    recipe["experts"], recipe["calibration"]["b"] = (
        {"a": "bert-a", "b": {"path": "b", "task": "b"}},
        {"samples": "b.jsonl"},
    )
    assert yaml.safe_load(text) == recipe
    assert pushed_recipe(text) == text  # when it is pushed again
    report = json.dumps({"warnings": [f"{tmp_path / 'my models' / 'bert-a'}: its config differs."]})
    named = yaml.safe_dump({"experts": {"a": str(tmp_path / "my models" / "bert-a")}})
    assert pushed_report(report, named) == '{"warnings": ["bert-a: its config differs."]}'


def outcome(right, count):
    return Outcome(ACCURACY, torch.tensor([1.0] * right + [0.0] * (count - right)), torch.ones(count))


@pytest.fixture
def measured(routed, tmp_path):
    """A copy of the card's folder with scores of 40 rows of a and 20 of b, and the scores."""
    (tmp_path / "heads").mkdir()
    for task in "ab":
        (tmp_path / "heads" / task).mkdir()
        (tmp_path / "heads" / task / "config.json").write_bytes(
            (routed.output_dir / "heads" / task / "config.json").read_bytes()
        )
    (tmp_path / "README.md").write_bytes((routed.output_dir / "README.md").read_bytes())
    found = Scores(
        {"a": 0.75, "b": 0.5},
        {"a": 0.9, "b": 0.8},
        {"a": 0.25, "b": 0.6},
        outcomes={"a": outcome(30, 40), "b": outcome(10, 20)},
    )
    update_card(tmp_path, found, DATA)
    return tmp_path, found


def test_scores_have_rows_and_intervals_and_those_of_hub_data_a_file(measured):
    folder, found = measured
    card = (folder / "README.md").read_text()
    results = checked_metadata(card, folder)["model-index"][0]["results"]
    (metric,) = [r["metrics"][0] for r in results if r["dataset"]["type"] == "glue"]
    low, high = found.intervals["a"]
    assert metric["name"] == f"accuracy (n = 40, 95 % interval {low:.4g} to {high:.4g})"
    (entry,) = yaml.safe_load((folder / ".eval_results" / "hf_esm.yaml").read_text())
    assert entry == {
        "dataset": {"id": "glue", "task_id": "sst2", "revision": COMMIT},
        "value": 0.75,
        "notes": f"accuracy of split validation; n = 40, 95 % interval {low:.4g} to {high:.4g}; base 0.25; expert 0.9",
    }
    assert "![The scores as bars, with the experts as lines](scores.png)" in card
    assert (folder / "scores.png").stat().st_size > 5000
    update_card(folder, Scores({"b": 0.5}, {}), {"b": DATA["b"]})
    assert not (folder / ".eval_results" / "hf_esm.yaml").exists() and not (folder / "scores.png").exists()
    assert "scores.png" not in (folder / "README.md").read_text()


def test_other_experts_end_the_scores_and_are_named_in_snippets_and_metadata(measured):
    card = (measured[0] / "README.md").read_text()
    assert "## Results" in card
    more = card_with_experts(
        card, ["a", "b", "c"], "c came.", added="c", repo_id="me/c", licence="mit", labels=["x|y", "z"]
    )
    metadata = checked_metadata(more)
    assert metadata["base_model"] == ["me/c"] and "model-index" not in metadata and "## Results" not in more
    assert r"| c | x\|y, z |" in more and more.index("## Changes") < more.index("## Limits")
    fewer = card_with_experts(more, ["b", "c"], "a went.", removed="a")
    checked_metadata(fewer)
    assert "- c came.\n- a went.\n\n## Limits" in fewer
    labels = fewer.split("| task | labels |")[1].split("\n\n")[0]
    assert [line.split(" | ")[0] for line in labels.splitlines()[2:]] == ["| b", "| c"]
    assert 'route("b")' in fewer and 'load_task_model("path/to/this/model", "b")' in fewer and '"a"' not in fewer


def test_the_card_of_a_pushed_adapter_keeps_the_rules_and_loads_it(tmp_path):
    write_adapter_card(tmp_path, "me/static", ["a|b", "c"], True, "BertModel", "me/adapter")
    card = (tmp_path / "README.md").read_text()
    metadata = checked_metadata(card, tmp_path)
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("me/static", "adapter")
    assert re.search(r'PeftModel.from_pretrained\(static, "me/adapter"\)', card) and r"(a\|b, c)" in card
