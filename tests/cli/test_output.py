"""What commands print: an account, the result alone, or one JSON document; and how far a long work is."""

import json
import logging
import re

import pytest
import yaml

from hf_esm import METHODS, merge_models
from hf_esm.cli.main import main
from hf_esm.cli.parser import COMMANDS
from hf_esm.utils import progress, tracked
from support.toys import LABELS, texts, write_models, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Toy models, their rows, and a recipe for all commands."""
    folder = write_models(tmp_path_factory.mktemp("output"))
    rows = {
        task: [{"text": text, "label": LABELS[task][i % 2]} for i, text in enumerate(texts(seed, count=8))]
        for seed, task in enumerate("ab")
    }
    files = {task: str(write_rows(folder / f"{task}.jsonl", rows[task])) for task in rows}
    recipe = {"base": "base", "experts": {"a": "a", "b": "b"}, "calibration": files, "test": files}
    recipe |= {"method": "mean", "methods": ["mean"], "pictures": "none", "output_dir": str(folder / "merged")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def run(*words):
    """Exit status of a command, also where argparse leaves the process."""
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def said(capsys):
    """A function that runs a command, and returns its standard output and standard error."""

    def said(*words):
        capsys.readouterr()
        assert run(*words) == 0
        return capsys.readouterr()

    return said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_be_quiet_and_speak_json(said, command):
    flags = said(command, "--help-all").out
    assert "  --quiet" in flags and "  --json" in flags


def test_one_document_of_json_or_the_result_alone(folder, said, tmp_path):
    recipe, merged = folder / "recipe.yaml", tmp_path / "merged"
    statistics = {task: str(tmp_path / "statistics" / f"{task}.safetensors") for task in "ab"}
    commands = {  # and what is in their documents
        ("inspect", recipe): lambda data: data["method"] == "mean" and data["experts"]["a"]["weight"] == 1,
        ("calibrate", recipe, "-o", tmp_path / "statistics"): lambda data: (
            {entry["file"] for entry in data} == {*statistics.values()} and data[0]["num_samples"] == 8
        ),
        ("merge", recipe, "--output-dir", merged, "--overwrite"): lambda data: (
            (data["output_dir"], data["alpha"]) == (str(merged), 1) and len(data["weights"]) > 9
        ),
        ("evaluate", recipe, "--base", folder / "base"): lambda data: data["rows"] == {"a": 8, "b": 8},
        ("compare", recipe, "--output-dir", tmp_path / "report"): lambda data: [r["label"] for r in data["rows"]],
        ("methods",): lambda data: data.keys() == METHODS.keys(),
        ("methods", "esm"): lambda data: data["settings"]["gamma"]["value"] == METHODS["esm"]().gamma,
    }
    quiet = {"calibrate": "\n".join(statistics.values()), "merge": str(merged)}
    run("merge", recipe)  # what `evaluate` scores
    for words, holds in commands.items():
        found = said(*words, "--json")
        assert holds(json.loads(found.out)), words
        found, loud = said(*words, "--quiet"), said(*words)
        assert found.err == "", words
        if words[0] in quiet:
            assert found.out == f"{quiet[words[0]]}\n" and found.out != loud.out
        else:
            assert loud.out.startswith(found.out.rstrip()), words
    assert loud.err == ""  # a list of methods takes no time


def test_a_merge_ends_with_what_to_do_next(folder, said, tmp_path):
    out = said("merge", folder / "recipe.yaml", "--output-dir", tmp_path / "merged").out
    assert re.search(r"weights +merged by +number\n.*\n\nmean: 2 experts merged, alpha 1\n", out, re.DOTALL)
    *_, written, load, following = out.splitlines()
    assert written.split() == ["written", str(tmp_path / "merged")]
    exec(load.partition("load ")[2].strip(), {"hf_esm": __import__("hf_esm")})
    assert f"hf-esm evaluate {tmp_path / 'merged'} --data a=ROWS" in following


STAGES = {  # of some merges, after their samples were read
    # in one pass, which checks each weight when it is merged
    "mean": ({"method": "mean"}, ["merging", "writing", "publishing"]),
    "esm++": (
        {"method": "esm++", "num_samples": 4},
        ["checking weights", "calibrating", "merging", "writing", "adding experts", "publishing"],
    ),
    "agreement": (
        {"method": "tsv-m", "alpha": "auto"},
        ["checking weights", "asking experts", "merging", "choosing", "measuring agreement", "writing", "publishing"],
    ),
    "labels": (
        {"method": "tsv-m", "alpha": "auto", "validation": {"a": "a.jsonl", "b": "b.jsonl"}},
        ["checking weights", "merging", "choosing", "scoring", "writing", "publishing"],
    ),
}


@pytest.mark.parametrize(("settings", "after"), STAGES.values(), ids=STAGES)
def test_a_merge_says_which_stage_of_how_many_it_is_at(folder, tmp_path, monkeypatch, caplog, settings, after):
    monkeypatch.chdir(folder)
    if "validation" not in settings:
        settings = {**settings, "calibration": {"a": "a.jsonl", "b": "b.jsonl"}}
    with caplog.at_level(logging.INFO, "hf_esm"):
        merge_models("base", {"a": "a", "b": "b"}, output_dir=tmp_path / "out", **settings)
    stages = ["reading headers", "reading samples", *after]
    numbered = [f"stage {i} of {len(stages)}: {name}" for i, name in enumerate(stages, start=1)]
    assert [r.message for r in caplog.records if r.levelno == logging.INFO] == [stages[0], *numbered[1:]]


def test_lines_say_how_much_is_left(caplog, monkeypatch):
    clock = iter([0.0, 0.0, 5.0, 12.0, 13.0, 1000.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, "hf_esm"):
        assert list(tracked(range(5), "merging")) == list(range(5))
    assert caplog.messages == ["merging: 2 of 5, about 18 s left", "merging: 4 of 5, about 4 min left"]
    caplog.clear()
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    assert list(tracked(range(3), "merging", shown=False)) == [0, 1, 2] and not caplog.messages


def test_scoring_says_how_far_it_is(folder, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("hf_esm.evaluation.evaluator.tracked", lambda i, name, on: shown.append((name, on)) or i)
    run("merge", folder / "recipe.yaml", "--output-dir", tmp_path / "merged")
    words = "evaluate", tmp_path / "merged", "--data", f"a={folder / 'a.jsonl'}", "--expert", f"a={folder / 'a'}"
    models = ["the model", "the experts", "the base"]
    for flags, on in (((), True), (("--quiet",), False)):
        assert run(*words, "--base", folder / "base", *flags) == 0
        assert shown == [(f"Scoring {model}", on) for model in models]
        shown.clear()
