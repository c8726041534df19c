"""The base, the experts and the number of rows beside the scores of a merged model, wherever it is scored."""

import json

import pytest
import torch

from hf_esm import compare, evaluate, merge_models
from support.routed_toys import encoded, expert, logits, task_texts
from support.toys import base_model


TASKS = "ab"


def with_base_body(task):
    """The base's body with the head of a task's expert, its pooler included."""
    model = expert(task)
    body = {name: weight for name, weight in base_model().state_dict().items() if not name.startswith("pooler.")}
    model.base_model.load_state_dict(body, strict=False)
    return model


def rows(task, seed, right):
    """Rows, more of the second task, that a model answers rightly but for one in five."""
    texts = task_texts(task, seed, 15 if task == "a" else 20)
    classes = logits(right(task), encoded(texts))
    found = [int(row.argmin() if i % 5 == 0 else row.argmax()) for i, row in enumerate(classes)]
    return [{"text": text, "label": label} for text, label in zip(texts, found, strict=True)]


def accuracy_of(model, labelled):
    answers = logits(model, encoded([row["text"] for row in labelled])).argmax(-1)
    return float((answers == torch.tensor([row["label"] for row in labelled])).double().mean())


@pytest.fixture(scope="module", params=["for_experts", "for_the_base"])
def data(request):
    """Rows that the experts, or the base, answer best."""
    return {task: rows(task, 7, expert if request.param == "for_experts" else with_base_body) for task in TASKS}


@pytest.fixture(scope="module")
def merged_by_labels(models, data, tmp_path_factory):
    return merge_models(
        models / "base",
        {task: models / task for task in TASKS},
        method="task-arithmetic",
        alpha="auto",
        validation=data,
        output_dir=tmp_path_factory.mktemp("merged") / "model",
        progress=False,
    )


def expected(data):
    return {t: (accuracy_of(with_base_body(t), data[t]), accuracy_of(expert(t), data[t]), len(data[t])) for t in TASKS}


def test_a_merge_that_labels_chose(merged_by_labels, data):
    result, found = merged_by_labels, merged_by_labels.scores
    known = evaluate(result.output_dir, data)
    for task, values in expected(data).items():
        score = found[task]
        assert (score.base, score.expert, score.rows) == pytest.approx(values)
        assert score.merged == pytest.approx(known.model[task]) and score.metric == "accuracy"
        below = score.merged < values[0]
        assert any(w.startswith(f"'{task}': the merged model scores less") for w in result.warnings) == below
        line = next(line for line in str(result).splitlines() if line.startswith("  accuracy"))
        assert (
            f"{task} {score.merged:.4g} (base {values[0]:.4g}, expert {values[1]:.4g}; {values[2]} rows, 95 % " in line
        )
        assert score.interval == pytest.approx(known.intervals[task]) and score.interval[0] <= score.merged
    stored = json.loads((result.output_dir / "merge_report.json").read_text())
    assert stored["scores"]["b"]["base"] == pytest.approx(found["b"].base)
    card = (result.output_dir / "README.md").read_text()
    assert f"| {found['b'].base:.4g} | {found['b'].expert:.4g} | 20 |" in card
    assert ("(worse than the base)" in card) == any(score.below_base for score in found.values())


def test_a_model_that_is_evaluated(merged_by_labels, models, data):
    experts = {task: models / task for task in TASKS}
    scores = evaluate(merged_by_labels.output_dir, data, experts=experts, base=models / "base")
    for task, (base, of_expert, count) in expected(data).items():
        assert (scores.base[task], scores.expert[task], scores.rows[task]) == pytest.approx((base, of_expert, count))
    worse = [task for task in TASKS if scores.model[task] < scores.base[task]]
    assert scores.below_base == worse
    assert (f"worse than the base: {', '.join(worse)}" in str(scores)) == bool(worse)
    assert str(scores).splitlines()[0].split() == ["task", "accuracy", "base", "expert", "rows", "95", "%"]
    assert evaluate(merged_by_labels.output_dir, data).base == {}


def test_methods_that_are_compared(models, data, tmp_path):
    experts = {task: models / task for task in TASKS}
    found = compare(
        models / "base", experts, test=data, methods=["task-arithmetic"], output_dir=tmp_path, progress=False
    )
    values = expected(data)
    assert found.base == pytest.approx({task: values[task][0] for task in TASKS})
    assert found.num_rows == {"a": 15, "b": 20}
    text = (tmp_path / "report.md").read_text()
    shown = [f"{100 * values[task][0]:.1f}" for task in TASKS]
    assert f"| the base | | {shown[0]} | {shown[1]} |" in text.replace("  ", " ") and "| test rows |" in text
    worse = [task for task in TASKS if found.rows[0].tasks[task] < found.base[task]]
    assert (f"Worse than the base: task-arithmetic on {', '.join(worse)}." in text) == bool(worse)


def test_a_function_of_the_merged_model_as_a_whole(models, tmp_path):
    def closeness(model):
        distance = (model.encoder.layer[0].attention.self.query.weight - 0.05).abs().mean()
        return -distance.item()

    experts = {task: models / task for task in TASKS}
    options = {"method": "task-arithmetic", "alpha": "auto", "score_fn": closeness, "progress": False}
    score = merge_models(models / "base", experts, output_dir=tmp_path / "merged", **options).scores["merged"]
    assert (score.expert, score.rows) == (None, None)
    assert score.base == pytest.approx(closeness(base_model()))
