"""`compare`: what is measured, what the report and the cache hold, what is refused."""

import copy
import json
import random
import re
import shutil
from dataclasses import fields
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import torch

from hf_esm import Comparison, HfEsmError, Interference, add_comparison, compare, evaluate, merge_models
from hf_esm.cli.main import main
from hf_esm.data.options import SampleOptions
from hf_esm.evaluation.cells import NOT_COMPARED, Cell, Inputs
from hf_esm.evaluation.comparison import describe_rules, name_methods
from hf_esm.evaluation.report import comparison_table, write_report
from hf_esm.evaluation.summary import summarise
from hf_esm.methods.averaging import Mean, TaskArithmetic
from hf_esm.metrics.metric import ACCURACY, AccuracyMetric, ClassMetric, Metric
from hf_esm.metrics.named import resolve_metric
from hf_esm.metrics.scores import Outcome, Scores
from hf_esm.planning.options import MergeOptions
from hf_esm.utils import only_user
from hf_esm.utils.fingerprints import code_identity, processor_identity
from support.routed_toys import encoded, expert, logits, task_texts
from support.tiny import save_tokenizer, snapshot


pytestmark = pytest.mark.slow


def rows(task, seed, count=16):
    texts = task_texts(task, seed, count)
    found = logits(expert(task), encoded(texts)).argmax(-1).tolist()
    for i in range(0, count, 4):  # so that the expert is not always right
        found[i] = (found[i] + 1) % 2
    return [{"text": text, "label": label} for text, label in zip(texts, found)]


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


NOTHING = Interference(["a"], [])
NOT_MADE = SimpleNamespace(kept=None, as_dict=dict)
METHODS = ["mean", "esm", {"name": "esm", "shrinkage": 0.0}, {"name": "esm++", "rank": 4, "label": "routed"}, "tsv-c"]


@pytest.fixture(scope="module")
def compared(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, compare(**arguments, methods=METHODS, seeds=(0, 1), output_dir=folder)


def test_every_method_scores_what_its_merged_model_scores(arguments, compared, tmp_path):
    _, found = compared
    assert [row.label for row in found.rows] == [
        "mean", "esm", "esm (shrinkage 0.0)", "routed", "routed, tasks given", "tsv-c",
    ]  # fmt: skip
    by_label = {row.label: row for row in found.rows}
    given = {name: arguments[name] for name in ("base", "experts", "calibration", "num_samples", "progress")}
    for seed in (0, 1):
        merge_models(**given, method="esm", seed=seed, output_dir=tmp_path / f"{seed}")
    scores = [evaluate(tmp_path / f"{seed}", arguments["test"]) for seed in (0, 1)]
    for task in "ab":
        assert by_label["esm"].tasks[task] == pytest.approx((scores[0].model[task] + scores[1].model[task]) / 2)
    merge_models(**given, method={"name": "esm++", "rank": 4}, output_dir=tmp_path / "routed")
    own = {}
    for task, labelled in arguments["test"].items():
        answers = logits(expert(task), encoded([row["text"] for row in labelled])).argmax(-1).tolist()
        own[task] = sum(answer == row["label"] for answer, row in zip(answers, labelled)) / len(labelled)
    assert found.experts == pytest.approx(own)
    assert found.intervals.keys() == {"experts", "base"} and found.intervals["base"].keys() == own.keys()
    assert all(low <= own[task] <= high for task, (low, high) in found.intervals["experts"].items())
    for route, label in (("routed", "routed"), ("oracle", "routed, tasks given")):
        scores = evaluate(tmp_path / "routed", arguments["test"], route=route)
        normalised = sum(scores.model[task] / own[task] for task in "ab") / 2
        assert by_label[label].by_seed[0] == pytest.approx(normalised)
    assert by_label["mean"].by_seed.keys() == {0, 1}  # samples tell how often each task reads a token
    assert by_label["tsv-c"].alphas == {}
    confusion = by_label["routed"].confusion
    assert [sum(row) for row in confusion] == pytest.approx([1, 1])
    assert by_label["routed"].routing == {"a": confusion[0][0], "b": confusion[1][1]}
    assert all(row.size > 10_000 and row.seconds > 0 for row in found.rows)


def test_the_report_is_written_and_nothing_else_stays(compared):
    folder, found = compared
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "cache", "report.md", "report.html", "report.json", "scores.png", "kept.png", "energy.png", "interference.png",
        "routing-0.png",
    }  # fmt: skip
    text = (folder / "report.md").read_text()
    for row in found.rows:
        assert f"| {row.label} |" in text
        assert f"**{100 * row.normalised:.1f}**" in text
    assert all(f"]({name})" in text for name in names if name.endswith(".png"))
    stored = json.loads((folder / "report.json").read_text())
    assert [row["label"] for row in stored["rows"]] == [row.label for row in found.rows]
    assert stored["interference"]["sti"] == pytest.approx(found.interference.sti)
    assert found.interference.energy()["essential"]
    assert str(found).splitlines()[0].split()[0] == "method"


