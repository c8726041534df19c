"""The cards of merged models and adapters, and scores in them."""

import json

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from hf_esm import HfEsmError, Scores, evaluate, merge_models, update_card
from hf_esm.cli.main import main
from hf_esm.hub.cards import write_adapter_card
from support.routed_toys import task_texts, write_bert


@pytest.fixture
def merged(tmp_path):
    models = write_bert(tmp_path / "models")
    experts = {task: models / task for task in "ab"}
    return merge_models(models / "base", experts, method="tsv-m", output_dir=tmp_path / "merged", progress=False)


def test_scores_are_evaluation_entries_and_a_table(merged, tmp_path):
    data = {task: [{"text": text, "label": 0} for text in task_texts(task)] for task in "ab"}
    experts = {task: merged.plan.experts[task].source for task in "ab"}
    scores = evaluate(merged.output_dir, data, experts=experts)
    update_card(merged.output_dir, scores, data)
    card = ModelCard.load(merged.output_dir / "README.md")
    name, entries = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "merged"
    found = {(e.task_type, e.dataset_name, e.metric_type, e.metric_value) for e in entries}
    assert found == {("text-classification", task, "accuracy", scores.model[task]) for task in "ab"}
    assert card.data.tags == ["merge", "hf_esm", "tsv-m"]
    results = card.text.split("## Results")[1].split("## Limits")[0]
    for task in "ab":
        assert f"| {task} | {100 * scores.model[task]:.1f} | {100 * scores.expert[task]:.1f} |" in results
    before = card.text.split("## Results")[0], card.text.split("## Limits")[1]
    assert "merge_recipe.yaml" in before[0]
    assert "each expert is usually better than the merged model" in before[1]


@pytest.mark.parametrize("decides", [True, False])
def test_the_card_of_an_adapter_says_how_experts_are_chosen_and_how_it_is_loaded(tmp_path, decides):
    write_adapter_card(tmp_path, "me/static", ["sst2", "mrpc"], decides, "BertModel", "me/adapter")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("me/static", "adapter")
    assert 'static = BertModel.from_pretrained("me/static")' in card.text
    assert 'with route(model, "sst2"):' in card.text
    text = " ".join(card.text.split())
    assert "A low-rank expert for each of 2 tasks (sst2, mrpc)" in text
    assert ("the router adds to each sample the experts of its likeliest tasks" in text) == decides
    assert ("the expert of the task that you name is added to each sample" in text) != decides


def test_later_scores_replace_earlier_ones_and_data_of_the_hub_are_named(merged):
    data = {"a": {"path": "glue", "name": "sst2", "split": "validation"}}
    for value in (0.5, 0.25):
        update_card(merged.output_dir, Scores({"a": value}, {}), data)
    card = ModelCard.load(merged.output_dir / "README.md")
    assert card.text.count("## Results") == card.text.count("## Limits") == 1
    assert "| a | 25.0 |" in card.text
    (entry,) = card.data.eval_results
    assert (entry.dataset_type, entry.dataset_config, entry.dataset_split) == ("glue", "sst2", "validation")
    assert entry.metric_value == 0.25


def test_entries_name_no_path_of_this_machine_and_no_score_that_there_is_none_of(merged, tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    data = {"a": {"path": str(tmp_path / "a.jsonl")}, "b": {"path": "csv", "data_files": "b.csv"}}
    update_card(merged.output_dir, Scores({"a": 0.5, "b": 0.25, "c": 0.125, "d": float("nan")}, {}), data)
    entries = ModelCard.load(merged.output_dir / "README.md").data.eval_results
    assert [entry.dataset_type for entry in entries] == ["a", "b", "c"]
    assert str(tmp_path) not in (merged.output_dir / "README.md").read_text().split("---")[1]


def test_the_command_writes_them_and_a_folder_without_a_card_is_refused(merged, tmp_path):
    rows = tmp_path / "a.jsonl"
    rows.write_text("\n".join(json.dumps({"text": text, "label": 0}) for text in task_texts("a")))
    assert main(["evaluate", str(merged.output_dir), f"--data=a={rows}", "--card"]) == 0
    assert "## Results" in (merged.output_dir / "README.md").read_text()
    with pytest.raises(HfEsmError, match="no model card"):
        update_card(tmp_path, Scores({"a": 1.0}, {}), {"a": []})
