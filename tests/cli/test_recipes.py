"""One recipe drives inspect, calibrate, merge, evaluate and compare; flags take YAML."""

import json

import pytest
import yaml

from hf_esm import ActivationStatistics, evaluate, merge_models
from hf_esm.cli.main import main
from support.toys import LABELS, texts, weights, write_models, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and data, whose columns have other names in each file, and a recipe of all."""
    folder = write_models(tmp_path_factory.mktemp("recipes"))
    for seed, (task, column) in enumerate({"a": "first", "b": "second"}.items()):
        rows = [{column: text, "gold": LABELS[task][i % 2]} for i, text in enumerate(texts(seed, count=12))]
        write_rows(folder / f"{task}.jsonl", rows)
    recipe = {
        "base": "base",
        "experts": {"a": "a", "b": {"path": "b", "weight": 0.5}},
        "calibration": data("a.jsonl", "b.jsonl"),
        "validation": data("a.jsonl", "b.jsonl", label="gold"),
        "test": data("a.jsonl", "b.jsonl", label="gold"),
        "method": "esm",
        "alpha": "auto",
        "methods": ["mean", "tsv-m"],
        "pictures": "none",
        "num_test": 8,
        "num_samples": 6,
        "dtype": "bf16",
        "statistics_dir": str(folder / "statistics"),
        "output_dir": str(folder / "merged"),
        "progress": False,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def data(a, b, **columns):
    """Data of both tasks, with the columns of each."""
    return {
        "a": {"path": str(a), "columns": {"text": "first", **columns}},
        "b": {"path": str(b), "columns": {"text": "second", **columns}},
    }


def run(*words):
    return main([str(word) for word in words])


def test_one_recipe_drives_all_five_commands(folder, capsys):
    recipe = folder / "recipe.yaml"
    assert run("inspect", recipe) == 0
    assert "esm merge of 2 experts" in capsys.readouterr().out
    assert run("calibrate", recipe) == 0
    assert f"hf-esm merge {recipe} --calibration {folder / 'statistics'}" in capsys.readouterr().out
    assert ActivationStatistics.load(folder / "statistics" / "a.safetensors").provenance.num_samples == 6
    assert run("merge", recipe) == 0
    assert run("merge", recipe, "--calibration", folder / "statistics", "--output-dir", folder / "again") == 0
    assert run("inspect", recipe) == 0  # the output exists by now
    assert run("evaluate", recipe, "--json", folder / "scores.json") == 0
    rows = data(folder / "a.jsonl", folder / "b.jsonl", label="gold")
    experts = {task: folder / task for task in "ab"}
    expected = evaluate(folder / "merged", rows, experts=experts, base=folder / "base", num_samples=8)
    assert json.loads((folder / "scores.json").read_text()) == json.loads(json.dumps(expected.as_dict()))
    assert run("compare", recipe) == 0
    assert (folder / "merged-report" / "report.md").is_file()
    assert sorted(path.name for path in (folder / "merged").glob("report*")) == []
    assert run("compare", recipe, "--output-dir", folder / "named", "--methods", "mean") == 0
    assert (folder / "named" / "report.md").is_file()


def test_every_flag_by_task_takes_yaml_and_so_does_a_method(folder, tmp_path, capsys):
    files = data(folder / "a.jsonl", folder / "b.jsonl", label="gold")
    of_task = {task: json.dumps(entry) for task, entry in files.items()}
    command = ["--base", json.dumps({"path": str(folder / "base")}), "--method", "{name: esm, gamma: 0.4}"]
    for task, entry in of_task.items():
        command += ["--expert", f"{task}={json.dumps({'path': str(folder / task)})}"]
        command += ["--calibration", f"{task}={entry}", "--validation", f"{task}={entry}"]
    command += ["--alpha", "auto", "--no-progress"]
    assert run("merge", *command, "--output-dir", tmp_path / "found") == 0
    merge_models(
        folder / "base",
        {task: folder / task for task in "ab"},
        method={"name": "esm", "gamma": 0.4},
        calibration=files,
        validation=files,
        alpha="auto",
        output_dir=tmp_path / "expected",
        progress=False,
    )
    found, expected = weights(tmp_path / "found"), weights(tmp_path / "expected")
    assert all(found[name].equal(weight) for name, weight in expected.items())
    words = [word for task, entry in of_task.items() for word in ("--test", f"{task}={entry}")]
    assert run("evaluate", tmp_path / "found", *words) == 0
    assert "average" in capsys.readouterr().out


def test_a_recipe_is_for_all_experts(folder, capsys):
    assert run("calibrate", folder / "recipe.yaml", folder / "a.jsonl") == 2
    assert "is a recipe, which names the samples. Leave" in capsys.readouterr().err
