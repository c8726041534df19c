"""Runs benchmarks/language.py as users run it, on a folder of toy language models; and against_mergekit.py."""

import gzip
import json
import logging
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from hf_esm import RoutedModel, merge_models
from hf_esm.cli import main as command_line
from hf_esm.methods import resolve_method
from hf_esm.tuners.routed import Decisions, decide, route
from support.routed_toys import task_texts, tuned
from support.tiny import GPT2, save_tokenizer


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "language.py"


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """`base`, the experts `a` and `b`, and rows: those of `a` are texts, those of `b` have answers."""
    folder = tmp_path_factory.mktemp("suite")
    model = GPT2.build()
    model.save_pretrained(folder / "base")
    backend = save_tokenizer(folder / "base").backend_tokenizer
    backend.post_processor = TemplateProcessing(single="$A", pair="$A $B")  # rows have no special tokens, either
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", pad_token="[PAD]")
    tokenizer.save_pretrained(folder / "base")
    rows = {"a": [{"text": text} for text in task_texts("a")]}
    rows["b"] = [{"text": text, "label": " so so"[: 3 * (1 + i % 2)]} for i, text in enumerate(task_texts("b"))]
    (folder / "data").mkdir()
    for seed, task in enumerate(rows, start=1):
        tuned(model, seed).save_pretrained(folder / "experts" / task)
        data = json.dumps({"train": rows[task][:12], "validation": rows[task][12:], "test": rows[task][12:]})
        (folder / "data" / f"{task}.json.gz").write_bytes(gzip.compress(data.encode()))
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer, rows=rows)