def test_a_report_goes_into_a_card_and_replaces_an_earlier_one(arguments, compared, tmp_path):
    folder, found = compared
    given = {name: arguments[name] for name in ("base", "experts", "progress")}
    merge_models(**given, method="mean", output_dir=tmp_path / "merged")
    for _ in range(2):
        card = add_comparison(tmp_path / "merged", folder)
    text = card.read_text()
    assert text.count("## Comparison") == text.count("## Limits") == 1
    section = text.split("## Comparison")[1].split("\n## Limits")[0]
    assert "\n".join(comparison_table(found)) in section
    pictures = re.findall(r"\]\((.+?\.png)\)", section)
    assert {path.name for path in folder.glob("*.png")} == {Path(picture).name for picture in pictures}
    assert all((tmp_path / "merged" / picture).is_file() for picture in pictures)
    shutil.copytree(folder, tmp_path / "merged" / "comparison", dirs_exist_ok=True)
    with pytest.raises(HfEsmError, match="Compare into another folder"):
        add_comparison(tmp_path / "merged", tmp_path / "merged" / "comparison")
    assert (tmp_path / "merged" / "comparison" / "report.md").is_file()
    with pytest.raises(HfEsmError, match=r"report\.md is missing"):
        add_comparison(tmp_path / "merged", tmp_path)


def test_a_second_run_does_only_what_is_new(arguments, compared, monkeypatch):
    folder, found = compared
    made = []
    merge = merge_models

    def watched(*args, **options):
        if not options.get("dry_run"):
            made.append(options["method"].name)
        return merge(*args, **options)

    def calibrated(*args, **options):
        raise AssertionError("all statistics are in the cache")

    monkeypatch.setattr("hf_esm.evaluation.cells.merge_models", watched)
    monkeypatch.setattr("hf_esm.merging.expert_statistics.calibrate_checkpoint", calibrated)
    again = compare(**arguments, methods=METHODS, seeds=(0, 1), output_dir=folder)
    assert made == []
    assert again.as_dict() == found.as_dict()
    more = compare(**arguments, methods=[*METHODS, "tsv-m", "regmean"], seeds=(0, 1), output_dir=folder)
    assert made == ["tsv-m", "tsv-m", "regmean", "regmean"]
    assert more.as_dict()["rows"][:6] == found.as_dict()["rows"]
    test = {**arguments["test"], "b": arguments["test"]["b"][:-1]}
    compare(**{**arguments, "test": test}, methods=["mean"], output_dir=folder)
    assert made == ["tsv-m", "tsv-m", "regmean", "regmean", "mean", "mean"]  # of the base, and of the method


@pytest.mark.parametrize("damage", ["cut", "another digit", "nothing in it"])
def test_a_damaged_result_is_measured_again(arguments, compared, damage):
    folder, found = compared
    before = {path: path.read_text() for path in (folder / "cache").glob("experts-*.json")}
    for path, content in before.items():
        last = re.search(r"\d(?=\D*$)", content)
        other = content[: last.start()] + str((int(last[0]) + 1) % 10) + content[last.end() :]
        path.write_text({"cut": content[:-5], "another digit": other, "nothing in it": "{}"}[damage])
    again = compare(**arguments, methods=["mean"], seeds=(0, 1), output_dir=folder)
    assert again.experts == found.experts
    assert [path.read_text() == content for path, content in before.items()].count(True) == 1
    for path, content in before.items():
        path.write_text(content)


def test_of_two_comparisons_in_one_folder_the_later_is_refused(arguments, compared):
    folder, _ = compared
    with only_user(folder / ".lock", ""), pytest.raises(HfEsmError, match=f"Another comparison writes to {folder}."):
        compare(**arguments, methods=["mean"], output_dir=folder)


