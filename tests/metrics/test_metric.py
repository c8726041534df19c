"""Metrics: perplexity, values, metrics of a library, functions, kinds of a user, and what is refused."""

import math
import pickle
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from hf_esm import HfEsmError, Metric, evaluate, merge_models
from hf_esm.calibration.collection import collect_statistics
from hf_esm.data.options import SampleOptions
from hf_esm.metrics.labels import LabelledSamples
from hf_esm.metrics.metric import ACCURACY, PERPLEXITY, ClassMetric, ReadMetric, load_labelled
from hf_esm.metrics.named import resolve_metric
from hf_esm.metrics.outputs import classes_of, texts_of
from hf_esm.metrics.scores import Scores, run
from support.architectures import T5
from support.helpers import VOCABULARY, perturbed, save
from support.routed_toys import encoded, expert, task_texts
from support.tiny import BERT, GPT2


class Numbers:
    """Stand-in for a metric of classes from the evaluate library."""

    features = dict.fromkeys(("predictions", "references"), SimpleNamespace(dtype="int32"))

    def __init__(self, name):
        self.name = name

    def compute(self, predictions, references):
        wrong = sum(x != y for x, y in zip(predictions, references))
        return {"first": 7.0, self.name: -wrong}


NONE = torch.zeros(7, dtype=torch.int64)  # labels where none is read


def token_samples(seed, count=7):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(3, VOCABULARY, (n,), generator=generator)} for n in lengths]


@torch.no_grad()
def test_perplexity_is_that_of_every_token_one_sample_at_a_time():
    model, samples = GPT2.build().eval(), token_samples(0)
    total = tokens = 0
    for sample in samples:
        ids = sample["input_ids"][None]
        total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    for batch_size in (1, 3, 32):
        found = run(model, LabelledSamples(samples, NONE), PERPLEXITY, batch_size).score
        assert found == pytest.approx(math.exp(total / tokens), rel=1e-5)


@torch.no_grad()
def test_perplexity_of_answers_alone_and_of_encoder_decoders():
    samples = [{**s, "labels": torch.cat([torch.full((2,), -100), s["input_ids"][2:]])} for s in token_samples(1)]
    for model in (GPT2.build().eval(), T5.build().eval()):
        losses = [model(input_ids=s["input_ids"][None], labels=s["labels"][None]).loss for s in samples]
        counts = torch.tensor([len(s["labels"]) - 2 for s in samples])
        expected = math.exp(float((torch.stack(losses) * counts).sum() / counts.sum()))
        found = run(model, LabelledSamples(samples, NONE), PERPLEXITY, 3).score
        assert found == pytest.approx(expected, rel=1e-4)


def test_what_an_encoder_decoder_is_to_write_is_asked_for():
    model, samples = T5.build().eval(), token_samples(0)
    with pytest.raises(HfEsmError, match="perplexity is of what the model is to write"):
        run(model, LabelledSamples(samples, NONE), PERPLEXITY)
    with pytest.raises(HfEsmError, match="T5ForConditionalGeneration gives no class per sample"):
        run(model, LabelledSamples(samples, NONE), ACCURACY)


def test_inputs_that_generating_would_refuse_are_left_out():
    """A BERT tokenizer gives `token_type_ids`, which a T5 does not take."""
    model, samples = T5.build().eval(), token_samples(0, 4)
    with_types = [{**sample, "token_type_ids": torch.zeros_like(sample["input_ids"])} for sample in samples]
    found, expected = (collect_statistics(model, rows, progress=False) for rows in (with_types, samples))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].factor, expected[name].factor) for name in expected)

    class Tokens:
        def decode(self, ids, **_):
            return " ".join(map(str, ids.tolist()))

        def __call__(self, text):
            return SimpleNamespace(input_ids=[5, 6])

    tokenizer = Tokens()
    answers = [
        texts_of(model, LabelledSamples(rows, [["1 2"]] * 4, tokenizer=tokenizer)) for rows in (with_types, samples)
    ]
    assert answers[0] == answers[1]


