"""F1, Matthews' and Spearman's correlation by name, and intervals: against scikit-learn, SciPy and literal counts."""

import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from hf_esm import HfEsmError, evaluate, merge_models
from hf_esm.metrics.labels import LabelledSamples
from hf_esm.metrics.named import BUILT_IN, resolve_metric
from hf_esm.metrics.scores import Outcome, Scores, interval_of, run
from support.helpers import VOCABULARY
from support.routed_toys import encoded, expert, task_texts
from support.tiny import BERT, GPT2


KIND = "BertForSequenceClassification"


@pytest.fixture
def generator(request):
    return torch.Generator().manual_seed(len(request.node.name))


def classes(generator, count, of):
    labels = torch.randint(of, (count,), generator=generator)
    noise = torch.randint(of, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.6, labels, noise), labels


def by_library(name, outputs, labels):
    if name == "mcc":
        return matthews_corrcoef(labels, outputs)
    if name == "spearman":
        return spearmanr(outputs, labels).statistic
    return f1_score(labels, outputs, average="macro" if name == "f1-macro" else "binary", zero_division=0.0)


@pytest.mark.parametrize(("name", "of"), [("f1", 2), ("f1-macro", 2), ("f1-macro", 5), ("mcc", 2), ("mcc", 4)])
def test_scores_and_those_of_draws_are_those_of_the_library(generator, name, of):
    metric, (outputs, labels) = resolve_metric(name), classes(generator, 40, of)
    assert metric.score(outputs, labels) == pytest.approx(by_library(name, outputs, labels), abs=1e-12)
    draws = torch.randint(40, (20, 40), generator=generator)
    draws = torch.cat([draws, draws[:1, :1].expand(1, 40)])  # one row again and again: a class is missing
    expected = [by_library(name, outputs[rows], labels[rows]) for rows in draws]
    assert torch.allclose(metric.scores_of_draws(outputs, labels, draws), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("right", [0, 1])
def test_rows_of_one_class_alone(right):
    outputs, labels = torch.full((5,), right), torch.ones(5, dtype=torch.int64)
    for name in ("f1", "f1-macro", "mcc"):
        assert resolve_metric(name).score(outputs, labels) == by_library(name, outputs, labels)


def test_tokens_count_where_they_have_a_label(generator):
    outputs, labels = (values.reshape(8, 10) for values in classes(generator, 80, 3))
    labels[:, 7:] = outputs[:, 8:9] = -100
    labels[3, 2] = -100
    counted = labels != -100
    for name in ("f1-macro", "mcc"):
        expected = by_library(name, outputs[counted], labels[counted])
        assert resolve_metric(name).score(outputs, labels) == pytest.approx(expected)


def test_the_mean_over_labels_of_which_several_may_hold(generator):
    labels = torch.rand(30, 4, generator=generator) < 0.4
    outputs = labels ^ (torch.rand(30, 4, generator=generator) < 0.2)
    labels[:, 3] = outputs[:, 3] = False  # a label that never holds counts as 0, as in the library
    metric = resolve_metric("f1-macro")
    assert metric.score(outputs, labels) == pytest.approx(by_library("f1-macro", outputs, labels))
    draws = torch.randint(30, (5, 30), generator=generator)
    expected = [by_library("f1-macro", outputs[rows], labels[rows]) for rows in draws]
    assert metric.scores_of_draws(outputs, labels, draws).tolist() == pytest.approx(expected)


def test_ranks_of_values_with_ties(generator):
    values = torch.randn(30, generator=generator)
    labels = (values + torch.randn(30, generator=generator)).round()
    metric = resolve_metric("spearman")
    assert metric.score(values, labels) == pytest.approx(by_library("spearman", values, labels))
    assert resolve_metric("spearman").score(torch.ones(4), labels[:4]) != metric.score(values, labels)  # NaN


def classifier(**config):
    return BERT.build(KIND, vocab_size=VOCABULARY, **config).eval()


def test_models_that_a_metric_does_not_fit_are_refused_with_one_that_does():
    samples = [{"input_ids": torch.tensor([5, 6, 7])}]

    def outcome(model, name, label):
        return run(model, LabelledSamples(samples, torch.tensor([label])), resolve_metric(name))

    several = {"problem_type": "multi_label_classification"}
    for model, name, says in (
        (classifier(num_labels=3), "f1", "f1 is of two classes, but .* has 3 labels. Choose the metric 'f1-macro'"),
        (
            classifier(num_labels=2, **several),
            "f1",
            "2 labels, of which several may hold. Choose the metric 'f1-macro'",
        ),
        (
            classifier(num_labels=3, **several),
            "mcc",
            "mcc is of one class per sample, .* Choose the metric 'f1-macro'",
        ),
        (classifier(num_labels=1), "mcc", "one value, not a class. Choose a metric of values, such as 'spearman'"),
        (classifier(num_labels=3), "spearman", "gives no value: spearman needs a head of one label"),
        (GPT2.build().eval(), "f1-macro", "GPT2LMHeadModel gives no class per sample"),
    ):
        with pytest.raises(HfEsmError, match=says):
            outcome(model, name, 0)
    # What the messages name works.
    outcome(classifier(num_labels=3), "f1-macro", 0)
    outcome(classifier(num_labels=3, **several), "f1-macro", [True, False, True])
    outcome(classifier(num_labels=1), "spearman", 0.5)


def test_an_interval_is_that_of_many_draws_and_always_the_same(generator):
    outputs, labels = classes(generator, 200, 2)
    first, again = (Outcome(resolve_metric("mcc"), outputs, labels).interval for _ in range(2))
    assert first == again
    draws = torch.randint(200, (400, 200), generator=generator)
    expected = torch.tensor([by_library("mcc", outputs[rows], labels[rows]) for rows in draws], dtype=torch.float64)
    low, high = expected.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert first == pytest.approx((low, high), abs=0.05)
    share = Outcome(resolve_metric("accuracy"), outputs, labels)
    error = (share.score * (1 - share.score) / 200) ** 0.5
    assert share.interval[1] - share.interval[0] == pytest.approx(3.92 * error, rel=0.1)


def test_draws_without_a_score_are_left_out_of_an_interval():
    draws = torch.tensor([float("nan"), 1.0, 3.0, float("inf")], dtype=torch.float64)
    assert interval_of(draws) == pytest.approx((1.05, 2.95))
    assert all(bound != bound for bound in interval_of(torch.full((3,), float("nan"))))


def test_every_score_is_shown_with_its_interval():
    outputs, labels = torch.tensor([0, 1, 1, 1] * 10), torch.tensor([0, 1, 0, 1] * 10)
    outcome = Outcome(resolve_metric("accuracy"), outputs, labels)
    scores = Scores({"a": outcome.score}, {}, outcomes={"a": outcome})
    low, high = outcome.interval
    assert f"{100 * low:.1f} to {100 * high:.1f}" in str(scores)
    assert scores.as_dict()["intervals"] == {"a": [low, high]}
    nothing = Outcome(resolve_metric("spearman"), torch.ones(3), torch.ones(3))
    assert Scores({"a": 0.0}, {}, outcomes={"a": nothing}).as_dict()["intervals"] == {"a": None}


def test_a_metric_by_name_scores_a_merged_model_and_chooses_alpha(models, tmp_path):
    data = {}
    for task in "ab":
        texts = task_texts(task, 5)
        with torch.no_grad():
            found = [int(expert(task)(input_ids=s["input_ids"][None]).logits.argmax()) for s in encoded(texts)]
        data[task] = [{"text": text, "label": label} for text, label in zip(texts, found)]
    merged = merge_models(
        models / "base",
        {task: models / task for task in "ab"},
        method="task-arithmetic",
        alpha="auto",
        validation=data,
        metric="f1-macro",
        output_dir=tmp_path / "merged",
        progress=False,
    )
    scores = evaluate(tmp_path / "merged", data, metric="f1-macro")
    assert max(merged.alpha_scores.values()) == pytest.approx(scores.average)
    for task, outcome in scores.outcomes.items():
        assert scores.model[task] == pytest.approx(by_library("f1-macro", outcome.outputs, outcome.labels))
        assert scores.intervals[task][0] <= scores.model[task] <= scores.intervals[task][1]


def test_the_names_that_are_built_in():
    assert {"accuracy", "perplexity", "exact-match", "f1", "f1-macro", "mcc", "spearman"} <= BUILT_IN.keys()
    assert {name: metric.name for name, metric in BUILT_IN.items()} == {name: name for name in BUILT_IN}