def test_alpha_is_chosen_by_one_rule(arguments, tmp_path):
    validation = {task: rows(task, 9) for task in "ab"}
    found = compare(**arguments, validation=validation, methods=["esm", "mean"], output_dir=tmp_path / "r")
    given = {name: arguments[name] for name in ("base", "experts", "calibration", "num_samples", "progress")}
    merged = merge_models(**given, method="esm", alpha="auto", validation=validation)
    assert found.rows[0].alphas == {0: merged.alpha}
    assert found.rows[0].alpha_scores == {0: pytest.approx(merged.alpha_scores)}
    assert found.rows[1].alphas == {}
    assert (tmp_path / "r" / "alpha.png").is_file()
    (chart,) = [chart for chart in found.charts(every=False) if chart.name == "alpha"]
    (line,) = chart.lines
    assert (line.label, line.marked, line.note) == ("esm", merged.alpha, f"α = {merged.alpha:g}")
    assert line.points == list(found.rows[0].alpha_scores[0].items())
    assert found.rows[0].alpha_errors == {0: pytest.approx(merged.alpha_errors)}
    for alpha, score in line.points:
        error = merged.alpha_errors[alpha]
        assert line.errors[alpha] == pytest.approx((score - 1.96 * error, score + 1.96 * error))
        assert 0 < error < 1.4 * (score * (1 - score) / 32) ** 0.5 + 0.01
    assert "one standard error" in (tmp_path / "r" / "report.md").read_text()


def outcome(right, count=400, metric=ACCURACY, seed=0):
    hits = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < right
    return Outcome(metric, hits.long(), torch.ones(count, dtype=torch.long))


def cell(outcomes):
    return Cell(1.0, {}, outcomes, {}, {"merging": 1.0}, 1, 1)


@pytest.mark.parametrize("metric", [ACCURACY, resolve_metric(lambda x, y: float((x == y).float().mean()))])
def test_intervals_are_paired_and_as_wide_as_theory_says(metric):
    experts = {task: outcome(1.0, metric=metric) for task in "ab"}
    better = {task: outcome(0.7, metric=metric, seed=ord(task)) for task in "ab"}
    # The same rows right but for ten of each task: the difference is far surer than either score.
    worse = {}
    for task, found in better.items():
        outputs = found.outputs.clone()
        outputs[outputs.nonzero()[:10, 0]] = 0
        worse[task] = Outcome(metric, outputs, found.labels)
    one, two = summarise(
        {"one": TaskArithmetic(), "two": Mean()}, {"one": {0: cell(better)}, "two": {0: cell(worse)}}, experts
    )
    expected = (0.7 * 0.3 / 800) ** 0.5
    assert (one.interval[1] - one.interval[0]) / 3.92 == pytest.approx(expected, rel=0.15)
    assert one.interval[0] < one.normalised < one.interval[1]
    assert two.difference == pytest.approx(-10 / 400)
    assert (two.difference_interval[1] - two.difference_interval[0]) / 3.92 == pytest.approx(
        (0.025 * 0.975 / 800) ** 0.5, rel=0.15
    )
    assert one.difference_interval == (0.0, 0.0)


REFUSED = {
    "no rows of a task": (
        {"test": {"a": [{"text": "x", "label": 0}]}},
        "`test`: there are no rows for the expert 'b'",
    ),
    "rows of no task": (
        {"test": {t: [{"text": "x", "label": 0}] for t in "abc"}},
        "`test`: there is no expert 'c'; there are a, b",
    ),
    "a method twice": ({"methods": ["esm", "esm"]}, "names 'esm' twice"),
    "an unknown method": ({"methods": ["esm", "best"]}, "no method 'best'"),
    "one method, not in a list": ({"methods": "esm"}, "must be a list"),
    "no seed": ({"seeds": []}, "at least one seed"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_before_anything_is_merged(arguments, tmp_path, changes, message):
    with pytest.raises(HfEsmError, match=message):
        compare(**{**arguments, "methods": ["mean"], "output_dir": tmp_path / "r", **changes})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "flags", "labels"),
    [
        ("method: ties", "", ["ties", "esm", "mean", "task-arithmetic", "tsv-m", "iso-c", "iso-cts", "esm++"]),
        ("method: {name: esm, gamma: 0.0}", "--methods mean esm", ["mean", "esm"]),
        ("method: {name: esm, gamma: 0.0}", "--set gamma=0.2", ["esm (gamma 0.2)", "esm", "mean"]),
        ("rank: 8", "--methods tsv-m esm++ tsv-c", ["tsv-m", "esm++ (rank 8)", "tsv-c (rank 8)"]),
        ("rank: 8", "--methods", ["esm++ (rank 4)"]),
    ],
)
def test_the_command_compares_what_it_is_told_to(tmp_path, monkeypatch, recipe, flags, labels):
    asked = {}
    monkeypatch.setattr("hf_esm.cli.compare.compare", lambda **request: asked.update(request) or NOT_MADE)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: b\nexperts: {{a: a, b: b}}\ntest: {{a: a.jsonl}}\noutput_dir: r\n{recipe}\n")
    flags = flags.split() + (["{name: esm++, rank: 4}"] if flags == "--methods" else [])
    assert main(["compare", str(path), *flags]) == 0
    found = list(name_methods(asked["methods"]))
    assert found[: len(labels)] == labels
    assert not asked.keys() & NOT_COMPARED