def test_perplexity_is_of_the_labels_that_rows_come_with():
    model = GPT2.build().eval()
    rows = [{**s, "labels": [-100, -100, *s["input_ids"][2:-1].tolist(), -100]} for s in token_samples(4)]
    found = load_labelled(rows, None, model.config, "rows", SampleOptions(num_samples=0), PERPLEXITY)
    samples = [{name: torch.as_tensor(value) for name, value in row.items()} for row in rows]
    expected = run(model, LabelledSamples(samples, NONE), PERPLEXITY).score
    assert run(model, found, PERPLEXITY).score == pytest.approx(expected)
    bare = LabelledSamples([{"input_ids": s["input_ids"]} for s in samples], NONE)
    assert run(model, bare, PERPLEXITY).score != pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"experts": {"ast2": "anywhere"}},
            r"`data`: there is no task 'ast2' \(did you mean 'sst2'\?\); there are sst2",
        ),
        ({"route": "oracel"}, r"'static', not 'oracel' \(did you mean 'oracle'\?\)"),
    ],
)
def test_names_that_evaluate_does_not_know_are_refused_with_what_was_likeliest_meant(changes, says):
    with pytest.raises(HfEsmError, match=says):
        evaluate("anywhere", {"sst2": [{"text": "a", "label": 0}]}, **changes)


@pytest.mark.parametrize("rows", ["rows.jsonl", {}, [{"text": "a", "label": 0}]])
def test_rows_that_are_not_given_by_task_are_refused(rows):
    with pytest.raises(HfEsmError, match="give labelled rows by task"):
        evaluate("anywhere", rows)


def test_models_whose_answers_a_metric_cannot_read_are_refused():
    samples, kind = (
        LabelledSamples(token_samples(2), NONE),
        "BertForSequenceClassification",
    )
    for model, metric, says in (
        (BERT.build("BertForMaskedLM", vocab_size=VOCABULARY), PERPLEXITY, "predicts no next token"),
        (BERT.build(kind, vocab_size=VOCABULARY, num_labels=1), ACCURACY, "one value, not a class"),
        (
            BERT.build(kind, vocab_size=VOCABULARY, problem_type="multi_label_classification"),
            ACCURACY,
            r"answers of shape \(3,\) per row, but the labels are of shape \(\)",
        ),
    ):
        with pytest.raises(HfEsmError, match=says):
            run(model.eval(), samples, metric)
    nothing = run(
        GPT2.build().eval(),
        LabelledSamples([{"input_ids": torch.tensor([5])}], NONE[:1]),
        PERPLEXITY,
    )
    with pytest.raises(HfEsmError, match="no sample has a token to predict"):
        nothing.metric.score(nothing.outputs, nothing.labels)


def test_of_errors_less_is_better(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=lambda name: Numbers(name.rpartition("/")[2])))
    expected = {"mse": False, "wer": False, "a/folder/wer": False, "f1": True, "matthews_correlation": True}
    assert {name: resolve_metric(name).higher_is_better for name in expected} == expected


def test_perplexity_needs_a_language_model_and_accuracy_a_classifier():
    samples = LabelledSamples(token_samples(2), NONE)
    with pytest.raises(HfEsmError, match="BertForSequenceClassification gives no likelihood"):
        run(BERT.build("BertForSequenceClassification", vocab_size=VOCABULARY).eval(), samples, PERPLEXITY)
    with pytest.raises(HfEsmError, match="GPT2LMHeadModel gives no class per sample"):
        run(GPT2.build().eval(), samples)


