"""Prompts of embedding models: samples and rows are read as `SentenceTransformer.encode` reads them by default."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from hf_esm import RoutedModel, calibrate, evaluate, merge_models
from hf_esm.checkpoints import open_checkpoint, prompt_before, resolve_source
from hf_esm.data import SampleOptions, batch_for, encode, with_prompt
from support.embedders import TEXTS, pooled, texts_of, token_states, write_embedder
from support.problems import relative_error
from support.tiny import save_tokenizer


QUERY = "encoder.layer.0.attention.self.query.weight"
DENSE = "sentence_modules.2_Dense.linear.weight"
MODES = ["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
CALIBRATION = {"one": texts_of(1), "two": texts_of(2)}


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write(folder, seed, prompt=None, pooling="mean", pooled_too=True, **settings):
    """An embedder with a default prompt."""
    write_embedder(folder, seed, pooling=pooling, prompts={"query": prompt} if prompt else {}, **settings)
    change(folder / "config_sentence_transformers.json", default_prompt_name="query" if prompt else None)
    change(folder / "1_Pooling" / "config.json", include_prompt=pooled_too)
    return folder


def encoded(folder, texts, **settings):
    """Embeddings by the library."""
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(folder), device="cpu")
    return model.encode(texts, convert_to_tensor=True, **settings).double()


@pytest.mark.parametrize("pooled_too", [True, False])
@pytest.mark.parametrize("modes", [*MODES, ["lasttoken", "weightedmean"]], ids=str)
def test_a_model_reads_texts_as_the_library_does_by_default(tmp_path, modes, pooled_too):
    folder = write(tmp_path / "one", 1, "so the ", modes, pooled_too)
    model = open_checkpoint(resolve_source(folder, "one")).load_model()
    processor = with_prompt(save_tokenizer(folder), prompt_before(model))
    samples = encode(TEXTS, processor, model.config, "data", SampleOptions())
    with torch.no_grad():
        found = model(**batch_for(samples, model)).sentence_embedding.double()
        alone = torch.cat([model(**batch_for([sample], model)).sentence_embedding for sample in samples]).double()
    expected = encoded(folder, TEXTS)
    assert torch.allclose(found, expected, atol=1e-5) and torch.allclose(alone, expected, atol=1e-5)
    assert not torch.allclose(expected, encoded(folder, TEXTS, prompt=""), atol=1e-2)


@pytest.mark.parametrize("pooled_too", [True, False])
def test_statistics_are_of_texts_with_the_experts_prompt(tmp_path, pooled_too):
    folder = write(tmp_path / "one", 1, "so the ", pooled_too=pooled_too)
    texts, first = CALIBRATION["one"], 0 if pooled_too else 3  # the first token and two of the prompt
    found = calibrate(folder, texts, progress=False, batch_size=3)
    states = [tokens[first:] for tokens in token_states(folder, ["so the " + text for text in texts])]
    expected = pooled(states, "mean")
    factor = found[DENSE].factor.double()
    assert relative_error(factor.T @ factor, expected.T @ expected) < 1e-5
    assert found[QUERY].count == sum(len(tokens) + first for tokens in states)


PROMPTS = {"base": "a ", "one": "so the ", "two": "not "}


@pytest.fixture(scope="module", params=[True, False], ids=["pooled", "left out"])
def three(request, tmp_path_factory):
    """A base and two experts with default prompts of their own."""
    folder = tmp_path_factory.mktemp("three")
    for seed, (name, prompt) in enumerate(PROMPTS.items()):
        write(folder / name, seed, prompt, pooled_too=request.param)
    return folder


def merge(folder, output, **options):
    experts = {task: folder / task for task in ("one", "two")}
    options = {"calibration": CALIBRATION, "progress": False, **options}
    return merge_models(folder / "base", experts, output_dir=output, **options)


def test_every_expert_is_read_with_its_own_prompt_and_differences_are_warned_of(three, tmp_path):
    result = merge(three, tmp_path / "m", method="regmean", statistics_dir=tmp_path / "statistics")
    for task in ("one", "two"):
        own = calibrate(three / task, CALIBRATION[task], progress=False)
        kept = type(own).load(tmp_path / "statistics" / f"{task}.safetensors")
        for name in (QUERY, DENSE):
            assert kept[name].count == own[name].count
            found, expected = (s[name].factor.double() for s in (kept, own))
            assert relative_error(found.T @ found, expected.T @ expected) < 1e-4
        (said,) = (w for w in result.warnings if w.startswith(f"'{task}'") and "by default after" in w)
        assert repr(PROMPTS[task]) in said and "'a '" in said
        own, without = (encoded(tmp_path / "m", TEXTS, prompt=prompt) for prompt in (PROMPTS[task], ""))
        assert f"`encode(…, prompt={PROMPTS[task]!r})`" in said and not torch.allclose(own, without, atol=1e-2)
    settings = json.loads((tmp_path / "m" / "config_sentence_transformers.json").read_text())
    assert settings["prompts"] == {"query": "a "} and settings["default_prompt_name"] == "query"


def test_agreement_and_scores_are_of_texts_with_prompts(three, tmp_path):
    """An expert is scored by the embeddings that the library makes of the texts, the merged model likewise."""
    folder = merge(three, tmp_path / "m", method="task-arithmetic", alpha="auto").output_dir
    rows = [{"text": a, "text_pair": b, "label": i} for i, (a, b) in enumerate(zip(texts_of(5), texts_of(6)))]
    scores = evaluate(folder, {"one": rows}, experts={"one": three / "one"}, metric="similarity")
    for model, score in ((folder, scores.model["one"]), (three / "one", scores.expert["one"])):
        first, second = (encoded(model, [row[column] for row in rows]) for column in ("text", "text_pair"))
        order = (first * second).sum(1).argsort().argsort().double()
        expected = torch.corrcoef(torch.stack([order, torch.arange(len(rows)).double()]))[0, 1]
        assert score == pytest.approx(float(expected), abs=1e-6)


def test_refined_and_routed_models_read_prompts(three, tmp_path):
    samples = {task: texts_of(seed, 20) for seed, task in enumerate(("one", "two"))}
    assert merge(three, tmp_path / "r", calibration=samples, refine={"steps": 3}).refined
    folder = merge(three, tmp_path / "m", calibration=samples, method="esm++", rank=4).output_dir
    routed = RoutedModel.from_pretrained(folder)
    ready = {name: value[0] for name, value in routed.processor("a dull plot", return_tensors="pt").items()}
    (read,), (expected,) = routed.explain(["dull plot"]), routed.explain([ready])
    assert read.probabilities == expected.probabilities
    rows = [{"text": a, "text_pair": b, "label": i} for i, (a, b) in enumerate(zip(texts_of(5), texts_of(6)))]
    assert evaluate(folder, {"one": rows}, metric="similarity").routing


@pytest.mark.parametrize(
    ("base", "one", "two", "name"),
    [("", "b ", "b ", "query"), ("", "b ", "c ", None), ("", "b ", "", "query"), ("a ", "", "a ", "query")],
)
def test_a_merged_model_has_a_default_prompt_only_if_it_has_its_text(tmp_path, base, one, two, name):
    for seed, (model, prompt) in enumerate({"base": base, "one": one, "two": two}.items()):
        write(tmp_path / model, seed, prompt)
    result = merge(tmp_path, tmp_path / "m", method="mean")
    settings = json.loads((tmp_path / "m" / "config_sentence_transformers.json").read_text())
    assert settings["default_prompt_name"] == name
    assert encoded(tmp_path / "m", TEXTS).shape == (len(TEXTS), 8)
    merged = settings["prompts"].get(name, "")
    warned = {task for task in ("one", "two") for w in result.warnings if w.startswith(f"'{task}': it reads texts")}
    assert warned == {task for task, prompt in (("one", one), ("two", two)) if prompt != merged}


def test_live_models_are_read_with_their_prompts_too(three, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    live = {name: library.SentenceTransformer(str(three / name), device="cpu") for name in PROMPTS}
    live["two"].prompts["query"] = "film "
    found = calibrate(live["two"], CALIBRATION["two"], progress=False)
    count = sum(map(len, token_states(three / "two", ["film " + text for text in CALIBRATION["two"]])))
    assert found[QUERY].count == count
    live["two"].prompts["query"] = PROMPTS["two"]
    experts = {task: live[task] for task in ("one", "two")}
    options = {"calibration": CALIBRATION, "progress": False, "method": "regmean", "output_dir": tmp_path / "live"}
    merge_models(live["base"], experts, **options)
    merge(three, tmp_path / "folders", method="regmean")
    for name in ("model.safetensors", "2_Dense/model.safetensors"):
        assert (tmp_path / "live" / name).read_bytes() == (tmp_path / "folders" / name).read_bytes()
    rows = [{"text": a, "text_pair": b, "label": i} for i, (a, b) in enumerate(zip(texts_of(5), texts_of(6)))]
    scores = [
        evaluate(three / "one", {"one": rows}, experts={"one": expert}, metric="similarity").expert
        for expert in (live["one"], three / "one")
    ]
    assert scores[0] == scores[1]


def test_an_adapter_of_a_base_is_read_with_the_bases_prompt_whatever_the_processor_is(three, tmp_path):
    model = AutoModel.from_pretrained(three / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)).save_pretrained(tmp_path)
    count = sum(map(len, token_states(three / "base", ["a " + text for text in TEXTS])))
    tokenizer = save_tokenizer(tmp_path)
    for options in ({}, {"processor": tokenizer}):
        found = calibrate(tmp_path, TEXTS, base=three / "base", progress=False, **options)
        assert found[QUERY].count == count
    assert not hasattr(tokenizer, "sample_prompt")