def test_settings_beside_a_list_of_methods_are_refused(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("base: b\nexperts: {a: a, b: b}\ntest: {a: a.jsonl}\noutput_dir: r\n")
    assert main(["compare", str(tmp_path / "recipe.yaml"), "--methods", "esm", "mean", "--set", "gamma=0.2"]) == 2
    assert "--set goes with the recipe's method" in capsys.readouterr().err


def test_another_tokenizer_is_another_comparison(tmp_path):
    """A tokenizer is the same before and after it has been used."""
    first = save_tokenizer(tmp_path)
    before = processor_identity(first)
    other = copy.deepcopy(first)
    other.add_tokens(["more"])
    first(["a b", "a"], padding=True, truncation=True, max_length=2)
    assert processor_identity(first) == before != processor_identity(other)


def test_the_command_compares_a_recipe(models, tmp_path, capsys):
    for task in "ab":
        lines = [json.dumps(row) for row in rows(task, 7)]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines))
    random.seed(0)
    (tmp_path / "recipe.yaml").write_text(
        f"base: {models}/base\nexperts: {{a: {models}/a, b: {models}/b}}\nseed: 5\nalpha: 1.0\n"
        "test: {a: a.jsonl, b: b.jsonl}\nmethods: [mean, tsv-m]\nreport_dir: " + str(tmp_path / "report")
    )
    before = snapshot(models)
    assert main(["compare", str(tmp_path / "recipe.yaml"), "--no-progress", "--num-test", "10"]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "report" / "report.md") in out
    assert main(["compare", str(tmp_path / "recipe.yaml"), "--no-progress", "--card", str(tmp_path)]) == 2
    assert "not a folder that `hf-esm merge` wrote" in capsys.readouterr().err
    assert "tsv-m" in out
    assert json.loads((tmp_path / "report" / "report.json").read_text())["rows"][1]["alphas"] == {"5": 1.0}
    assert snapshot(models) == before
    assert main(["compare", f"--base={models}/base", f"--expert=a={models}/a", "--output-dir=x"]) == 2
    assert "Name the rows to measure on" in capsys.readouterr().err