@torch.no_grad()
def test_a_head_of_one_label_gives_values():
    model = BERT.build("BertForSequenceClassification", vocab_size=VOCABULARY, num_labels=1).eval()
    samples = token_samples(3)
    expected = torch.stack([model(**{k: v[None] for k, v in s.items()}).logits[0, 0] for s in samples])
    assert torch.allclose(classes_of(model, samples, batch_size=3), expected, atol=1e-5)

    def error(found, labels):
        return -float((found - labels).square().mean())

    data = LabelledSamples(samples, expected + 0.5)
    assert run(model, data, resolve_metric(error)).score == pytest.approx(-0.25, abs=1e-4)


def rows(task):
    texts = task_texts(task, 5)
    with torch.no_grad():
        found = [int(expert(task)(input_ids=s["input_ids"][None]).logits.argmax()) for s in encoded(texts)]
    return [{"text": text, "label": label} for text, label in zip(texts, found)]


def test_any_metric_scores_a_merged_model_and_chooses_alpha(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=lambda name: Numbers("second")))
    given = {task: models / task for task in "ab"}
    data = {task: rows(task) for task in "ab"}
    options = {"calibration": {task: task_texts(task) for task in "ab"}, "progress": False, "alpha": "auto"}
    merged = merge_models(
        models / "base", given, method="esm", validation=data, metric="second", output_dir=tmp_path / "m", **options
    )
    scores = evaluate(tmp_path / "m", data, experts=given, metric="second")
    assert scores.metric == "second"
    assert scores.expert == {"a": 0.0, "b": 0.0}
    assert scores.average == pytest.approx(max(merged.alpha_scores.values()))
    assert scores.normalised is None
    by_share = evaluate(tmp_path / "m", data)
    assert scores.model == {task: pytest.approx(-16 * (1 - by_share.model[task])) for task in "ab"}


def test_alpha_goes_by_the_lowest_perplexity(tmp_path):
    base = save(GPT2.build(), tmp_path / "base")
    given = {t: save(perturbed(GPT2.build(), 0.1, seed), tmp_path / t) for seed, t in enumerate("ab", 1)}
    data = {task: token_samples(seed) for seed, task in enumerate("ab")}
    merged = merge_models(
        base, given, method="task-arithmetic", alpha="auto", validation=data, metric="perplexity", progress=False
    )
    scores = evaluate(merged.output_dir, data, experts=given, metric="perplexity")
    assert -scores.average == pytest.approx(max(merged.alpha_scores.values()), rel=1e-4)
    assert merged.alpha == max(merged.alpha_scores, key=merged.alpha_scores.get)
    assert scores.normalised == pytest.approx(sum(scores.expert[t] / scores.model[t] for t in "ab") / 2)
    assert "perplexity" in str(scores)
    assert f"{scores.model['a']:.3f}" in str(scores)


def test_metrics_that_give_no_number_are_named(monkeypatch):
    loaded = Numbers("many")
    loaded.compute = lambda predictions, references: {"f1": [0.5] * len(predictions)}
    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=lambda name: loaded))
    with pytest.raises(HfEsmError, match=r"'many' gives \[0.5, 0.5\], not a number"):
        resolve_metric("many").score(torch.zeros(2), torch.zeros(2))


def test_measurements_that_compare_nothing_are_refused(monkeypatch):
    loaded = Numbers("length")
    loaded.features = {"predictions": SimpleNamespace(dtype="string")}
    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=lambda name: loaded))
    with pytest.raises(HfEsmError, match="'length' does not compare predictions with references"):
        resolve_metric("length")


def test_unknown_metrics_are_named(monkeypatch):
    def load(name):
        raise FileNotFoundError("nothing there")

    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=load))
    with pytest.raises(HfEsmError, match="cannot load the metric 'f7': nothing there"):
        resolve_metric("f7")
    missing = SimpleNamespace(load=lambda name: __import__("a_package_that_is_not_there"))
    monkeypatch.setitem(sys.modules, "evaluate", missing)
    with pytest.raises(HfEsmError, match="cannot load the metric 'wer': No module named 'a_package"):
        resolve_metric("wer")
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(HfEsmError, match=r"no metric 'f7'.*pip install evaluate"):
        resolve_metric("f7")
    with pytest.raises(HfEsmError, match=r"no metric 'perplexty' \(did you mean 'perplexity'\?\)"):
        resolve_metric("perplexty")
    with pytest.raises(HfEsmError, match="no metric"):
        resolve_metric(["accuracy"])


