"""What earlier versions wrote (`write_fixtures.py`) is loaded by this one, and answers as it did when it was written.

Everything goes through the public API, over a copy of the folder, since some of it is written to.
"""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file
from torch import Tensor
from write_fixtures import (
    ADAPTERS,
    RECIPE,
    SAMPLES,
    STATISTICS,
    TASKS,
    adapter_answers,
    changed_model,
    compressed_answers,
    routed_answers,
    router_answers,
    statistics_answers,
    task_answers,
)

from hf_esm import (
    ActivationStatistics,
    RoutedModel,
    calibrate,
    evaluate,
    load_recipe,
    load_task_model,
    merge_models,
    update_card,
)


FOLDERS = sorted((Path(__file__).parent / "fixtures").glob("written_by_*"))
MERGED = ("merged", "routed", "tsv_c")


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def written(request, tmp_path):
    """A copy of one version's folder, in another place than where it was written."""
    return shutil.copytree(request.param, tmp_path / "written")


@pytest.fixture
def expected(written):
    return load_file(written / "expected.safetensors")


@pytest.fixture
def inputs(expected):
    return {name: expected[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture
def texts(written):
    return (written / "texts.txt").read_text(encoding="utf-8").splitlines()


def assert_as_written(found: dict[str, Tensor], expected: dict[str, Tensor], prefix: str) -> None:
    """All answers whose names begin so, to a rounding."""
    assert found.keys() == {name for name in expected if name.split(".")[0] == prefix}
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        torch.testing.assert_close(
            tensor, expected[name], rtol=0, atol=1e-5, msg=lambda why, name=name: f"{name}: {why}"
        )


def test_there_are_folders_of_earlier_versions():
    assert FOLDERS


def test_a_merged_model_of_then_answers_with_every_head_as_it_did(written, expected, inputs):
    assert_as_written(task_answers(written / "merged", "merged", inputs), expected, "merged")


def test_a_routed_model_of_then_routes_and_answers_as_it_did(written, expected, inputs):
    model = RoutedModel.from_pretrained(written / "routed")
    assert model.tasks == list(TASKS)
    assert_as_written(routed_answers(model, "routed", inputs), expected, "routed")


def test_a_routed_model_of_then_reads_texts_and_names_task_and_label_as_it_did(written, expected, inputs, texts):
    model = RoutedModel.from_pretrained(written / "routed")
    encoded = model.processor(texts, padding=True, return_tensors="pt")
    for name, tensor in inputs.items():
        assert torch.equal(encoded[name], tensor)
    known = router_answers(model, texts)
    assert_as_written(known, expected, "router")
    found = model.predict(texts)
    assert [prediction.task for prediction in found] == [TASKS[i] for i in known["router.probabilities"].argmax(1)]
    assert [prediction.sure for prediction in found] == known["router.sure"].tolist()
    for row, prediction in enumerate(found):
        score, label = expected[f"routed.decided.{prediction.task}"][row].softmax(0).max(0)
        assert prediction.label == model.task_model(prediction.task).config.id2label[int(label)]
        assert prediction.score == pytest.approx(float(score), abs=1e-5)


def test_a_routed_model_of_then_is_written_again_as_it_was(written, expected, inputs, tmp_path):
    again = RoutedModel.from_pretrained(written / "routed").save_pretrained(tmp_path / "again")
    assert_as_written(routed_answers(RoutedModel.from_pretrained(again), "routed", inputs), expected, "routed")


def test_an_expert_of_then_is_taken_out_and_added_again_from_statistics_of_then(written, expected, inputs):
    """Which takes the features of the samples that the router is made from."""
    model = changed_model(written, written / "changed")
    assert model.tasks == ["b", "a"]
    assert_as_written(routed_answers(model, "changed", inputs), expected, "changed")


def test_an_expert_is_added_over_the_base_that_a_recipe_of_then_names(written, expected, inputs):
    smaller = RoutedModel.from_pretrained(written / "routed").remove_expert("b", output_dir=written / "smaller")
    model = smaller.add_expert("c", written / "a", written / STATISTICS, output_dir=written / "larger")
    with torch.no_grad(), model.route("c"):
        found = {"routed.c": model.task_model("c")(**inputs).logits}
    assert_as_written(found, {"routed.c": expected["routed.forced.a"]}, "routed")


def test_a_compressed_model_of_then_answers_for_every_named_task_as_it_did(written, expected, inputs):
    assert_as_written(compressed_answers(written / "tsv_c", inputs), expected, "tsv_c")


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_then_gives_over_the_base_what_it_gave(written, expected, inputs, name):
    assert_as_written(adapter_answers(written, name, inputs), expected, name)


def test_a_routed_adapters_export_of_now_answers_as_its_experts_did(written, expected, inputs, tmp_path):
    RoutedModel.from_pretrained(written / "routed").export_lora(tmp_path / "lora")
    for task in TASKS:
        model = load_task_model(written / "routed", task)
        model.load_adapter(str(tmp_path / "lora" / task))
        with torch.no_grad():
            found = {f"routed.{task}": model(**inputs).logits}
        assert_as_written(found, {f"routed.{task}": expected[f"routed.forced.{task}"]}, "routed")


def test_statistics_of_then_hold_what_they_held(written, expected):
    assert_as_written(statistics_answers(written / STATISTICS), expected, "statistics")
    provenance = ActivationStatistics.load(written / STATISTICS).provenance
    assert (provenance.model, provenance.num_samples, provenance.compressed_rank) == ("a", 16, None)


def test_samples_of_then_calibrate_now_as_they_did(written, expected):
    """Those that the merge of `a` kept, from which its statistics were taken, too."""
    samples = written / "merged" / "calibration" / "a.safetensors"
    calibrate(written / "a", samples, base=written / "base", progress=False).save(written / "again.safetensors")
    assert_as_written(statistics_answers(written / "again.safetensors"), expected, "statistics")


def test_a_recipe_of_then_merges_from_statistics_and_samples_of_then(written, expected, inputs):
    recipe = load_recipe(written / RECIPE)
    assert recipe["calibration"] == {"a": str(written / STATISTICS), "b": str(written / SAMPLES)}
    merge_models(**recipe, output_dir=written / "again", progress=False)
    assert_as_written(task_answers(written / "again", "recipe", inputs), expected, "recipe")


@pytest.mark.parametrize("name", MERGED)
def test_the_recipe_in_a_folder_of_then_repeats_its_merge_in_its_place(written, expected, inputs, name):
    """From the samples that it kept; `overwrite` replaces only what it knows for a merge."""
    recipe = load_recipe(written / name / "merge_recipe.yaml")
    before = (written / name / "model.safetensors").stat().st_mtime_ns
    merge_models(**recipe, output_dir=written / name, overwrite=True, progress=False)
    assert (written / name / "model.safetensors").stat().st_mtime_ns > before
    if name == "merged":
        found = task_answers(written / name, name, inputs)
    elif name == "routed":
        found = routed_answers(RoutedModel.from_pretrained(written / name), name, inputs)
    else:
        found = compressed_answers(written / name, inputs)
    assert_as_written(found, expected, name)


@pytest.mark.parametrize("name", MERGED)
def test_a_model_of_then_is_evaluated_and_its_card_updated(written, expected, texts, name):
    heads = {"merged": "merged.{}", "routed": "routed.decided.{}", "tsv_c": "tsv_c.forced.{}"}[name]
    right = {task: expected[heads.format(task)].argmax(1).tolist() for task in TASKS}
    data = {task: [{"text": text, "label": label} for text, label in zip(texts, right[task])] for task in TASKS}
    data["b"][0]["label"] = (right["b"][0] + 1) % 3
    scores = evaluate(written / name, data)
    assert scores.model == pytest.approx({"a": 1, "b": 2 / 3})
    card = update_card(written / name, scores, data).read_text(encoding="utf-8")
    assert card.index("# Merged model") < card.index("## Results") < card.index("## Limits")
    metadata = metadata_load(written / name / "README.md")
    values = [result["metrics"][0]["value"] for result in metadata["model-index"][0]["results"]]
    assert values == pytest.approx([1, 2 / 3], abs=1e-6)
    assert metadata["tags"][:2] == ["merge", "hf_esm"]