def test_draws_without_a_score_have_no_part_in_intervals(tmp_path):
    """Some draws of ten rows hold no row on which the expert is right."""
    experts = {"a": outcome(torch.tensor([1.0] * 2 + [0.0] * 8), 10)}
    half = cell({"a": outcome(torch.tensor([1.0] + [0.0] * 9), 10)})
    found = summarise({"x": Mean(), "y|z": Mean()}, {"x": {0: half}, "y|z": {0: half}}, experts)
    for row in found:
        assert 0 <= row.interval[0] <= 0.5 <= row.interval[1] and row.difference_interval == (0, 0)
    elsewhere = cell({"a": outcome(torch.tensor([0.0] * 5 + [1.0] * 5), 10)})  # right where the expert is not
    (row,) = summarise({"x": Mean()}, {"x": {0: elsewhere}}, experts)
    assert all(0 <= end < 100 for end in row.interval)
    never = {"a": outcome(torch.zeros(10), 10)}
    label = "y|z of finance"
    none = Comparison(summarise({label: Mean()}, {label: {0: half}}, never), {"a": 0.0}, "accuracy", [], NOTHING)
    write_report(none, tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert r"| y\|z of finance |" in report and "nan" not in report.replace("finance", "")

    def refuse(constant):
        raise AssertionError(constant)

    stored = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert stored["rows"][0]["normalised"] is None


def test_metrics_of_a_module_are_known_by_its_file(tmp_path, monkeypatch):
    """A function of a module is pickled by its name alone, so the file must count."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_metric.py").write_text("def share(found, right):\n    return float((found == right).sum())\n")
    import own_metric

    metric = Metric("share", own_metric.share, read=own_metric.share)
    before = [code_identity(own_metric.share), code_identity(metric)]
    assert before == [code_identity(own_metric.share), code_identity(metric)]
    (tmp_path / "own_metric.py").write_text("def share(found, right):\n    return 0.5\n" * 2)
    assert all(now != then for now, then in zip([code_identity(own_metric.share), code_identity(metric)], before))
    assert code_identity(lambda: 1) != code_identity(lambda: 2)


def test_metrics_of_another_kind_are_other_metrics():
    same = {"name": "share", "score": len}
    assert code_identity(ClassMetric(**same)) == code_identity(Metric(**same)) != code_identity(AccuracyMetric(**same))


@pytest.mark.parametrize(
    ("metric", "says"), [("accuracy", "within one standard error"), (len, "the value with the best score")]
)
def test_the_report_says_how_alpha_was_chosen(arguments, metric, says):
    made = Inputs(
        **{name: arguments[name] for name in ("base", "experts", "test", "calibration")},
        validation={}, num_test=0, processor=None, token=None, options=MergeOptions(), metric=resolve_metric(metric),
    )  # fmt: skip
    assert says in describe_rules(made, (0,))[0]


def test_a_model_that_is_never_right_has_nothing_and_ties_are_shown():
    experts = {task: outcome(1.0) for task in "ab"}
    never = {task: outcome(0.0) for task in "ab"}
    rows = summarise({"one": Mean(), "two": Mean()}, {n: {0: cell(never)} for n in ("one", "two")}, experts)
    assert [row.normalised for row in rows] == [0.0, 0.0]
    table = comparison_table(Comparison(rows, {"a": 1.0, "b": 1.0}, "accuracy", [], Interference([], [])))
    assert "+0.0 (+0.0 to +0.0)" in table[-1]
    assert "+0.0" not in table[-2]


@pytest.mark.parametrize(
    ("function", "options", "not_taken"),
    [(evaluate, SampleOptions, set()), (compare, MergeOptions, NOT_COMPARED)],
)
def test_parameters_are_the_fields_of_the_options_with_their_defaults(function, options, not_taken):
    parameters, types, expected = signature(function).parameters, get_type_hints(function), get_type_hints(options)
    assert not parameters.keys() & not_taken
    for field in fields(options):
        if field.name in not_taken or (function, field.name) == (compare, "output_dir"):
            continue
        default = 0 if (function, field.name) == (evaluate, "num_samples") else field.default
        assert parameters[field.name].default == default, field.name
        assert types[field.name] == expected[field.name], field.name


@pytest.mark.parametrize("option", sorted(NOT_COMPARED))
def test_what_a_comparison_sets_itself_is_not_taken(arguments, tmp_path, option):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        compare(**arguments, output_dir=tmp_path, **{option: None})


def test_results_are_printed_in_one_line(compared):
    _, found = compared
    lines = [repr(found), repr(found.rows[0]), repr(found.interference), repr(Scores({"a": 0.5}, {"a": 1.0}))]
    assert lines[0] == "Comparison(accuracy; tasks a, b; " + ", ".join(row.label for row in found.rows) + ")"
    assert lines[1].startswith("Row('mean', normalised ")
    assert lines[2].startswith("Interference(a, b; STI ") and lines[2].endswith(" over 12 linear maps)")
    assert lines[3] == "Scores(accuracy: a 0.5)"


AUTO = {"name": "auto", "methods": ["tsv-m", "esm"]}


@pytest.mark.parametrize("by", ["labels", "agreement"])
def test_the_choice_of_a_method_is_a_row(arguments, compared, tmp_path, by):
    """The statistics of `esm` are in the cache already; the samples for agreement are not those."""
    labelled = {"validation": {task: rows(task, 9) for task in "ab"}} if by == "labels" else {}
    cache = shutil.copytree(compared[0] / "cache", tmp_path / "cache")
    shared = {**arguments, **labelled, "cache_dir": str(cache)}
    found = compare(**shared, methods=["esm", AUTO], output_dir=tmp_path / "r").rows[1]
    given = {name: arguments[name] for name in ("base", "experts", "calibration", "num_samples", "progress")}
    merged = merge_models(**given, **labelled, method=AUTO, output_dir=tmp_path / "merged")
    assert merged.chosen_by == by and found.alphas == {0: merged.alpha}
    assert found.chosen == {0: merged.plan.method.name} and found.chosen[0] in AUTO["methods"]
    assert found.tasks == evaluate(tmp_path / "merged", arguments["test"]).model
    assert found.alpha_scores == ({0: merged.alpha_scores} if by == "labels" else {})
    report = (tmp_path / "r" / "report.md").read_text()
    assert f"| {merged.alpha:g} ({found.chosen[0]}) |" in report and f"chosen {merged.choice}." in report