@pytest.fixture
def run(suite, tmp_path, monkeypatch, capsys):
    """Runs the script; returns what it printed, and what it wrote."""

    def run_script(*arguments, file="results.json"):
        common = ["--rows", "2", "--num-samples", "8", "--max-length", "20", "--output", str(tmp_path / "report")]
        monkeypatch.setattr(sys, "argv", ["language.py", str(suite.folder), *common, *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out, json.loads((tmp_path / "report" / file).read_text())["results"]

    logger, level = logging.getLogger("hf_esm"), logging.getLogger("hf_esm").level
    yield run_script
    logger.setLevel(level)  # which the script raises


def literal_loss(suite, model, rows):
    """Mean negative log-probability of each scored token, one row at a time."""
    losses = []
    for row in rows:
        text = suite.tokenizer(row["text"], add_special_tokens=False).input_ids[:20]
        answer = suite.tokenizer(row.get("label", ""), add_special_tokens=False).input_ids
        ids = torch.tensor([*text, *answer, suite.tokenizer.eos_token_id])
        with torch.no_grad():
            log_probabilities = functional.log_softmax(model(ids[None]).logits[0].double(), dim=-1)
        first = len(text) if "label" in row else 1
        losses += [-float(log_probabilities[i - 1, ids[i]]) for i in range(first, len(ids))]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("task", ["a", "b"])
def test_batched_scores_are_those_of_single_rows(suite, task):
    loss_per_token = runpy.run_path(str(SCRIPT))["loss_per_token"]
    rows = suite.rows[task]
    expected = literal_loss(suite, suite.model, rows)
    for batch_size in (1, 5):
        found = loss_per_token(suite.model, suite.tokenizer, rows, max_length=20, batch_size=batch_size)
        assert math.isclose(found, expected, rel_tol=1e-5)


def test_a_comparison_of_language_experts(suite, run):
    methods = ["--methods", "default", "mean", "{name: regmean, alpha: 0.7}", "--seeds", "0", "1"]
    printed, results = run(*methods)
    rows = [line.split(" | ") for line in printed.splitlines()]
    assert [row[0] for row in rows[2:]] == ["| base", "| experts", *(f"| `{label}`" for label in methods[1:4])]
    for task in ("a", "b"):
        expected = literal_loss(suite, suite.model, suite.rows[task][12:14])
        assert math.isclose(results["base"][task], expected, rel_tol=1e-5)
    mean, regmean = (results["methods"][label] for label in methods[2:4])
    for entry in mean:
        for task, loss in entry["losses"].items():
            gain = results["base"][task] - results["experts"][task]
            assert math.isclose(entry["kept"][task], 100 * (results["base"][task] - loss) / gain)
    assert regmean[0]["losses"] != regmean[1]["losses"]  # other samples


def test_a_second_run_merges_only_what_is_new(run, monkeypatch):
    first = run("--methods", "mean", "--seeds", "0")
    monkeypatch.setattr("hf_esm.merge_models", lambda *_, **__: pytest.fail("merged again"))
    assert run("--methods", "mean", "--seeds", "0") == first
    with pytest.raises(pytest.fail.Exception, match="merged again"):
        run("--methods", "ties", "--seeds", "0")


@pytest.mark.cases(1)
@pytest.mark.parametrize("label", ["esm++", "{name: esm++, router: oracle}"])
def test_routed_models_have_a_second_table(run, monkeypatch, label):
    printed, results = run("--methods", "mean", label, "--seeds", "0", "1")
    rows = [line.split(" | ") for line in printed.splitlines()]
    titles = [f"| `{label}`", f"| `{label}`, task named", f"| `{label}`, none added"]
    assert [row[0] for row in rows[-3:]] == titles
    assert [row[0] for row in rows[2:6]] == ["| base", "| experts", "| `mean`", titles[0]]
    assert rows[-5][0] == "| experts"
    assert rows[-3][1:4] == rows[5][1:4]  # by task, and their mean
    for entry in results["methods"][label]:
        if "oracle" in label:
            assert entry["losses"] == entry["named"] and "routes" not in entry
        else:
            assert entry["losses"] != entry["static"] != entry["named"]
            assert all(0 <= share <= 1 for share in entry["routes"].values())
            assert entry["routes"]["sure if foreign"] > 0  # with one expert left, its task is certain
    monkeypatch.setattr("hf_esm.merge_models", lambda *_, **__: pytest.fail("merged again"))
    assert run("--methods", "mean", label, "--seeds", "0", "1") == (printed, results)


def test_exact_matches_are_whole_answers(suite):
    """A model that answers `so so` to short prompts and `so` to long ones, and ends, or writes on, after that."""
    (so,) = suite.tokenizer("so", add_special_tokens=False).input_ids
    end, seen = suite.tokenizer.eos_token_id, []

    def generate(input_ids, attention_mask, max_new_tokens, **_):
        assert max_new_tokens == 3 and (attention_mask.diff(dim=1) >= 0).all()  # padded on the left
        lengths = attention_mask.sum(1).tolist()
        seen.extend(lengths)
        answers = [[so, so, end] if n < 8 else [so, end, 0] if n < 11 else [so, so, so] for n in lengths]
        return torch.cat([input_ids, torch.tensor(answers)], dim=1)

    rows = [{"text": row["text"], "label": label} for row in suite.rows["b"] for label in ("so so", "so")]
    match = runpy.run_path(str(SCRIPT))["exact_match"](SimpleNamespace(generate=generate), suite.tokenizer, rows)
    assert len(seen) == len(rows) and {n < 8 for n in seen} == {n < 11 for n in seen} == {True, False}
    assert match == sum(n < 11 for n in seen) / 2 / len(rows)


def test_answers_are_written_by_base_experts_and_every_way_of_a_routed_model(run):
    printed, results = run("--methods", "mean", "esm++", "--seeds", "0", "--generate")
    rows = [line.split(" | ") for line in printed.splitlines()]
    ways = ["`mean`", "`esm++`", "`esm++`, task named", "`esm++`, none added"]
    assert rows[-8][:2] == ["| exact match", "b"] and [row[0] for row in rows[-6:]] == [
        "| base",
        "| experts",
        *(f"| {way}" for way in ways),
    ]
    assert results["methods"]["esm++"][0]["matches"].keys() == {"losses", "named", "static"}


def test_losses_of_a_routed_model_are_those_of_its_prompts_routes(suite, tmp_path):
    """The route is that of the text alone; the answer, of which the router sees nothing, is scored."""
    texts = {task: [row["text"] + row.get("label", "") for row in rows] for task, rows in suite.rows.items()}
    experts = {task: suite.folder / "experts" / task for task in "ab"}
    method = {"name": "esm++", "static_method": "mean"}
    options = {"calibration": texts, "method": method, "refine": False, "progress": False}
    merge_models(suite.folder / "base", experts, output_dir=tmp_path / "out", **options)
    model = RoutedModel.from_pretrained(tmp_path / "out")
    script = runpy.run_path(str(SCRIPT))
    loss_per_token = script["loss_per_token"]
    for answers in ([" so so"] * 6, task_texts("a", 5)):  # in words of the other task
        rows = [{**row, "label": answer} for row, answer in zip(suite.rows["b"], answers, strict=False)]
        expected, tokens = 0.0, 0
        for row in rows:
            scored = len(suite.tokenizer(row["label"]).input_ids) + 1
            prompt = torch.tensor([suite.tokenizer(row["text"], add_special_tokens=False).input_ids[:20]])
            ((adapter, _, decision),) = decide(model.model, {"input_ids": prompt})
            assert decision.route.weights.any()
            with route(model.model, Decisions({adapter: decision})):
                expected += literal_loss(suite, model.model, [row]) * scored
            tokens += scored
        found = loss_per_token(model.model, suite.tokenizer, rows, max_length=20)
        assert math.isclose(found, expected / tokens, rel_tol=1e-5)


def test_the_calibration_error_is_that_of_the_definition():
    error = runpy.run_path(str(SCRIPT))["calibration_error"]
    # Bins: 0.5 and 0.55, one right: 0.525 against 0.5; 0.9 and 1, both right: 0.95 against 1.
    assert math.isclose(error([0.5, 0.55, 0.9, 1.0], [True, False, True, True]), (0.05 + 0.1) / 4)


def test_subsets_of_two_tasks(run):
    printed, results = run("--subsets", "--methods", "mean", "--seeds", "0", file="subsets.json")
    assert [entry["tasks"] for entry in results] == [["a", "b"]]
    assert printed.splitlines()[-1].startswith("| mean, 2 tasks | ")


@pytest.mark.parametrize(
    ("label", "alpha", "expected"),
    [
        ("default", "default", {}),
        ("default", "auto", {"alpha": "auto"}),
        ("ties", "auto", {"alpha": "auto", "method": {"name": "ties"}}),
        ("mean", "auto", {"method": {"name": "mean"}}),  # whose scale is fixed
        ("{name: default, refine: true}", "default", {"refine": True}),
        ("{name: esm, gamma: 0.15, alpha: 0.7}", "auto", {"alpha": 0.7, "method": {"name": "esm", "gamma": 0.15}}),
    ],
)
def test_an_entry_of_methods_becomes_arguments_of_the_merge(label, alpha, expected):
    assert runpy.run_path(str(SCRIPT))["merge_arguments"](label, alpha) == expected


def test_merges_are_compared_with_another_program_entry_by_entry(tmp_path, monkeypatch, capsys):
    """mergekit itself is no dependency of the tests: the literal mean stands in for it."""
    script = runpy.run_path(str(SCRIPT.with_name("against_mergekit.py")))["main"].__globals__

    def in_this_process(work, cases, count, dtype, python, checkout=None):
        for case in cases:
            job = script["ours" if python is None else "theirs"](work, case, ["expert0", "expert1"], dtype)
            if python is None:
                assert command_line(["merge", job, "--quiet"]) == 0
                continue
            config, out = job
            models = [dict(script["tensors"](Path(model["model"]))) for model in config["models"]]
            merged = {k: (sum(model[k].double() for model in models) / 2).to(w.dtype) for k, w in models[0].items()}
            Path(out).mkdir()
            save_file(merged, Path(out) / "model.safetensors")
        return 2.5, 1.5, 3_000_000

    monkeypatch.setitem(script, "run", in_this_process)
    sizes = ["--experts=2", "--hidden=16", "--intermediate=24", "--layers=1", "--vocabulary=20"]
    given = [str(tmp_path), "--mergekit=python", "--cases", "linear", "ties", *sizes]
    monkeypatch.setattr(sys, "argv", ["against_mergekit.py", *given])
    script["main"]()
    linear, ties = (line.split("|")[1:-1] for line in (tmp_path / "table.md").read_text().splitlines()[2:])
    label, difference, ours, theirs, ratio, equal, *off, seconds, _, peak, _ = (cell.strip() for cell in linear)
    assert (label, ours, theirs, ratio, equal) == ("linear", "100.0 %", "100.0 %", "1.000", "100.00 %")
    assert float(difference) < 1e-6 and off[0] == off[1] and (seconds, peak) == ("2.5 (1.5)", "3")
    assert float(ties[1]) > 0.1 and ties[5].strip() != "100.00 %"
    assert not (tmp_path / "models").exists() and "2 experts of 0.0 M parameters" in capsys.readouterr().out
    times = ["--times-only", "--repeat=2", f"--before={tmp_path}", "--timed", "linear"]
    monkeypatch.setattr(sys, "argv", ["against_mergekit.py", str(tmp_path), "--mergekit=python", *times, *sizes])
    script["main"]()
    header, _, row = (tmp_path / "table.md").read_text().splitlines()
    assert header.split("|")[1:-1][1:4] == [" seconds: before ", " seconds: ours ", " seconds: theirs "]
    assert row == "| linear |" + 3 * " 2.5 / 2.5 |" + 3 * " 1.5 / 1.5 |" + 3 * " 3 / 3 |"
    assert len({case.label for case in script["CASES"]}) == len(script["CASES"])
    for case in script["CASES"]:
        assert resolve_method(case.ours).most_experts in (None, case.experts)
