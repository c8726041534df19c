"""What merges and comparisons share: statistics and answers, the best model, the work of several processes."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_esm import HfEsmError, compare, evaluate, load_recipe, merge_models
from hf_esm.cli.main import main
from support.problems import relative_error
from support.processes import launch
from support.routed_toys import encoded, expert, logits, task_texts


pytestmark = pytest.mark.slow


def rows(task, seed, count=16):
    texts = task_texts(task, seed, count)
    found = logits(expert(task), encoded(texts)).argmax(-1).tolist()
    return [{"text": text, "label": (label + (i % 4 == 0)) % 2} for i, (text, label) in enumerate(zip(texts, found))]


@pytest.fixture(scope="module")
def arguments(models):
    return {
        "base": str(models / "base"),
        "experts": {task: str(models / task) for task in "ab"},
        "calibration": {task: task_texts(task, 3, 30) for task in "ab"},
        "num_samples": 12,
        "progress": False,
    }


@pytest.fixture
def runs(monkeypatch):
    """The experts that were calibrated and asked, by the names of the functions."""
    seen = []

    def watch(place):
        module, _, name = place.rpartition(".")
        function = getattr(__import__(module, fromlist=[name]), name)
        monkeypatch.setattr(place, lambda *a, **k: seen.append(name) or function(*a, **k))

    watch("hf_esm.merging.expert_statistics.calibrate_checkpoint")
    watch("hf_esm.merging.judging.collect_answers")
    return seen


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def test_a_second_merge_finds_the_statistics_and_answers_of_the_first(arguments, tmp_path, runs):
    options = {**arguments, "alpha": "auto", "method": "esm"}
    first = merge_models(**options, cache_dir=tmp_path / "cache", output_dir=tmp_path / "first")
    assert runs == ["calibrate_checkpoint"] * 2 + ["collect_answers"] * 2
    runs.clear()
    again = merge_models(**options, cache_dir=tmp_path / "cache", output_dir=tmp_path / "again")
    other = merge_models(**{**options, "method": "regmean", "alpha": None}, cache_dir=tmp_path / "cache")
    assert runs == ["calibrate_checkpoint"] * 2  # without agreement, statistics are of more samples
    plain = merge_models(**options, output_dir=tmp_path / "plain")
    for result in (first, again):
        assert result.alpha_scores == pytest.approx(plain.alpha_scores)
    for name, value in weights(tmp_path / "plain").items():
        assert torch.equal(weights(tmp_path / "again")[name], weights(tmp_path / "first")[name]), name
        assert relative_error(weights(tmp_path / "first")[name], value) < 1e-3, name
    assert other.plan.method.name == "regmean"
    recipe = yaml.safe_load((tmp_path / "again" / "merge_recipe.yaml").read_text())
    assert "cache_dir" not in recipe and set(recipe["calibration"]) == set("ab")


def test_other_samples_and_damaged_files_are_computed_again(arguments, tmp_path, runs):
    options = {**arguments, "alpha": "auto", "method": "esm", "cache_dir": tmp_path}
    expected = merge_models(**options).alpha_scores
    for kind in ("statistics", "answers"):
        runs.clear()
        for path in tmp_path.glob(f"{kind}-*"):
            content = path.read_bytes()
            path.write_bytes(content[:-9] + bytes(byte ^ 85 for byte in content[-9:]))
        assert merge_models(**options).alpha_scores == pytest.approx(expected)
        assert runs == ["calibrate_checkpoint" if kind == "statistics" else "collect_answers"] * 2
    runs.clear()
    calibration = {**arguments["calibration"], "b": task_texts("b", 4, 30)}
    merge_models(**{**options, "calibration": calibration})
    assert runs == ["calibrate_checkpoint", "collect_answers"]  # of b alone


def test_statistics_are_in_every_folder_that_was_asked_for(arguments, tmp_path, runs):
    kept = {"cache_dir": tmp_path / "cache", "statistics_dir": tmp_path / "statistics"}
    merge_models(**arguments, method="esm", **kept, resume_dir=tmp_path / "work")
    (tmp_path / "statistics" / "a.safetensors").unlink()
    runs.clear()
    merge_models(**arguments, method="esm", **kept)
    assert runs == [] and (tmp_path / "statistics" / "a.safetensors").is_file()


def test_a_comparison_and_a_merge_share_statistics(arguments, tmp_path, runs):
    test = {task: rows(task, 7) for task in "ab"}
    compare(**arguments, test=test, methods=["esm", "regmean", "mean"], output_dir=tmp_path / "r")
    assert runs == ["calibrate_checkpoint"] * 2
    merge_models(**arguments, method="esm", cache_dir=tmp_path / "r" / "cache")
    assert runs == ["calibrate_checkpoint"] * 2


def test_the_best_model_is_kept_and_its_recipe_repeats_it(arguments, tmp_path, monkeypatch):
    test = {task: rows(task, 7) for task in "ab"}
    options = {**arguments, "test": test, "methods": ["mean", "esm", "tsv-m"], "output_dir": tmp_path / "r"}
    found = compare(**options, keep="best")
    best = max(found.rows, key=lambda row: row.normalised)
    assert found.kept == tmp_path / "r" / "best"
    assert f"Kept in best: {best.label}, the best on the test rows." in (tmp_path / "r" / "report.md").read_text()
    scores = evaluate(found.kept, test)
    assert scores.model == pytest.approx(best.tasks)
    merge_models(**load_recipe(found.kept / "merge_recipe.yaml"), output_dir=tmp_path / "again", progress=False)
    for name, value in weights(tmp_path / "again").items():
        assert torch.allclose(weights(found.kept)[name], value, atol=1e-6), name
    assert {path.name for path in (tmp_path / "r").iterdir() if path.is_dir()} == {"cache", "best"}
    before = weights(found.kept)
    again = compare(**options, keep="best")  # all cells are in the cache: the best is merged again, from the cache
    assert again.kept == found.kept
    assert all(torch.allclose(value, before[name], atol=1e-6) for name, value in weights(again.kept).items())
    (found.kept / "merge_recipe.yaml").unlink()
    with pytest.raises(HfEsmError, match="was not written by a merge, so it is not overwritten"):
        compare(**options, keep="best")
    with pytest.raises(HfEsmError, match="`keep` must be 'best' or None, not 'all'"):
        compare(**options, keep="all")


def test_the_command_keeps_the_best_model(arguments, tmp_path, capsys):
    for task in "ab":
        (tmp_path / f"{task}.jsonl").write_text("\n".join(json.dumps(row) for row in rows(task, 7)))
    recipe = {name: arguments[name] for name in ("base", "experts")} | {"methods": ["mean", "tsv-m"], "keep": "best"}
    recipe |= {"test": {task: f"{task}.jsonl" for task in "ab"}, "report_dir": str(tmp_path / "r"), "cache_dir": "c"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"cache_dir": str(tmp_path / "c")}))
    assert main(["compare", str(tmp_path / "recipe.yaml"), "--no-progress"]) == 0
    assert str(tmp_path / "r" / "best") in capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "r" / "best" / "merge_recipe.yaml").is_file() and any((tmp_path / "c").glob("cell-*.json"))


def test_two_processes_share_the_models_and_write_what_one_does(arguments, tmp_path):
    test = {task: rows(task, 7) for task in "ab"}
    methods = ["mean", "esm", "tsv-m", {"name": "esm++", "rank": 4}]
    case = {**arguments, "test": test, "methods": methods, "keep": "best"}
    expected = compare(**case, output_dir=tmp_path / "expected")
    (tmp_path / "case.json").write_text(json.dumps(case))
    launch(Path(__file__).parents[1] / "support" / "compare_on_ranks.py", tmp_path)
    first, second = (json.loads((tmp_path / f"record-{rank}.json").read_text()) for rank in (0, 1))
    assert first["rows"] == second["rows"] and first["kept"] == second["kept"] == str(tmp_path / "report" / "best")
    done = sorted([*first["merged"], *second["merged"]])
    assert done == sorted(["mean", "mean", "esm", "tsv-m", "esm++"])  # one mean has the heads for the base
    for found, one in zip(first["rows"], expected.as_dict()["rows"], strict=True):
        assert found["label"] == one["label"] and found["tasks"] == pytest.approx(one["tasks"])
    assert (tmp_path / "report" / "report.md").is_file()
    assert not list((tmp_path / "report").glob(".merging*"))
