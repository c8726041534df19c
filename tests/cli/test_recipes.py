"""One recipe drives inspect, calibrate, merge, evaluate and compare; flags take YAML."""

import json
import re
import shutil

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
    assert run("evaluate", recipe, "-o", folder / "scores.json") == 0
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


def wrong_rows(folder, task, rows):
    return {"path": write_rows(folder / "wrong.jsonl", rows)}


def validated(rows):
    """A change of the recipe: other validation rows for `a`."""
    return lambda recipe, folder: recipe["validation"].update(a=wrong_rows(folder, "a", rows))


def calibrated(rows):
    return lambda recipe, folder: recipe["calibration"].update(a=wrong_rows(folder, "a", rows))


def raw(name, content):
    """A change of the recipe: a file of this content as the samples of `a`."""

    def change(recipe, folder):
        (folder / name).write_text(content)
        recipe["calibration"]["a"] = str(folder / name)

    return change


BAD = {
    "an expert": lambda recipe, folder: recipe["experts"].update(a="none"),
    "an unknown key": lambda recipe, folder: recipe.update(alpha_=1),
    "an unknown setting": lambda recipe, folder: recipe.update(method={"name": "esm", "beta": 1}),
    "dtype": lambda recipe, folder: recipe.update(dtype="int8"),
    "heads": lambda recipe, folder: recipe.update(heads=["nothing"]),
    "metric": lambda recipe, folder: recipe.update(metric="acuracy"),
    "metric of another task": lambda recipe, folder: recipe.update(metric="mean-iou"),
    "a template": lambda recipe, folder: recipe.update(chat_template="z"),
    "tokens": lambda recipe, folder: recipe.update(tokenizer="z"),
    "memory": lambda recipe, folder: recipe.update(max_memory=100),
    "no samples": lambda recipe, folder: recipe.pop("calibration"),
    "samples that are not there": lambda recipe, folder: recipe["calibration"].update(a="none.jsonl"),
    "an empty file": raw("empty.jsonl", ""),
    "no JSON": raw("broken.jsonl", "{'text': no}\n"),
    "null": raw("null.jsonl", "null\n"),
    "a kind of file": raw("rows.pickle", "x"),
    "samples without text": calibrated([{"words": "good film"}]),
    "samples of numbers": calibrated([{"text": 3}]),
    "a column": lambda recipe, folder: recipe["calibration"]["a"]["columns"].update(text="third"),
    "damaged statistics": raw("damaged.safetensors", "{}"),
    "rows without label": validated([{"text": "good film"}]),
    "a class too many": validated([{"text": "good film", "label": 7}]),
    "an unknown label": validated([{"text": "good film", "label": "maybe"}]),
    "refining": lambda recipe, folder: recipe.update(refine={"step": 3}),
    "weights": lambda recipe, folder: (
        recipe["weights"].update(z=1) if "weights" in recipe else recipe.update(weights={"z": 1})
    ),
    "overrides": lambda recipe, folder: recipe.update(overrides=[{"match": "nothing", "alpha": 1}]),
    "disk": lambda recipe, folder: recipe.update(output_dir=str(folder / "no-room")),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_inspect_refuses_what_merge_refuses_in_the_same_sentence(folder, tmp_path, monkeypatch, capsys, change):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"output_dir": str(folder / "new")}
    change(recipe, folder)
    (folder / "bad.yaml").write_text(yaml.safe_dump(recipe))
    if "no-room" in recipe["output_dir"]:
        monkeypatch.setattr("shutil.disk_usage", lambda place: shutil._ntuple_diskusage(2, 1, 1))
    said = []
    for command in ("inspect", "merge"):
        assert run(command, folder / "bad.yaml") == 2, command
        said.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-esm: ")])
        said[-1] = [re.sub(r"needs [\d.]+ \w+ on", "needs … on", line) for line in said[-1]]  # as far as rows tell
    assert len(said[0]) == 1 and said[0] == said[1]
    assert not (folder / "new").exists()


def test_inspect_reads_the_first_row_of_test_files_and_no_other(folder, tmp_path, capsys):
    if not (folder / "merged").exists():
        assert run("merge", folder / "recipe.yaml") == 0
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    rows = [{"text": "good film", "label": 0}, {"text": "good film", "label": 7}]
    recipe["test"]["a"] = write_rows(folder / "rows.jsonl", rows)
    (folder / "other.yaml").write_text(yaml.safe_dump(recipe))
    assert run("inspect", folder / "other.yaml") == 0
    capsys.readouterr()
    write_rows(folder / "rows.jsonl", rows[::-1])
    assert run("inspect", folder / "other.yaml") == run("evaluate", folder / "other.yaml") == 2
    first, second = (line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-esm: "))
    assert "data of 'a': row 0" in first and "label 7" in first
    assert "label 7" in second
