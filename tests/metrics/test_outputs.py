"""Answers in words: spans that a model points at, texts that it writes, and how they are scored."""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel

from hf_esm import HfEsmError, evaluate, merge_models
from hf_esm.data.options import SampleOptions
from hf_esm.metrics.metric import ACCURACY, EXACT_MATCH, WORD_F1, Metric, load_labelled
from hf_esm.metrics.named import resolve_metric
from hf_esm.metrics.outputs import LONGEST_SPAN, classes_of, texts_of
from hf_esm.metrics.scores import Outcome, run
from support.architectures import ARCHITECTURES, T5
from support.helpers import perturbed, save
from support.routed_toys import quiet, tuned
from support.tiny import BERT, GPT2, SPECIAL, WORDS, save_tokenizer


COLUMNS = {"text": "question", "text_pair": "context", "label": "answers"}
SQUAD = SampleOptions(num_samples=0, columns=COLUMNS)
PLAIN = SampleOptions(num_samples=0)
SIZE = len(SPECIAL) + len(WORDS)
KIND = "BertForQuestionAnswering"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def writers(tokenizer):
    """The tokenizer of models that read no token types."""
    bare = copy.deepcopy(tokenizer)
    bare.model_input_names = ["input_ids", "attention_mask"]
    return bare


def reader(seed=0):
    return perturbed(BERT.build(KIND, max_position_embeddings=64, num_labels=2), 0.5, seed).eval()


def text(generator, least, most):
    count = int(torch.randint(least, most, (1,), generator=generator))
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator))


