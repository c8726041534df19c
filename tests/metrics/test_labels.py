"""Rows with a label for each token, and with several labels at once."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertTokenizerFast

from hf_esm import HfEsmError, evaluate, merge_models
from hf_esm.data.options import SampleOptions
from hf_esm.metrics.labels import LabelledSamples
from hf_esm.metrics.metric import ACCURACY, Metric, load_labelled
from hf_esm.metrics.named import resolve_metric
from hf_esm.metrics.scores import run
from support.helpers import perturbed, save
from support.tiny import BERT, SPECIAL


EVERYTHING = SampleOptions(num_samples=0)
WORDS = ["ada", "lives", "in", "glad", "##bach", "and", "paris"]
NAMES = {"id2label": {0: "O", 1: "PER", 2: "LOC"}, "label2id": {"O": 0, "PER": 1, "LOC": 2}}
ROWS = [
    {"tokens": ["ada", "lives", "in", "gladbach"], "tags": ["PER", "O", "O", "LOC"]},
    {"tokens": ["paris", "lives"], "tags": [2, 0]},
    {"tokens": ["gladbach", "and", "gladbach", "and", "ada"], "tags": np.array([2, 0, 2, 0, 1])},
]
COLUMNS = SampleOptions(num_samples=0, columns={"text": "tokens", "label": "tags"})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("words") / "vocab.txt"
    vocabulary.write_text("\n".join([*SPECIAL, *WORDS]))
    return BertTokenizerFast(str(vocabulary))


def tagger(seed=0):
    return perturbed(BERT.build("BertForTokenClassification", **NAMES), 0.3, seed).eval()


def classifier(**config):
    config = {"num_labels": 3, "problem_type": "multi_label_classification"} | config
    return perturbed(BERT.build("BertForSequenceClassification", **config), 0.3, 1).eval()


def test_a_words_label_is_that_of_its_first_token(tokenizer):
    data = load_labelled(ROWS, tokenizer, tagger().config, "rows", COLUMNS)
    assert [len(sample["input_ids"]) for sample in data.samples] == [7, 4, 9]
    assert data.labels.tolist() == [
        [-100, 1, 0, 0, 2, -100, -100, -100, -100],
        [-100, 2, 0, -100, -100, -100, -100, -100, -100],
        [-100, 2, -100, 0, 2, -100, 0, 1, -100],
    ]
    assert all("labels" not in sample for sample in data.samples)
    ready = [
        {"input_ids": sample["input_ids"].tolist(), "labels": labels[: len(sample["input_ids"])].tolist()}
        for sample, labels in zip(data.samples, data.labels)
    ]
    again = load_labelled(ready, None, tagger().config, "rows", EVERYTHING)
    assert torch.equal(again.labels, data.labels)
    renamed = [{"input_ids": row["input_ids"], "tags": row["labels"]} for row in ready]
    again = load_labelled(renamed, None, tagger().config, "rows", COLUMNS)
    assert torch.equal(again.labels, data.labels)
    assert [list(sample) for sample in again.samples] == [["input_ids"]] * 3
    cut = SampleOptions(num_samples=0, columns=COLUMNS.columns, max_length=4)
    assert load_labelled(ROWS, tokenizer, tagger().config, "rows", cut).labels.tolist() == [
        [-100, 1, 0, -100],
        [-100, 2, 0, -100],
        [-100, 2, -100, -100],
    ]


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_accuracy_of_tokens_is_the_share_of_labelled_ones(tokenizer, batch_size):
    model = tagger()
    data = load_labelled(ROWS, tokenizer, model.config, "rows", COLUMNS)
    right = asked = 0
    for sample, labels in zip(data.samples, data.labels):
        found = model(**{name: value[None] for name, value in sample.items()}).logits[0].argmax(-1)
        for token, label in zip(found.tolist(), labels.tolist()):
            right, asked = right + (token == label), asked + (label != -100)
    outcome = run(model, data, ACCURACY, batch_size)
    assert asked == 11
    assert outcome.score == pytest.approx(right / asked)
    draws = torch.randint(3, (20, 3), generator=torch.Generator().manual_seed(0))
    one_by_one = Metric.scores_of_draws(ACCURACY, outcome.outputs, outcome.labels, draws)
    assert outcome.scores_of_draws(draws).tolist() == pytest.approx(one_by_one.tolist())


def test_metrics_of_a_library_read_the_labelled_tokens_alone(tokenizer, monkeypatch):
    class Loaded:
        name = "many"
        features = dict.fromkeys(("predictions", "references"), SimpleNamespace(dtype="int32"))

        def compute(self, predictions, references):
            assert references == [1, 0, 0, 2, 2, 0, 2, 0, 2, 0, 1]
            return {"many": len(predictions)}

    monkeypatch.setitem(__import__("sys").modules, "evaluate", type("evaluate", (), {"load": lambda name: Loaded()}))
    data = load_labelled(ROWS, tokenizer, tagger().config, "rows", COLUMNS)
    assert run(tagger(), data, resolve_metric("many")).score == 11

    def trainers(found, labels):
        assert found.shape == labels.shape == (3, 9)
        return 0.5

    assert run(tagger(), data, resolve_metric(trainers)).score == 0.5


def test_taggers_merge_and_are_evaluated(tokenizer, tmp_path):
    whole = tagger()
    base = save(AutoModel.from_pretrained(save(whole, tmp_path / "whole")), tmp_path / "base")
    tokenizer.save_pretrained(base)
    experts = {task: save(perturbed(whole, 0.1, seed), tmp_path / task) for seed, task in enumerate("ab", 1)}
    for task in experts:
        tokenizer.save_pretrained(experts[task])
    rows = [{"tokens": row["tokens"], "tags": list(row["tags"])} for row in ROWS]
    data = dict.fromkeys(experts, rows)
    unlabelled = {task: [{"tokens": row["tokens"]} for row in rows] for task in experts}
    merged = merge_models(
        base,
        experts,
        calibration=unlabelled,
        validation=data,
        alpha="auto",
        columns=COLUMNS.columns,
        method="esm++",
        output_dir=tmp_path / "merged",
        progress=False,
    )
    scores = evaluate(tmp_path / "merged", data, experts=experts, columns=COLUMNS.columns, route="static")
    assert scores.average == pytest.approx(merged.alpha_scores[merged.alpha])
    routed = evaluate(tmp_path / "merged", data, columns=COLUMNS.columns, route="oracle")
    assert all(0 <= score <= 1 for score in routed.model.values())


LABELS = {"multi-hot": [[1, 0, 1], [0, 0, 0], [0, 1, 0]], "indices": [[0, 2], [], [1]]}
LABELS |= {"floats": torch.tensor(LABELS["multi-hot"]).float(), "names": [["O", "LOC"], [], ["PER"]]}


@torch.no_grad()
@pytest.mark.parametrize("form", LABELS)
def test_several_labels_are_right_together(form):
    model = classifier(**NAMES)
    ids = torch.randint(5, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "label": label} for row, label in zip(ids, LABELS[form])]
    data = load_labelled(rows, None, model.config, "rows", EVERYTHING)
    assert data.labels.dtype == torch.bool
    assert data.labels.int().tolist() == LABELS["multi-hot"]
    holds = model(input_ids=ids).logits > 0
    data = LabelledSamples(
        data.samples, torch.stack([holds[0], holds[1], holds[2] ^ torch.tensor([True, False, False])])
    )
    outcome = run(model, data, ACCURACY, 2)
    assert outcome.score == pytest.approx(2 / 3)
    draws = torch.tensor([[0, 0, 0], [2, 2, 2], [0, 2, 2]])
    assert outcome.scores_of_draws(draws).tolist() == pytest.approx([1, 0, 1 / 3])

    def hits(found, labels):
        return float((found & labels).sum())

    assert run(model, data, resolve_metric(hits)).score == float(holds[:2].sum() + holds[2, 1:].sum())


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"tokens": ["ada", "and"], "tags": [1]}, "rows: row 0 has 2 words or tokens, but the labels \\[1\\]"),
        ({"tokens": ["ada", "and"], "tags": [1, 7]}, "label 7, but the expert knows 3 classes"),
        ({"tokens": ["ada"], "tags": ["ORG"]}, "no label 'ORG'; it has"),
        ({"tokens": "ada and", "tags": [1, 0]}, "set problem_type to 'multi_label_classification'"),
        ({"tokens": ["ada"]}, "row 0 needs a label"),
        ({"input_ids": [5, 6], "tags": [-100, -100]}, "no token has a label other than -100"),
        ({"input_ids": [5, 6, 7], "tags": [1, 0]}, "set problem_type to 'multi_label_classification'"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tokenizer, row, says):
    with pytest.raises(HfEsmError, match=says):
        load_labelled([row], tokenizer, tagger().config, "rows", COLUMNS)


@pytest.mark.parametrize(
    ("label", "config", "says"),
    [
        (0.9, {}, "row 0: a label is 0.9, but the expert answers a class"),
        (-0.5, {}, "a label is -0.5"),
        (float("nan"), {}, "a label is nan. Leave the row out"),
        (float("inf"), {"num_labels": 1}, "a label is inf. Leave the row out"),
        (
            [0, 1, 0, 1],
            {"problem_type": "multi_label_classification"},
            r"\[0, 1, 0, 1\] name a class twice.*each of the 3",
        ),
        ([0.4, 1.0, 0.9], {"problem_type": "multi_label_classification"}, "a label is 0.4"),
    ],
)
def test_numbers_that_are_no_classes_are_refused(label, config, says):
    config = classifier(**{"problem_type": None} | config).config
    with pytest.raises(HfEsmError, match=says):
        load_labelled([{"input_ids": [5, 6], "label": label}], None, config, "rows", EVERYTHING)


def test_marks_and_lists_of_labels_are_told_apart_by_all_rows():
    """With two classes, [0, 1] may list both or mark the second."""
    config = classifier(num_labels=2, id2label={0: "x", 1: "y"}, label2id={"x": 0, "y": 1}).config
    for labels, expected in (([[0, 1], [1, 1]], [[0, 1], [1, 1]]), ([[0, 1], [1]], [[1, 1], [0, 1]])):
        rows = [{"input_ids": [5, 6], "label": label} for label in labels]
        assert load_labelled(rows, None, config, "rows", EVERYTHING).labels.int().tolist() == expected


@torch.no_grad()
def test_of_several_choices_any_may_be_right():
    model = perturbed(BERT.build("BertForMultipleChoice", architectures=["BertForMultipleChoice"]), 0.3, 1).eval()
    ids = torch.randint(5, 40, (3, 4, 6), generator=torch.Generator().manual_seed(0))
    right = model(input_ids=ids).logits.argmax(-1).tolist()
    rows = [{"input_ids": row, "label": label} for row, label in zip(ids, [*right[:2], (right[2] + 1) % 4])]
    rows += [{"input_ids": ids[0], "label": 3}, {"input_ids": ids[0], "label": 2}]
    data = load_labelled(rows, None, model.config, "rows", EVERYTHING)
    assert run(model, data).score == pytest.approx((2 + (right[0] == 3) + (right[0] == 2)) / 5)
    with pytest.raises(HfEsmError, match="label -1"):
        load_labelled([{"input_ids": ids[0], "label": -1}], None, model.config, "rows", EVERYTHING)


def test_several_labels_are_given_as_a_list():
    with pytest.raises(HfEsmError, match="answers several labels per row: give a list"):
        load_labelled([{"input_ids": [5, 6], "label": 1}], None, classifier().config, "rows", EVERYTHING)


def test_a_label_for_each_token_is_nothing_that_a_classifier_answers(tokenizer):
    model = classifier(problem_type=None)
    data = load_labelled(ROWS, tokenizer, tagger().config, "rows", COLUMNS)
    with pytest.raises(HfEsmError, match=r"answers of shape \(\) per row, but the labels are of shape \(9,\)"):
        run(model, data)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"tokens": ["ada"], "tag": ["PER"]}, r"needs a label in the column 'tags' \(did you mean 'tag'\?\)"),
        ({"tokens": ["ada"], "tags": None, "id": 1}, "needs a label in the column 'tags'. If it is in another"),
        ({"tokens": ["ada"], "tags": ["PRE"]}, r"no label 'PRE' \(did you mean 'PER'\?\); it has"),
    ],
)
def test_errors_name_the_column_or_label_that_was_likeliest_meant(tokenizer, row, says):
    with pytest.raises(HfEsmError, match=says):
        load_labelled([row], tokenizer, tagger().config, "rows", COLUMNS)