def test_scores_where_less_is_better_are_normalised_the_other_way_round():
    assert Scores({"a": 4.0}, {"a": 2.0}, metric="perplexity", higher_is_better=False).normalised == 0.5
    assert Scores({"a": 4.0}, {"a": 2.0}).normalised == 2.0
    assert Scores({"a": 4.0}, {}).normalised is None
    assert Scores({"a": 0.0, "b": 0.5}, {"a": 0.2, "b": 0.5}, metric="wer", higher_is_better=False).normalised is None
    assert Scores({"a": 0.0}, {"a": 0.2}).normalised == 0.0


def test_a_metric_is_of_the_kind_that_its_arguments_say():
    assert type(Metric("f1", len)) is type(Metric("f1", len, read=None)) is ClassMetric
    read = Metric("f1", len, higher_is_better=False, read=sum)
    assert type(read) is type(pickle.loads(pickle.dumps(read))) is ReadMetric
    assert (read.name, read.score, read.read, read.higher_is_better) == ("f1", len, sum, False)
    for kind, read in ((ClassMetric, sum), (ReadMetric, None)):
        with pytest.raises(HfEsmError, match="Metric 'f1': `read` goes with"):
            kind("f1", len, read=read)


@dataclass(frozen=True)
class Margin(Metric):
    """A metric of a user: how far the highest logit is above the label's."""

    def load(self, rows, reader):
        labels = torch.tensor(reader.labels(rows))
        return LabelledSamples(reader.encode(reader.unlabelled(rows)), labels)

    @torch.no_grad()
    def outputs(self, model, data, batch_size):
        return torch.cat([model(**{k: v[None] for k, v in s.items()}).logits for s in data.samples])


def test_a_kind_of_a_users_own_is_evaluated(models, tmp_path):
    margin = Margin("margin", lambda logits, labels: (logits.amax(1) - logits[range(len(labels)), labels]).mean())
    data = {task: rows(task) for task in "ab"}
    wrong = {task: [{**row, "label": 1 - row["label"]} for row in data[task]] for task in "ab"}
    right, other = (evaluate(models / "a", {"a": given["a"]}, metric=margin).model["a"] for given in (data, wrong))
    assert right == 0 < other
    samples, labels = encoded(task_texts("a", 5)), torch.tensor([0, 1] * 8)
    outcome = run(expert("a"), LabelledSamples(samples, labels), margin)
    draws = torch.tensor([[0] * 16, [1] * 16])
    each = (outcome.outputs.amax(1) - outcome.outputs[range(16), labels])[:2]
    assert torch.allclose(outcome.scores_of_draws(draws), each.double())


def test_an_outcome_is_printed_without_its_tensors():
    outcome = run(GPT2.build().eval(), LabelledSamples(token_samples(0), NONE), PERPLEXITY)
    assert repr(outcome) == "Outcome(perplexity of 7 rows)"


EVALUATE_METRIC = """
import datasets
import evaluate

class Differences(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"differences": sum(a != b for a, b in zip(predictions, references))}
"""


@pytest.mark.extras
def test_the_evaluate_library_loads_a_metric_from_a_folder_and_scores(tmp_path):
    pytest.importorskip("evaluate", reason="`make test-extras` installs it")
    (tmp_path / "differences").mkdir()
    (tmp_path / "differences" / "differences.py").write_text(EVALUATE_METRIC)
    metric = resolve_metric(tmp_path / "differences")
    assert metric.score(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 1])) == 2
