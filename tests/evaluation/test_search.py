"""A search over settings of methods: its ranges, its scores, its journal, and what the report shows of it."""

import json
import sys

import pytest

from hf_esm import TIES, EssentialMerge, HfEsmError, compare, evaluate, merge_models
from hf_esm.cli.main import main
from hf_esm.evaluation.search import ranges_of, search_settings
from hf_esm.methods import METHODS
from support.routed_toys import encoded, expert, logits, task_texts


def rows(task, seed, count=16):
    texts = task_texts(task, seed, count)
    found = logits(expert(task), encoded(texts)).argmax(-1).tolist()
    return [{"text": text, "label": (label + (i % 4 == 0)) % 2} for i, (text, label) in enumerate(zip(texts, found))]


@pytest.fixture(scope="module")
def arguments(models):
    return {
        "base": models / "base",
        "experts": {task: models / task for task in "ab"},
        "calibration": {task: task_texts(task, 3, 30) for task in "ab"},
        "test": {task: rows(task, 7) for task in "ab"},
        "num_samples": 12,
        "progress": False,
    }


@pytest.fixture
def optuna():
    return pytest.importorskip("optuna", reason="optuna is installed by make test-extras")


def test_the_ranges_that_methods_declare_hold_values_that_the_methods_take():
    searched = {name: ranges_of(METHODS[name]()) for name in METHODS}
    assert "gamma" in searched["esm"] and searched["mean"] == {}
    for name, ranges in searched.items():
        for setting, (low, high, scale) in ranges.items():
            assert low < high and scale in ("linear", "log") and (low > 0 or scale == "linear"), (name, setting)
            for value in (low, high):
                type(METHODS[name]())(**{setting: value})


@pytest.mark.extras
def test_a_search_finds_the_best_settings_and_continues_where_it_ended(optuna, tmp_path):
    seen = []

    def score(method):
        seen.append(method)
        return -((method.gamma - 0.3) ** 2)

    options = {"folder": tmp_path, "identity": "rows", "scored_on": "rows"}
    first = search_settings("esm", EssentialMerge(), score, trials=5, **options)
    assert len(seen) == first.trials == 5 and seen[0] == EssentialMerge()
    assert first.default_score == score(EssentialMerge()) <= first.score
    seen.clear()
    more = search_settings("esm", EssentialMerge(), score, trials=30, **options)
    assert len(seen) == 25 and more.score >= first.score and abs(more.settings["gamma"] - 0.3) < 0.1
    assert more.importance["gamma"] == max(more.importance.values()) > 0.5
    assert sum(more.importance.values()) == pytest.approx(1)
    seen.clear()
    again = search_settings("esm", EssentialMerge(), score, trials=30, **options)
    assert not seen and again == more
    search_settings("esm", EssentialMerge(), score, trials=2, **{**options, "identity": "other rows"})
    assert len(seen) == 2


@pytest.mark.extras
def test_all_scores_nan_are_named(optuna, tmp_path):
    options = {"folder": tmp_path, "identity": "rows", "scored_on": "rows", "trials": 2}
    with pytest.raises(HfEsmError, match="every score of ties is NaN"):
        search_settings("ties", TIES(), lambda method: float("nan"), **options)


@pytest.mark.extras
@pytest.mark.slow
def test_a_comparison_searches_on_validation_rows_or_agreement(optuna, arguments, tmp_path):
    validation = {task: rows(task, 9) for task in "ab"}
    options = {**arguments, "methods": ["ties", "mean"], "search": 4}
    found = compare(**options, validation=validation, output_dir=tmp_path / "labels")
    (search,) = found.searches
    assert search.scored_on == "the validation rows"
    given = {name: arguments[name] for name in ("base", "experts", "progress")}
    merged = merge_models(**given, method=search.method, alpha="auto", validation=validation)
    assert evaluate(merged.output_dir, validation).average == pytest.approx(search.score)
    labels = [row.label for row in found.rows]
    changed = search.method != TIES()
    assert labels == (["ties", "mean", "ties (searched)"] if changed else ["ties", "mean"])
    report = (tmp_path / "labels" / "report.md").read_text()
    assert "## What was found for ties" in report and "| density |" in report and "Searched ties, 4 settings" in report
    assert json.loads((tmp_path / "labels" / "report.json").read_text())["searches"][0]["trials"] == 4
    again = compare(**options, validation=validation, output_dir=tmp_path / "labels")
    assert again.as_dict() == found.as_dict()
    (search,) = compare(**options, output_dir=tmp_path / "agreement").searches
    assert search.scored_on == "agreement with the experts" and search.default_score <= search.score


REFUSED = {
    "no number": ({"search": -1}, "`search` must be a whole number, 1 or more, not -1"),
    "no range": ({"methods": ["mean"]}, "no setting of mean has a range"),
    "no data": ({"methods": ["ties"], "calibration": None}, "`search` needs labelled rows"),
}


@pytest.mark.extras
@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_searched_is_refused(optuna, arguments, tmp_path, changes, message):
    with pytest.raises(HfEsmError, match=message):
        compare(**{**arguments, "methods": ["ties"], "search": 3, "output_dir": tmp_path / "r", **changes})


def test_without_optuna_its_extra_is_named(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(HfEsmError, match=r"`search` needs Optuna.*pip install hf_esm\[search\]"):
        compare(**arguments, methods=["ties"], search=2, output_dir=tmp_path / "r")
    flags = [f"--expert={t}={path}" for t, path in arguments["experts"].items()]
    for task in "ab":
        (tmp_path / f"{task}.jsonl").write_text("\n".join(json.dumps(row) for row in arguments["test"][task]))
        flags.append(f"--test={task}={tmp_path / task}.jsonl")
    command = ["compare", f"--base={arguments['base']}", *flags, "--methods", "ties", "--search", "2"]
    assert main([*command, "--output-dir", str(tmp_path / "r")]) == 2
    assert "--search needs Optuna" in capsys.readouterr().err
