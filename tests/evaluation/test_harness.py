"""Tasks of the lm-evaluation-harness as a metric, from local task files, of static and of routed models."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_esm import HfEsmError, RoutedModel, compare, evaluate, merge_models
from hf_esm.cli.main import main
from hf_esm.metrics.named import resolve_metric
from support.tiny import WORDS
from support.writers import save_writers


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def documents(seed, count=6):
    draw = torch.Generator().manual_seed(seed)
    parts = [[WORDS[i] for i in torch.randperm(len(WORDS), generator=draw)[:8].tolist()] for _ in range(count)]
    # Of answers of two words, the harness scores the second and the end that the tokenizer adds.
    choices = [[" ".join(part[4:6]), " ".join(part[6:])] for part in parts]
    return [
        {"question": " ".join(part[:4]), "choices": c, "label": i % 2}
        for i, (part, c) in enumerate(zip(parts, choices, strict=True))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="the harness is installed by make test-extras")
    folder = tmp_path_factory.mktemp("harness")
    save_writers(folder, "base", ["code", "verse"])
    (folder / "tasks").mkdir()
    for seed, name in enumerate(("tiny_code", "tiny_verse")):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, documents(seed))))
        text = TASK.format(name=name, file=folder / f"{name}.jsonl")
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def arguments(folder):
    texts = {t: [" ".join(WORDS[i : i + 7]) for i in range(s, s + 8)] for s, t in enumerate(("code", "verse"))}
    experts = {task: folder / task for task in texts}
    return {"base": folder / "base", "experts": experts, "calibration": texts, "progress": False}


def right(model, tokenizer, documents):
    """Whether the label's answer is the likeliest, one document and answer at a time."""
    found = []
    for row in documents:
        scores = []
        for choice in row["choices"]:
            prompt = tokenizer(row["question"]).input_ids
            answer = tokenizer(f"{row['question']} {choice}").input_ids[len(prompt) :]
            ids, labels = torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])
            with torch.no_grad():
                scores.append(-float(model(input_ids=ids, labels=labels).loss) * len(answer))
        assert len(set(scores)) == 2
        found.append(float(max(range(2), key=scores.__getitem__) == row["label"]))
    return found


@pytest.mark.extras
def test_a_static_model_scores_what_its_likelihoods_say(folder, arguments):
    metric = {"lm_eval": ["tiny_code", "tiny_verse"], "folder": str(folder / "tasks")}
    scores = evaluate(folder / "code", metric=metric, base=folder / "base", batch_size=4)
    model, tokenizer = (kind.from_pretrained(folder / "code") for kind in (AutoModelForCausalLM, AutoTokenizer))
    for seed, name in enumerate(("tiny_code", "tiny_verse")):
        expected = right(model.eval(), tokenizer, documents(seed))
        assert scores.outcomes[name].outputs.tolist() == expected
        assert scores.model[name] == pytest.approx(sum(expected) / 6) and scores.rows[name] == 6
        assert scores.intervals[name][0] <= scores.model[name] <= scores.intervals[name][1]
    assert scores.base.keys() == scores.model.keys() and scores.metric == "lm_eval"
    few = evaluate(folder / "code", metric={**metric, "limit": 3})
    assert few.rows == {"tiny_code": 3, "tiny_verse": 3}


@pytest.mark.extras
def test_a_routed_model_decides_by_each_prompt(folder, arguments, tmp_path):
    merge_models(**arguments, method={"name": "esm++", "rank": 4}, refine=False, output_dir=tmp_path / "routed")
    metric = {"lm_eval": {"code": "tiny_code", "verse": ["tiny_verse"]}, "folder": str(folder / "tasks")}
    routed, tokenizer = (
        RoutedModel.from_pretrained(tmp_path / "routed"),
        AutoTokenizer.from_pretrained(folder / "base"),
    )
    scores = evaluate(tmp_path / "routed", metric=metric)
    oracle = evaluate(tmp_path / "routed", metric=metric, route="oracle")
    for seed, task in enumerate(("code", "verse")):
        model = routed.task_model(task)
        assert scores.outcomes[task].outputs.tolist() == right(model, tokenizer, documents(seed))
        with routed.route(task):
            assert oracle.outcomes[task].outputs.tolist() == right(model, tokenizer, documents(seed))


@pytest.mark.extras
def test_methods_are_compared_on_tasks_of_the_harness(folder, arguments, tmp_path, capsys):
    metric = {"lm_eval": {"code": ["tiny_code"], "verse": ["tiny_verse"]}, "folder": str(folder / "tasks")}
    found = compare(**arguments, methods=["mean", "ties"], metric=metric, output_dir=tmp_path / "r")
    assert [row.label for row in found.rows] == ["mean", "ties"] and found.num_rows == {"code": 6, "verse": 6}
    assert found.experts["code"] == evaluate(folder / "code", metric={**metric, "lm_eval": "tiny_code"}).average
    assert main(["evaluate", str(folder / "code"), "--metric", json.dumps({**metric, "lm_eval": ["tiny_code"]})]) == 0
    assert "lm_eval" in capsys.readouterr().out


def test_other_forms_are_refused():
    for metric, says in (
        ({"lm_eval": []}, "takes names of tasks"),
        ({"lm_eval": ["a"], "limits": 3}, r"no key 'limits' \(did you mean 'limit'\?\)"),
    ):
        with pytest.raises(HfEsmError, match=says):
            resolve_metric(metric)


def test_without_the_harness_its_extra_is_named(tmp_path, monkeypatch):
    save_writers(tmp_path, "base", [])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(HfEsmError, match=r"pip install hf_esm\[lm-eval\]"):
        evaluate(tmp_path / "base", metric={"lm_eval": ["a"]})
