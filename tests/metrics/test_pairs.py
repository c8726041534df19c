"""Pairs of texts: cosines and ranks by hand, ties, equal texts, and models and rows that are refused."""

import pytest
import torch
from scipy.stats import spearmanr

from hf_esm import HfEsmError
from hf_esm.data.options import SampleOptions
from hf_esm.metrics.labels import LabelledSamples
from hf_esm.metrics.metric import load_labelled
from hf_esm.metrics.named import resolve_metric
from hf_esm.metrics.pairs import cosines_of, embeddings_of, ranks_of, recall_at_10, reciprocal_rank, spearman
from support.problems import SEEDS
from support.tiny import BERT, GPT2, save_tokenizer


def samples(seed, count=9):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(5, 40, (3 + i % 5,), generator=generator)} for i in range(count)]


@torch.no_grad()
def vectors(model, rows):
    """The mean of the last hidden states, one text at a time, of length 1."""
    found = torch.stack(
        [model(input_ids=row["input_ids"][None]).last_hidden_state[0].double().mean(0) for row in rows]
    )
    return found / found.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_rank_correlation_is_that_of_scipy_with_and_without_ties(seed):
    generator = torch.Generator().manual_seed(seed % 2**31)
    for levels in (3, 1000):
        cosines, scores = (torch.randint(levels, (30,), generator=generator).double() for _ in range(2))
        assert spearman(cosines, scores) == pytest.approx(spearmanr(cosines, scores).statistic, abs=1e-12)
    assert spearman(torch.ones(4), torch.arange(4.0)) != spearman(torch.ones(4), torch.arange(4.0))  # NaN


@pytest.mark.parametrize("seed", SEEDS)
def test_ranks_are_those_of_all_cosines_and_equal_texts_count_once(seed):
    model, first, second = BERT.build("BertModel"), samples(seed % 2**31), samples(seed % 2**31 + 1)
    second[4] = second[2]
    data = LabelledSamples(first, torch.zeros(9), partners=second)
    queries, documents = vectors(model, first), vectors(model, second)
    assert torch.allclose(cosines_of(model, data, 3), (queries * documents).sum(1), atol=1e-6)
    different = [i for i in range(9) if i != 4]
    expected = []
    for i, query in enumerate(queries):
        own = 2 if i == 4 else i
        others = [float(documents[j] @ query) for j in different if j != own]
        expected.append(1 + sum(cosine > float(documents[own] @ query) for cosine in others))
    assert ranks_of(model, data, 3).tolist() == expected


def test_a_model_that_embeds_all_texts_alike_finds_none():
    model = BERT.build("BertModel")
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.encoder.layer[-1].output.LayerNorm.bias.fill_(1.0)
    data = LabelledSamples(samples(1), torch.zeros(9), partners=samples(2))
    assert ranks_of(model, data).tolist() == [9] * 9


def test_scores_of_ranks_end_after_the_tenth():
    ranks = torch.tensor([1, 2, 10, 11])
    assert reciprocal_rank(ranks, None) == pytest.approx((1 + 1 / 2 + 1 / 10) / 4)
    assert recall_at_10(ranks, None) == 0.75


def test_rows_name_their_columns_and_hold_numbers(tmp_path):
    tokenizer, config = save_tokenizer(tmp_path), BERT.build("BertModel").config
    options = SampleOptions(columns={"text": "a", "text_pair": "b", "label": "score"})
    rows = [{"a": "so good", "b": "a film", "score": 4.5}, {"a": "bad", "b": "one plot", "score": "1"}]
    data = load_labelled(rows, tokenizer, config, "data", options, resolve_metric("similarity"))
    assert data.labels.tolist() == [4.5, 1.0]
    for sample, text in zip([*data.samples, *data.partners], ["so good", "bad", "a film", "one plot"]):
        assert sample["input_ids"].tolist() == tokenizer(text).input_ids
    refused = [
        ("similarity", [{"a": "so", "b": "it", "score": "very"}], "row 0: similarity needs a number"),
        ("similarity", [{"a": "so", "b": "it"}], "row 0 needs a label"),
        ("mrr@10", [{"a": "so"}], "row 0 is not a pair of texts"),
        ("recall@10", ["so"], "row 0 is not a pair of texts"),
    ]
    for metric, wrong, message in refused:
        with pytest.raises(HfEsmError, match=message):
            load_labelled(wrong, tokenizer, config, "data", options, resolve_metric(metric))
    pairs = load_labelled([("so", "it")], tokenizer, config, "data", SampleOptions(), resolve_metric("mrr@10"))
    assert len(pairs.samples) == len(pairs.partners) == 1


@pytest.mark.parametrize("model", [BERT.build(), GPT2.build()], ids=["classifier", "language model"])
def test_models_with_a_head_are_refused(model):
    with pytest.raises(HfEsmError, match="gives no embedding of a text"):
        embeddings_of(model, samples(0))
