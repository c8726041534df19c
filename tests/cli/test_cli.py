"""The command line, in this process: what every command does, says and refuses."""

import gc
import importlib.metadata
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import fields, is_dataclass

import pytest
import torch
import yaml
from accelerate import PartialState
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizerFast

from hf_esm import METHODS, ActivationStatistics, HfEsmError, __version__, evaluate, load_task_model, merge_models
from hf_esm.calibration.collection import collect_statistics
from hf_esm.cli.main import main
from hf_esm.cli.parser import COMMANDS, build_parser
from hf_esm.data.options import SampleOptions
from hf_esm.metrics import Scores
from hf_esm.planning.options import MergeOptions
from hf_esm.planning.refinement import RefineSettings
from support.tiny import SPECIAL, WORDS
from support.toys import LABELS, largest_difference, texts, weights, write_models, write_rows


SETTINGS = {"method": {"name": "esm", "gamma": 0.3}, "num_samples": 5, "progress": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The toy models, texts of every task, and a recipe of `a` and `b` with settings of its own."""
    folder = write_models(tmp_path_factory.mktemp("models"))
    for seed, task in enumerate(LABELS):
        rows = [{"text": text, "other": other} for text, other in zip(texts(seed), texts(seed + 10))]
        write_rows(folder / f"{task}.jsonl", rows)
    recipe = {
        "base": "base",
        "experts": {"a": "a", "b": "b"},
        "calibration": {"a": "a.jsonl", "b": "b.jsonl"},
        **SETTINGS,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def merged(models):
    """What the recipe says, by the Python API."""
    return merge(models, models / "merged")


def merge(models, output, tasks="ab", **changes):
    """The folder of a merge with the recipe's arguments, but for some changes."""
    experts = {task: models / task for task in tasks}
    calibration = {task: str(models / f"{task}.jsonl") for task in tasks}
    arguments = {"experts": experts, "calibration": calibration, **SETTINGS, **changes}
    return merge_models(models / "base", output_dir=output, **arguments).output_dir


def run(*arguments):
    """Exit status of a command, also where argparse leaves the process."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def named(flag, values):
    """`--flag NAME=VALUE` for every entry."""
    return [part for name, value in values.items() for part in (f"--{flag}", f"{name}={value}")]


def same_weights(found, expected):
    found, expected = weights(found), weights(expected)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


MERGES = {  # flags beside the recipe, and what they change in its arguments
    "numbers": (["--alpha", "0.5", "--num-samples", "3", "--seed", "2"], {"alpha": 0.5, "num_samples": 3, "seed": 2}),
    "another method": (["--method", "tsv-m"], {"method": "tsv-m"}),
    "a setting": (
        ["--set", "scale_all=true", "--alpha", "2"],
        {"method": {**SETTINGS["method"], "scale_all": True}, "alpha": 2},
    ),
    "settings": (
        ["--set", "gamma=0", "--set", "uncalibrated=[query, key]"],
        {"method": {"name": "esm", "gamma": 0, "uncalibrated": ["query", "key"]}},
    ),
    "a method and a setting": (
        ["--method", "esm-vit", "--set", "factor=3"],
        {"method": {"name": "esm-vit", "factor": 3}},
    ),
    "heads": (["--heads", "merge"], {"heads": "merge"}),
    "heads by name": (["--heads", "pooler", "encoder.layer.1"], {"heads": ["pooler", "encoder.layer.1"]}),
    "heads one by one": (
        ["--heads", "pooler", "--heads", "encoder.layer.1"],
        {"heads": ["pooler", "encoder.layer.1"]},
    ),
    "dtype": (["--dtype", "float16"], {"dtype": "float16"}),
    "columns": (["--columns", "text=other", "--max-length", "4"], {"columns": {"text": "other"}, "max_length": 4}),
    "refining": (
        ["--refine", "steps=2", "components=3"],
        {"refine": {"steps": 2, "components": 3}},
    ),
    "overrides": (
        ["--overrides", "{{kind: mlp, method: mean}}", "{{match: query, alpha: [0.5, 2]}}"],
        {"overrides": [{"kind": "mlp", "method": "mean"}, {"match": "query", "alpha": [0.5, 2]}]},
    ),
    "alpha by kind": (["--alpha", "{{attention: 0.5, mlp: 2}}"], {"alpha": {"attention": 0.5, "mlp": 2}}),
    "another expert": (["--expert", "c={}/c", "--calibration", "c={}/c.jsonl"], {"tasks": "abc"}),
}


@pytest.mark.cases(5)
@pytest.mark.slow
@pytest.mark.parametrize(("given", "changes"), MERGES.values(), ids=MERGES)
def test_flags_override_the_recipe(models, merged, tmp_path, given, changes):
    given = [flag.format(models) for flag in given]
    assert run("merge", models / "recipe.yaml", "--output-dir", tmp_path / "found", *given) == 0
    assert same_weights(tmp_path / "found", merge(models, tmp_path / "expected", **changes))
    assert not same_weights(tmp_path / "found", merged)


def test_a_merge_from_a_recipe_or_from_flags_alone(models, merged, tmp_path, capsys):
    assert run("merge", models / "recipe.yaml", "--output-dir", tmp_path / "recipe") == 0
    said = capsys.readouterr().out
    assert "esm: 2 experts merged, alpha 1 (the default)\n" in said and f"\n  written  {tmp_path / 'recipe'}\n" in said
    flags = ["--base", models / "base", "--set", "gamma=0.3", "--num-samples", 5, "--no-progress"]
    flags += named("expert", {task: models / task for task in "ab"})
    flags += named("calibration", {task: models / f"{task}.jsonl" for task in "ab"})
    assert run("merge", *flags, "--output-dir", tmp_path / "flags") == 0
    assert same_weights(tmp_path / "recipe", merged)
    assert same_weights(tmp_path / "flags", merged)


def test_progress_bars_have_names_and_can_be_turned_off(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bars = ("Checking weights", "Calibrating a", "Calibrating b", "Merging", "Writing")
    assert run("merge", models / "recipe.yaml", "--output-dir", tmp_path / "quiet") == 0
    assert capsys.readouterr().err == ""
    assert run("merge", models / "recipe.yaml", "--output-dir", tmp_path / "loud", "--progress") == 0
    said = capsys.readouterr()
    assert [bar for bar in bars if f"{bar}:" not in said.err] == []
    assert [bar for bar in bars if f"{bar}:" in said.out] == []


def test_an_existing_folder_is_replaced_on_request_alone(models, merged, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    command = ["merge", models / "recipe.yaml", "--output-dir", tmp_path / "out"]
    assert run(*command) == run(*command, "--overwrite") == 2
    assert (tmp_path / "out" / "precious").exists()
    (tmp_path / "out" / "merge_recipe.yaml").touch()  # what was merged before
    assert run(*command) == 2
    assert run(*command, "--overwrite") == 0
    assert same_weights(tmp_path / "out", merged)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_alpha_is_chosen_on_validation_files(models, tmp_path, capsys):
    rows = {t: [{"text": text, "label": LABELS[t][i % 2]} for i, text in enumerate(texts(3))] for t in "ab"}
    files = {task: write_rows(tmp_path / f"{task}.jsonl", rows[task]) for task in rows}
    command = ["merge", models / "recipe.yaml", "--alpha", "auto", *named("validation", files)]
    assert run(*command, "--output-dir", tmp_path / "found") == 0
    merge(models, tmp_path / "expected", alpha="auto", validation=rows)
    reports = [json.loads((tmp_path / name / "merge_report.json").read_text()) for name in ("found", "expected")]
    assert reports[0]["alpha_scores"] == reports[1]["alpha_scores"] != {}
    assert same_weights(tmp_path / "found", tmp_path / "expected")


def test_inspect_says_what_a_merge_would_do_and_reads_no_weight(models, tmp_path, capsys):
    broken = shutil.copytree(models / "b", tmp_path / "broken")
    nothing = {name: torch.full_like(weight, torch.nan) for name, weight in weights(broken).items()}
    save_file(nothing, broken / "model.safetensors", {"format": "pt"})
    command = [models / "recipe.yaml", "--expert", f"b={broken}", "--output-dir", tmp_path / "out"]
    assert run("inspect", *command) == 0
    said = capsys.readouterr().out
    for part in (
        "esm merge of 2 experts",
        f"a: {models / 'a'}, BertForSequenceClassification, 2 labels, keeps 4 weights of its own",
        f"b: {broken}, BertForSequenceClassification, 3 labels",
        "merged     12 linear maps, 3 other matrices, 22 other parameters",
        "untouched  2 weights of the base",
        "licences   base: not stated; a: not stated; b: not stated",
        "disk",
        "memory",
        "time",
    ):
        assert part in said
    assert run("merge", *command) == 2
    assert "NaN" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("expert", ["c", "c-lora"])
def test_statistics_that_calibrate_writes_stand_for_the_data(models, tmp_path, capsys, expert):
    files = {"a": tmp_path / "a.safetensors", "c": tmp_path / "c"}  # a file, and a folder to write it into
    for task, model in (("a", "a"), ("c", expert)):
        base = ["--base", models / "base"] if model == "c-lora" else []
        command = [models / model, models / f"{task}.jsonl", "-o", files[task], "--num-samples", 5, "--seed", 3]
        assert run("calibrate", *command, *base) == 0
    said = capsys.readouterr().out
    assert f"{files['a']}: 14 linear maps, 5 samples\n" in said
    assert str(files["c"] / "esm_statistics.safetensors") in said
    experts = {"a": models / "a", "c": models / expert}
    found = merge(models, tmp_path / "found", "ac", experts=experts, calibration=files)
    expected = merge(models, tmp_path / "expected", "ac", experts=experts, seed=3)
    assert largest_difference(weights(found), weights(expected)) < 1e-5
    assert not same_weights(found, merge(models, tmp_path / "other", "ac", experts=experts))


def test_calibrate_keeps_within_the_memory_it_is_given(models, tmp_path, monkeypatch):
    folders = []
    collect = collect_statistics
    spy = lambda *args, **kwargs: folders.append(kwargs["folder"]) or collect(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr("hf_esm.calibration.calibrator.collect_statistics", spy)
    command = ["calibrate", models / "a", models / "a.jsonl", "-o", tmp_path / "a.safetensors"]
    for memory in ("1GB", "100KB"):
        assert run(*command, "--max-memory", memory) == 0
    assert [folder is None for folder in folders] == [True, False]
    assert len(ActivationStatistics.load(tmp_path / "a.safetensors")) == 14


def test_calibrate_can_compress_and_says_what_that_costs(models, tmp_path, capsys):
    command = ["calibrate", models / "a", models / "a.jsonl", "-o", tmp_path / "a.safetensors", "--compress-rank", 6]
    assert run(*command) == 0
    found = ActivationStatistics.load(tmp_path / "a.safetensors")
    assert {len(entry.factor) for entry in found.entries.values()} == {6}
    assert 0 < found.provenance.compression_error < 1
    assert f"compression error up to {found.provenance.compression_error:.1%}" in capsys.readouterr().out


@torch.no_grad()
def classes(model, tokenizer, rows):
    """The class of each row, one at a time."""
    return [int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()) for row in rows]


def test_evaluate_prints_and_writes_accuracies_beside_the_experts(models, merged, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    data, accuracy, expert = {}, {}, {}
    for seed, task in enumerate("ab", start=20):
        rows = [{"text": text} for text in texts(seed, count=12)]
        own = classes(AutoModelForSequenceClassification.from_pretrained(models / task), tokenizer, rows)
        for i, row in enumerate(rows):  # the expert is right on two rows of three
            label = (own[i] + (i % 3 == 0)) % len(LABELS[task])
            row["label"] = LABELS[task][label] if task == "a" else label
        data[task] = write_rows(tmp_path / f"{task}.jsonl", rows)
        labels = [LABELS["a"].index(row["label"]) if task == "a" else row["label"] for row in rows]
        found = classes(load_task_model(merged, task), tokenizer, rows)
        accuracy[task] = sum(x == y for x, y in zip(found, labels)) / 12
        expert[task] = 8 / 12
    average = sum(accuracy.values()) / 2
    normalised = sum(accuracy[task] / expert[task] for task in data) / 2
    command = ["evaluate", merged, *named("data", data)]
    assert run(*command, *named("expert", {task: models / task for task in data}), "-o", tmp_path / "s.json") == 0
    intervals = evaluate(merged, data).intervals
    shown = {task: f"{100 * low:.1f} to {100 * high:.1f}" for task, (low, high) in intervals.items()}
    width = max(map(len, shown.values()))
    assert capsys.readouterr().out.splitlines() == [
        f"task     accuracy  expert  rows  {'95 %':>{width}}",
        f"a        {100 * accuracy['a']:8.1f}    66.7    12  {shown['a']:>{width}}",
        f"b        {100 * accuracy['b']:8.1f}    66.7    12  {shown['b']:>{width}}",
        f"average  {100 * average:8.1f}  ({100 * normalised:.1f} % of the experts)",
        f"  written  {tmp_path / 's.json'}",
    ]
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores == {
        "metric": "accuracy",
        "model": pytest.approx(accuracy),
        "expert": pytest.approx(expert),
        "base": {},
        "rows": {"a": 12, "b": 12},
        "intervals": {task: pytest.approx(interval) for task, interval in intervals.items()},
        "average": pytest.approx(average),
        "normalised": pytest.approx(normalised),
    }
    assert run(*command, "--num-samples", 4, "--seed", 1, "--expert", f"a={models / 'a'}") == 0
    few = evaluate(merged, data, num_samples=4, seed=1)
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in table[1:]] == [
        [name, f"{100 * value:.1f}"] for name, value in [*few.model.items(), ("average", few.average)]
    ]
    assert "of the experts" not in table[-1]
    assert few.model != pytest.approx(accuracy)


def test_evaluate_takes_a_lora_expert_and_a_plain_classifier(models, tmp_path, capsys):
    experts = {"a": models / "a", "c": models / "c-lora"}
    merged = merge(models, tmp_path / "merged", "ac", method="mean", experts=experts)
    rows = [{"text": text} for text in texts(4, count=6)]
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    whole = AutoModelForSequenceClassification.from_pretrained(models / "base", num_labels=4)
    expert = PeftModel.from_pretrained(whole, models / "c-lora").eval()
    for row, label in zip(rows, classes(expert, tokenizer, rows)):
        row["label"] = label
    rows[0]["label"] = (rows[0]["label"] + 1) % 4
    data = ["--data", f"c={write_rows(tmp_path / 'c.jsonl', rows)}"]
    assert run("evaluate", merged, *data, "--expert", f"c={models / 'c-lora'}") == 0
    assert capsys.readouterr().out.splitlines()[1].split()[2] == "83.3"
    assert run("evaluate", models / "c", *data) == 0
    found = classes(AutoModelForSequenceClassification.from_pretrained(models / "c"), tokenizer, rows)
    share = sum(label == row["label"] for label, row in zip(found, rows)) / len(rows)
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["c", f"{100 * share:.1f}", "6"]


def test_experts_are_scored_with_their_own_tokenizer_over_the_base_that_is_given(models, tmp_path, capsys):
    """Not with that of the merged model, whose words stand at other places; an adapter may name no base."""
    merged = merge(models, tmp_path / "merged", "ac", method="mean")
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *reversed(WORDS)]))
    other = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    shutil.copytree(models / "c", tmp_path / "c")
    other.save_pretrained(tmp_path / "c")
    rows = [{"text": text} for text in texts(4, count=8)]
    expert = AutoModelForSequenceClassification.from_pretrained(tmp_path / "c")
    for row, label in zip(rows, classes(expert, other, rows)):
        row["label"] = label
    found = evaluate(merged, {"c": rows}, experts={"c": tmp_path / "c"})
    assert found.expert == {"c": 1.0}
    shutil.copytree(models / "c-lora", tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(HfEsmError, match=r"names no base\. Pass `base`"):
        evaluate(merged, {"c": rows}, experts={"c": tmp_path / "lora"})
    data = ["--data", f"c={write_rows(tmp_path / 'c.jsonl', rows)}"]
    command = ["evaluate", merged, *data, "--expert", f"c={tmp_path / 'lora'}"]
    assert run(*command, "--base", models / "base") == 0
    with pytest.raises(TypeError, match="unexpected keyword argument 'metrc'"):
        evaluate(merged, {"c": rows}, metrc="accuracy")
    for wrong, says in (({"batch_size": 0}, "batch_size must be"), ({}, "takes a folder or a Hub id, not a dict")):
        with pytest.raises(HfEsmError, match=says):
            evaluate(merged if wrong else {}, {"c": rows}, **wrong)


REFUSED = {
    "no recipe": ("merge", "Name a recipe, or --base and --expert TASK=MODEL for each expert."),
    "missing recipe": ("merge {}/none.yaml", "none.yaml: cannot read the recipe"),
    "no output": ("merge {}/recipe.yaml", "Say where to write: --output-dir FOLDER"),
    "weights": ("inspect {}/recipe.yaml --weights a=much", "--weights of 'a' must be a finite number, not 'much'"),
    "overrides": ("inspect {}/recipe.yaml --overrides kind:mlp", "--overrides, entry 1: must be a mapping such as"),
    "no YAML": ("inspect {}/recipe.yaml --overrides [", "--overrides: '[' is not a YAML value"),
    "missing expert": ("inspect {}/recipe.yaml --expert a={}/none", "expert 'a' ({}/none): there is no such folder"),
    "expert twice": ("inspect {}/recipe.yaml --expert c={}/c --expert c={}/a", "--expert names 'c' twice"),
    "no pair": ("inspect {}/recipe.yaml --expert {}/c", "--expert takes NAME=VALUE, not '{}/c'"),
    "no name": ("inspect {}/recipe.yaml --calibration ={}/c.jsonl", "--calibration takes NAME=VALUE"),
    "no value": ("inspect {}/recipe.yaml --columns text=", "--columns takes NAME=VALUE"),
    "unknown task": ("inspect {}/recipe.yaml --calibration z={}/c.jsonl", "--calibration: there is no expert 'z'"),
    "unknown method": ("inspect {}/recipe.yaml --method best", "no method 'best'; there are auto, mean,"),
    "unknown setting": ("inspect {}/recipe.yaml --set beta=1", "Method 'esm': there is no setting 'beta'"),
    "setting of no kind": ("inspect {}/recipe.yaml --set gamma=[", "--set: '[' is not a YAML value"),
    "setting of another kind": (
        "inspect {}/recipe.yaml --set gamma=high",
        "esm: gamma must be a finite number, not 'high'",
    ),
    "alpha": ("inspect {}/recipe.yaml --alpha best", "--alpha must be a finite number or 'auto', not 'best'"),
    "alpha without data": (
        "inspect --base {}/base --expert a={}/a --expert b={}/b --method tsv-m --alpha auto",
        "--alpha auto needs unlabelled samples (--calibration) or labelled rows (--validation) per task",
    ),
    "setting of auto": (
        "inspect {}/recipe.yaml --method auto --set gamma=0",
        "auto chooses one. Name it: --method esm",
    ),
    "setting of refining": (
        "inspect {}/recipe.yaml --refine step=9",
        "--refine: there is no setting 'step' (did you mean 'steps'?)",
    ),
    "no setting of refining": ("inspect {}/recipe.yaml --refine 9", "--refine takes NAME=VALUE, not '9'"),
    "refining of another kind": ("inspect {}/recipe.yaml --refine steps=many", "--refine: steps must be a whole"),
    "an adapter of coefficients": (
        "inspect {}/recipe.yaml --refine components=0 keep_adapter=true",
        "--refine: coefficients on whole updates (components 0) are not an adapter.",
    ),
    "batch size": ("inspect {}/recipe.yaml --batch-size 0", "--batch-size must be a whole number, at least 1, not 0"),
    "heads": ("inspect {}/recipe.yaml --heads nothing", "no expert has a module named 'nothing'"),
    "experts as a list": ("inspect {}/list.yaml --expert c={}/c", "--expert: the recipe gives experts as ["),
    "samples": ("merge {}/recipe.yaml --output-dir {}/x --calibration a={}/no.txt", "there is no file {}/no.txt"),
    "kind of file": ("calibrate {}/a {}/recipe.yaml -o {}/x", "recipe.yaml is none of .jsonl"),
    "no model": ("calibrate {}/none {}/a.jsonl -o {}/x", "model ({}/none): there is no such folder"),
    "nothing to score": ("evaluate {}/none --data a={}/a.jsonl", "{}/none: there is no such folder"),
    "not on the Hub": ("evaluate me/none --data a={}/a.jsonl", "me/none: neither a folder nor wholly in the local"),
    "nowhere to write": ("calibrate {}/a {}/a.jsonl", "calibrate takes a recipe, or MODEL SAMPLES -o FILE."),
    "no rows": ("evaluate {}/a", "Name the rows to score on: --data TASK=FILE for each (or test in a recipe)."),
    "a recipe without samples": ("calibrate {}/list.yaml -o {}/x", "names no samples by task. Add calibration:"),
    "a recipe without a model": ("evaluate {}/recipe.yaml", "names no output_dir, the model to score."),
    "no YAML for a task": ("inspect {}/recipe.yaml --validation a={path", "--validation: '{path' is not a YAML value"),
    "a column of one task": (
        """evaluate {}/a --data a={"path":"{}/a.jsonl","columns":{"txt":"text"}}""",
        "there is no kind of column 'txt'",
    ),
    "no label": ("evaluate {}/a --data a={}/a.jsonl", "row 0 needs a label"),
    "wrong label": ("evaluate {}/a --data a={}/labelled.jsonl", "label 7, but the expert knows 2 classes"),
    "wrong label name": ("evaluate {}/a --data a={}/named.jsonl", "has no label 'maybe'; it has ['no', 'yes']"),
    "no classifier": ("evaluate {}/base --data a={}/right.jsonl", "BertModel gives no class per sample"),
    "expert without rows": (
        "evaluate {}/a --data a={}/right.jsonl --expert b={}/b",
        "data: there is no task 'b'; there are a",
    ),
    "unknown task to score": ("evaluate {}/merged --data z={}/right.jsonl", "no task 'z'; there are a, b."),
}


@pytest.mark.parametrize(("command", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_plain_line_and_status_2(models, merged, capsys, command, message):
    (models / "list.yaml").write_text("base: base\nexperts: [a, b]\n")
    for name, label in (("labelled", 7), ("named", "maybe"), ("right", 1)):
        write_rows(models / f"{name}.jsonl", [{"text": "good film", "label": label}])
    before = sorted(models.rglob("*"))
    assert run(*command.replace("{}", str(models)).split()) == 2
    said = capsys.readouterr()
    error = [line for line in said.err.splitlines() if line.strip() and "it/s" not in line]
    assert len(error) == 1
    assert error[0].startswith("hf-esm: ")
    assert message.replace("{}", str(models)) in error[0]
    assert said.out == ""
    assert sorted(models.rglob("*")) == before


MISTYPED = {
    "merges": "invalid choice: 'merges'",
    "merge recipe.yaml --colour red": "unrecognized arguments: --colour red",
    "merge recipe.yaml --outputdir=x": "unrecognized arguments: --outputdir=x (did you mean --output-dir?)",
    "merge recipe.yaml --num-samples many": "--num-samples: 'many' is not a whole number",
    "calibrate": "the following arguments are required: model",
    "calibrate model data.txt -o out --compress-rank 0": "--compress-rank: '0' is not a whole number above 0",
}


@pytest.mark.parametrize(("command", "message"), MISTYPED.items(), ids=MISTYPED)
def test_mistyped_commands_are_status_2(capsys, command, message):
    assert run(*command.split()) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            RuntimeError("out of luck"),
            1,
            "hf-esm: internal error (RuntimeError: out of luck)",
        ),
        (KeyboardInterrupt(), 130, "hf-esm: stopped before the output was written."),
    ],
)
def test_an_unexpected_error_is_short_unless_asked_for(models, monkeypatch, capsys, error, status, message):
    def fail(**_):
        raise error

    monkeypatch.setattr("hf_esm.cli.inspect.merge_models", fail)
    assert run("inspect", models / "recipe.yaml") == status
    assert capsys.readouterr().err.splitlines()[0] == message
    if status == 1:
        with pytest.raises(RuntimeError, match="out of luck"):
            run("inspect", models / "recipe.yaml", "--traceback")


OPTIONS = {"merge": MergeOptions, "inspect": MergeOptions, "calibrate": SampleOptions, "evaluate": SampleOptions}


def test_a_polite_kill_leaves_nothing_behind(models, tmp_path, monkeypatch, capsys):
    def killed(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("hf_esm.merging.one_pass.OnePass.run", killed)
    assert run("merge", models / "recipe.yaml", "--method", "mean", "--output-dir", tmp_path / "out") == 130
    assert "stopped before the output was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("command", "options"), OPTIONS.items())
def test_help_names_every_option_and_says_what_it_is(capsys, command, options):
    assert run(command, "--help-all") == 0
    said = capsys.readouterr().out
    flat = "".join(said.split())
    for field in fields(options):
        assert f"  --{field.name.replace('_', '-')}" in said
        assert field.metadata["help"].replace(" ", "") in flat
        if isinstance(field.default, bool) or field.name in ("refine", "lines"):
            assert f"--no-{field.name.replace('_', '-')}" in said
    default = {"evaluate": 0, "calibrate": 32}.get(command, 64)
    assert f"0takesall(default:{default})" in flat


def test_help_names_every_command_method_and_setting(capsys):
    assert run("--help") == 0
    said = capsys.readouterr().out
    assert [command for command in (*OPTIONS, "demo") if f"\n    {command}" not in said] == []
    assert run("demo", "--help") == 0
    assert "demo_output" in capsys.readouterr().out
    assert run("methods") == 0
    listed = capsys.readouterr().out
    for name, make in METHODS.items():
        assert f"\n{name}: " in f"\n{listed}"
        assert run("methods", name) == 0
        said = capsys.readouterr().out
        preset = make() != type(make())()
        parent = type(make()).__bases__[0]
        inherited = {f.name for f in fields(parent)} if is_dataclass(parent) else set()
        own = [f.name for f in fields(make()) if f.name not in inherited]
        assert preset or [setting for setting in own if f"  {setting} = " not in said] == []
    assert run("methods", "refine") == 0
    said = capsys.readouterr().out
    assert [f.name for f in fields(RefineSettings) if f"  {f.name} = {f.default!r}: " not in said] == []
    assert run("methods", "esn") == 2
    assert "there is no method 'esn' (did you mean 'esm'?)" in capsys.readouterr().err.replace("There", "there")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen(monkeypatch, capsys, command):
    monkeypatch.setenv("COLUMNS", "100")
    assert run(*([command, "--help"] if command else [])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 43 and max(map(len, lines)) <= 100
    assert lines[0].startswith(f"usage: hf-esm {command or 'COMMAND'}")


def test_a_device_is_where_models_run(models, merged, capsys, monkeypatch):
    rows = write_rows(models / "device.jsonl", [{"text": "good film", "label": 1}])
    command = ["evaluate", merged, "--data", f"a={rows}", "--device"]
    seen = []
    scores = Scores({"a": 1.0}, {})
    monkeypatch.setattr("hf_esm.cli.evaluate.evaluate", lambda **_: seen.append(PartialState().device) or scores)
    assert run(*command, "cpu") == 0
    assert [device.type for device in seen] == ["cpu"]
    assert "ACCELERATE_TORCH_DEVICE" not in os.environ
    capsys.readouterr()
    assert run(*command, "abacus") == 2
    assert "--device must be cpu, cuda, cuda:1 or mps, not 'abacus'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run(*command, "cuda:1") == 2
        assert "--device cuda:1: torch finds no such device here. Pass --device cpu." in capsys.readouterr().err


def test_the_console_script_is_this_command_line(capsys):
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="hf-esm")
    assert script.load() is main
    assert run("--version") == 0
    assert capsys.readouterr().out == f"hf_esm {__version__}\n"


def test_flags_that_take_several_may_be_repeated():
    given = "compare recipe.yaml --methods esm --methods tsv-m mean --seeds 0 --seeds 1"
    found = build_parser().parse_args([*given.split(), "--columns", "text=a", "--columns", "label=b"])
    assert found.methods == ["esm", "tsv-m", "mean"]
    assert found.seeds == [0, 1]
    assert found.columns == ["text=a", "label=b"]


@pytest.mark.parametrize("words", [None, ["methods"]], ids=["of the process", "of a caller"])
def test_what_the_process_imports_for_its_command_is_never_looked_through(monkeypatch, capsys, words):
    """In a process of a caller, garbage is the caller's."""
    frozen = []
    monkeypatch.setattr(sys, "argv", ["hf-esm", "methods"])
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    assert main(words) == 0 and gc.isenabled()
    assert frozen == ([False] if words is None else [])