def questions(seed, count=9, longest=45):
    """Rows of a question and a context, of which one to three words are the answer."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        context = text(generator, 4, longest)
        start = int(torch.randint(len(context.split()), (1,), generator=generator))
        answer = " ".join(context.split()[start : start + 3])
        row = {"question": text(generator, 2, 6), "context": context, "answers": {"text": [answer, "so so"]}}
        found.append({**row, "id": f"q{len(found)}"})
    return found


@torch.no_grad()
def spans(model, tokenizer, rows, some_unanswerable=False):
    """Answers to one row at a time, the best of all spans tried one by one."""
    found = []
    for row in rows:
        encoded = tokenizer(row["question"], row["context"], return_tensors="pt")
        output, parts = model(**encoded), encoded.sequence_ids()
        start, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        scores = {
            (i, j): start[i] + end[j]
            for i in range(len(parts))
            for j in range(i, min(i + LONGEST_SPAN, len(parts)))
            if parts[i] == parts[j] == 1
        }
        first, last = max(scores, key=scores.get)
        none = some_unanswerable and start[0] + end[0] > scores[first, last]
        found.append("" if none else tokenizer.decode(encoded["input_ids"][0, first : last + 1]))
    return found


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("seed", range(3))
def test_an_answer_is_the_likeliest_span_of_the_context(tokenizer, seed, batch_size):
    model, rows = reader(seed), questions(seed)
    data = load_labelled(rows, tokenizer, model.config, "rows", SQUAD, EXACT_MATCH)
    expected = spans(model, tokenizer, rows)
    assert texts_of(model, data, batch_size) == expected
    for row, answer in list(zip(rows, expected))[::2]:
        row["answers"] = ["plot", answer.upper() + "!"]
    data = load_labelled(rows, tokenizer, model.config, "rows", SQUAD, EXACT_MATCH)
    right = [answer in data.labels[i] for i, answer in enumerate(expected)]
    assert right[::2] == [True] * 5
    assert run(model, data, EXACT_MATCH, batch_size).score == pytest.approx(sum(right) / len(right))


def test_spans_are_of_thirty_tokens_at_most_and_never_of_the_question(tokenizer):
    model = reader()
    with torch.no_grad():  # the farther apart start and end, the better
        model.qa_outputs.weight.zero_()
        model.qa_outputs.bias.zero_()
    hook = model.register_forward_hook(
        lambda _, inputs, output: output.__class__(
            start_logits=-torch.arange(output.start_logits.shape[1]).float().expand_as(output.start_logits),
            end_logits=torch.arange(output.end_logits.shape[1]).float().expand_as(output.end_logits),
        )
    )
    rows = [{"question": "is it", "context": " ".join(["good", *["so"] * 40]), "answers": "good"}]
    data = load_labelled(rows, tokenizer, model.config, "rows", SQUAD, WORD_F1)
    assert texts_of(model, data) == [" ".join(["good", *["so"] * 29])]
    hook.remove()


def test_no_answer_is_one_where_some_questions_have_none(tokenizer):
    model, rows = reader(0), questions(7, 12, longest=8)
    data = load_labelled(rows, tokenizer, model.config, "rows", SQUAD, EXACT_MATCH)
    assert "" not in texts_of(model, data)
    rows[3]["answers"] = "☃"  # is an answer, if none that the tokenizer knows
    data = load_labelled(rows, tokenizer, model.config, "rows", SQUAD, EXACT_MATCH)
    assert data.labels[3] == ["☃"]
    assert "" not in texts_of(model, data)
    rows[3]["answers"] = {"text": [], "answer_start": []}
    data = load_labelled(rows, tokenizer, model.config, "rows", SQUAD, EXACT_MATCH)
    assert data.labels[3] == [""]
    expected = spans(model, tokenizer, rows, some_unanswerable=True)
    assert 0 < expected.count("") < len(expected)
    assert texts_of(model, data, 5) == expected


def test_words_count_as_in_squad():
    exact, overlap = EXACT_MATCH.score_answer, WORD_F1.score_answer
    assert exact("The  Film!", ["plot", "film"]) == 1
    assert exact("theatre", ["atre"]) == 0
    assert exact("a good film", ["good"]) == 0
    assert exact("", [""]) == exact("the", [""]) == 1
    assert overlap("a good old film", ["good film"]) == pytest.approx(2 * 2 / (3 + 2))
    assert overlap("so so good", ["so good", "film"]) == pytest.approx(2 * 2 / (3 + 2))
    assert overlap("so so", ["so so so"]) == pytest.approx(2 * 2 / (2 + 3))
    assert overlap("plot", ["film", "plot"]) == 1
    assert overlap("", ["film"]) == overlap("film", [""]) == 0
    assert overlap("", [""]) == 1


@pytest.mark.parametrize("build", [GPT2.build, T5.build], ids=["decoder", "encoder-decoder"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_texts_are_written_as_each_prompt_alone_would_have_it(writers, build, batch_size):
    model, generator = tuned(build(vocab_size=SIZE), 1, scale=0.15).eval(), torch.Generator().manual_seed(5)
    rows = [{"text": text(generator, 2, 12), "label": "so good"} for _ in range(7)]
    data = load_labelled(rows, writers, model.config, "rows", PLAIN, EXACT_MATCH)
    expected = []
    for row in rows:
        encoded = writers(row["text"], return_tensors="pt")
        # "so good" is four tokens with those around it; half as many again are written
        ids = model.generate(**encoded, max_new_tokens=6, do_sample=False)[0]
        written = ids if model.config.is_encoder_decoder else ids[encoded["input_ids"].shape[1] :]
        expected.append(writers.decode(written, skip_special_tokens=True).strip())
    assert len(set(expected)) > 1
    model.generation_config.do_sample = True
    assert texts_of(model, data, batch_size) == expected
    for row, answer in list(zip(rows, expected))[:3]:
        row["label"] = [answer, "dull"]
    data = load_labelled(rows, writers, model.config, "rows", PLAIN, EXACT_MATCH)
    model.generation_config.max_new_tokens = 6
    right = [answer in accepted for answer, accepted in zip(expected, data.labels)]
    outcome = run(model, data, EXACT_MATCH, batch_size)
    assert outcome.score == pytest.approx(sum(right) / 7)
    assert outcome.score >= 3 / 7 - 1e-6
    assert run(model, data, WORD_F1, batch_size).score >= outcome.score - 1e-6
    model.generation_config.max_new_tokens = 1
    assert max(len(answer.split()) for answer in texts_of(model, data)) <= 1


def test_what_is_to_be_written_may_stand_in_the_column_of_targets(writers):
    model = T5.build(vocab_size=SIZE).eval()
    rows = [{"text": "so so", "text_target": "good film"}]
    data = load_labelled(rows, writers, model.config, "rows", PLAIN, WORD_F1)
    assert data.labels == [["good film"]]
    assert "labels" not in data.samples[0]
    ready = [{"input_ids": data.samples[0]["input_ids"], "labels": [5, 6], "label": "good film"}]
    again = load_labelled(ready, writers, model.config, "rows", PLAIN, WORD_F1)
    assert again.labels == data.labels
    assert "labels" not in again.samples[0]
    assert texts_of(model, again) == texts_of(model, data)


class LibraryMetric:
    """Stand-in for a metric of texts from the evaluate library: sum of the differences in length / right length."""

    name, text = "off", SimpleNamespace(dtype="string")

    def __init__(self, several=False):
        one = {"predictions": self.text, "references": self.text}
        self.features = [{**one, "references": SimpleNamespace(feature=self.text)}, one] if several else one
        self.read = []

    def compute(self, predictions, references):
        self.read.append(references)
        right = [text if isinstance(text, str) else text[-1] for text in references]
        off = sum(abs(len(text) - len(found)) for found, text in zip(predictions, right)) / len("".join(right))
        return {"other": -1.0, "off": off} if isinstance(self.features, list) else off


def test_metrics_of_texts_of_the_evaluate_library_read_all_answers_together(writers, monkeypatch):
    metrics = {"wer": LibraryMetric(), "rouge": LibraryMetric(several=True)}
    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=metrics.get))
    model, generator = tuned(GPT2.build(vocab_size=SIZE), 1, scale=0.15).eval(), torch.Generator().manual_seed(8)
    rows = [{"text": text(generator, 2, 9), "label": text(generator, 2, 7)} for _ in range(6)]
    for name in metrics:
        metric = resolve_metric(name)
        assert metric.higher_is_better == (name == "rouge")
        data = load_labelled(rows, writers, model.config, "rows", PLAIN, metric)
        outcome, answers = run(model, data, metric, 4), texts_of(model, data)
        lengths = [(len(answer), len(row["label"])) for answer, row in zip(answers, rows)]
        assert any(a != b for a, b in lengths)
        assert outcome.score == pytest.approx(sum(abs(a - b) for a, b in lengths) / sum(b for _, b in lengths))
        labels = [row["label"] for row in rows]
        assert metrics[name].read[-1] == (labels if name == "wer" else [[label] for label in labels])
        drawn = torch.tensor([0, 0, 3])
        of_these = [lengths[i] for i in drawn]
        expected = sum(abs(a - b) for a, b in of_these) / sum(b for _, b in of_these)
        assert float(outcome.scores_of_draws(drawn[None])) == pytest.approx(expected)
    rows[4]["label"] = ["film", "good film"]
    outcome = run(model, load_labelled(rows, writers, model.config, "rows", PLAIN, metric), metric)
    assert outcome.score != expected
    assert metrics["rouge"].read[-1][3:5] == [[rows[3]["label"]] * 2, ["film", "good film"]]
    with pytest.raises(HfEsmError, match=r"row 4: wer compares with one right text, not .*'good film'.*Give one"):
        load_labelled(rows, writers, model.config, "rows", PLAIN, resolve_metric("wer"))


def test_answers_are_kept_between_comparisons_and_drawn_row_by_row():
    answers, right = ["good film", "plot", "dull so"], [["film"], ["plot", "so"], [""]]
    for metric in (EXACT_MATCH, WORD_F1):
        outcome = Outcome(metric, answers, right, ["a", "b", "a"])
        assert Outcome.from_dict(json.loads(json.dumps(outcome.as_dict())), metric) == outcome
        draws = torch.randint(3, (20, 3), generator=torch.Generator().manual_seed(2))
        expected = Metric.scores_of_draws(metric, answers, right, draws).tolist()
        assert len(set(expected)) > 2
        assert outcome.scores_of_draws(draws).tolist() == pytest.approx(expected)


def test_rows_and_models_without_answers_in_words_are_refused(tokenizer):
    config = reader().config

    def load(row, metric=EXACT_MATCH, processor=tokenizer):
        return load_labelled([row], processor, config, "rows", PLAIN, metric)

    with pytest.raises(HfEsmError, match="row 0: exact-match needs the right text, or a list of right texts, not 1"):
        load({"text": "good", "label": 1})
    with pytest.raises(HfEsmError, match="row 0 needs a label"):
        load({"text": "good"})
    with pytest.raises(HfEsmError, match="row 0 needs a label"):
        load("good")
    with pytest.raises(HfEsmError, match="word-f1 compares texts and needs a tokenizer"):
        load({"input_ids": [5, 6], "label": "good"}, WORD_F1, None)
    data = load({"text": "good", "label": "good"})
    with pytest.raises(HfEsmError, match="Give rows of a question and its context"):
        run(reader(), data, EXACT_MATCH)
    with pytest.raises(HfEsmError, match="BertForSequenceClassification gives no text"):
        run(BERT.build("BertForSequenceClassification").eval(), data, EXACT_MATCH)
    with pytest.raises(HfEsmError, match="exact-match or word-f1"):
        run(reader(), load({"text": "good", "label": 1}, ACCURACY), ACCURACY)


def test_readers_merge_by_what_they_answer(tokenizer, tmp_path):
    whole = reader()
    base = save(AutoModel.from_pretrained(save(whole, tmp_path / "whole")), tmp_path / "base")
    experts, rows = {}, {}
    for i, task in enumerate(("left", "right")):
        model = tuned(whole, i)
        experts[task], rows[task] = save(model, tmp_path / task), questions(20 + i)
        tokenizer.save_pretrained(tmp_path / task)
        for row, answer in zip(rows[task], spans(model, tokenizer, rows[task])):
            row["answers"] = {"text": [answer], "answer_start": [0]}
    arguments = {"columns": COLUMNS, "calibration": rows, "method": "task-arithmetic", "progress": False}
    merged = merge_models(
        base,
        experts,
        **arguments,
        alpha="auto",
        validation=rows,
        metric="word-f1",
        output_dir=str(tmp_path / "merged"),
    )
    assert len(set(merged.alpha_scores.values())) > 1
    scores = evaluate(tmp_path / "merged", rows, experts=experts, metric="word-f1", columns=COLUMNS)
    assert scores.expert == {"left": 1.0, "right": 1.0}
    assert merged.alpha_scores[merged.alpha] == pytest.approx(scores.average)
    assert scores.average < 1
    quiet(
        base, experts, calibration=rows, columns=COLUMNS, num_samples=0, rank=64, output_dir=str(tmp_path / "routed")
    )
    scores = evaluate(tmp_path / "routed", rows, metric="exact-match", columns=COLUMNS, route="oracle")
    assert scores.model == {"left": 1.0, "right": 1.0}


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("bert", "BertForSequenceClassification"),
        ("xlnet", "XLNetForSequenceClassification"),
        ("convbert", "ConvBertForSequenceClassification"),
        ("fnet", "FNetForSequenceClassification"),
        ("wav2vec2", "Wav2Vec2ForSequenceClassification"),
    ],
)
@torch.no_grad()
def test_values_do_not_depend_on_batches(name, head):
    """Though some of these classifiers read the padding of a batch."""
    architecture = ARCHITECTURES[name]
    model, samples = architecture.build(head, num_labels=1), architecture.samples(0)
    expected = torch.cat([model(**{key: value[None] for key, value in s.items()}).logits[0] for s in samples])
    assert torch.allclose(classes_of(model, samples), expected, atol=1e-5)


def test_spans_of_a_reader_with_convolutions_do_not_depend_on_batches(tokenizer):
    settings = {"max_position_embeddings": 64, "num_labels": 2}
    model = perturbed(ARCHITECTURES["convbert"].build("ConvBertForQuestionAnswering", **settings), 0.5, 1)
    data = load_labelled(questions(4), tokenizer, model.config, "rows", SQUAD, EXACT_MATCH)
    assert texts_of(model, data) == texts_of(model, data, batch_size=1)
