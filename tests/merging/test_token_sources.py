"""Sources of single tokens' rows, as mergekit documents them: its examples give the rows that its rule says."""

import json

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_esm import HfEsmError, merge_models
from support import reference
from support.helpers import perturbed, stored_tensors
from support.problems import relative_error
from support.tiny import LLAMA, SENTENCES
from support.vocabularies import EMBEDDING, HEAD, TOKENS, row_of, write


LLAMA3 = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML = ["<|im_start|>", "<|im_end|>"]
ADDED = {
    "base": LLAMA3,
    "chatml_model": [*LLAMA3, *CHATML, "<|original_token|>", "<|special|>"],
    "llama3_model": [*LLAMA3, "<|special|>", "<|im_end|>"],
    "third": [],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base with tokens of Llama 3, an expert that adds those of ChatML, and one that lacks tokens of the base."""
    folder = tmp_path_factory.mktemp("models")
    base = LLAMA.build()
    for seed, (name, added) in enumerate(ADDED.items()):
        write(folder, name, perturbed(base, 0.2, seed) if seed else base, added)
    path = folder / "third" / "tokenizer.json"
    content = json.loads(path.read_text())
    del content["model"]["vocab"]["film"]
    path.write_text(json.dumps(content))
    return folder


def merge(folder, output, tokenizer, **options):
    experts = {name: folder / name for name in ADDED if name != "base"}
    return merge_models(folder / "base", experts, tokenizer=tokenizer, output_dir=output, progress=False, **options)


def tables(folder, weight):
    """The row of every token in every model."""
    found = {}
    for name in ADDED:
        ids, rows = AutoTokenizer.from_pretrained(folder / name).get_vocab(), stored_tensors(folder / name)[weight]
        found[name] = {token: rows[row] for token, row in ids.items()}
    return found


# The README of mergekit, with the names of tasks for the paths.
OVERRIDES = """
source: union
tokens:
  # Use embedding from a specific model
  <|im_start|>:
    source: "chatml_model"

  # Force a specific embedding for all models
  <|special|>:
    source: "llama3_model"
    force: true

  # Map a token to another model's token embedding
  <|renamed_token|>:
    source:
      kind: "model_token"
      model: "chatml_model"
      token: "<|original_token|>"  # or use token_id: 1234

  # Use a zero embedding
  <|unused|>:
    source:
      kind: "zero"
"""
BY_ID = OVERRIDES.replace('token: "<|original_token|>"', f"token_id: {TOKENS + 5}")
BOTH_FORMATS = """
source: union
tokens:
  # ChatML tokens
  <|im_start|>:
    source: "chatml_model"
  <|im_end|>:
    source: "chatml_model"

  # Llama 3 tokens - force original embeddings
  <|start_header_id|>:
    source: "llama3_model"
    force: true
  <|end_header_id|>:
    source: "llama3_model"
    force: true
  <|eot_id|>:
    source: "llama3_model"
    force: true
"""
MAPPED = f"""
source: base
tokens:
  film: {{source: {{kind: model_token, model: chatml_model, token_id: {TOKENS + 3}}}, force: true}}
  plot: {{source: {{kind: model_token, model: base, token: so}}, force: true}}
  dull: {{source: {{kind: zero}}, force: true}}
  <|special|>: {{source: {{kind: zero}}}}
  <|im_start|>: {{source: {{kind: zero}}}}
  <|im_end|>: {{source: {{kind: model_token, model: llama3_model, token: so}}}}
"""
STAND_INS = """
tokens:
  film: {source: chatml_model}
  <|eot_id|>: {source: {kind: zero}}
  <|end_header_id|>: {source: {kind: model_token, model: base, token: film}}
"""
EXAMPLES = {
    "the documented overrides": OVERRIDES,
    "by id": BY_ID,
    "both formats of chat": BOTH_FORMATS,
    "tokens of other models": MAPPED,
    "rows in place of those that an expert lacks": STAND_INS,
    "source base": "source: base",
    "source union": "source: union",
    "a model as source": "source: chatml_model",
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_documented_examples_give_the_documented_rows(models, tmp_path, example):
    """Every row of the vocabulary, of embedding and output map, by the rule in float64."""
    settings = yaml.safe_load(EXAMPLES[example])
    merge(models, tmp_path / "m", settings, method="mean")
    ids = AutoTokenizer.from_pretrained(tmp_path / "m").get_vocab()
    assert settings.get("tokens", {}).keys() <= ids.keys()
    for weight in (EMBEDDING, HEAD):
        of_models, sources = tables(models, weight), {}
        for token, setting in settings.get("tokens", {}).items():
            source, force = setting["source"], setting.get("force", False)
            if isinstance(source, str):
                row = of_models[source][token]
            elif source["kind"] == "zero":
                row = torch.zeros(16)
            elif "token_id" in source:
                row = stored_tensors(models / source["model"])[weight][source["token_id"]]
            else:
                row = of_models[source["model"]][source["token"]]
            sources[token] = (row, force)
        expected = reference.rows_of_tokens(of_models, list(ids), sources)
        found = stored_tensors(tmp_path / "m")[weight]
        for token, row in ids.items():
            assert torch.allclose(found[row].double(), expected[token], atol=1e-6), token
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")


@pytest.mark.cases(2)
@pytest.mark.parametrize("method", ["esm", "regmean", "ties", "esm++"])
def test_forced_rows_are_the_sources_by_every_method(models, tmp_path, method):
    """Also after refining, and where samples count how often each model's token is read."""
    texts = {
        "chatml_model": [f"<|im_start|> {text} <|original_token|> <|im_end|>" for text in SENTENCES * 2],
        "llama3_model": [f"<|special|> {text} <|im_end|> <|im_end|>" for text in SENTENCES * 2],
        "third": ["so dull", "the plot", "so so", "not the one"],
    }
    tokens = {"film": {"source": "chatml_model", "force": True}, "<|unused|>": {"source": {"kind": "zero"}}}
    other = {"kind": "model_token", "model": "chatml_model", "token": "<|original_token|>"}
    tokens |= {"<|new|>": {"source": other}, "plot": {"source": other, "force": True}, "<|im_end|>": {"source": other}}
    refine = {"refine": {"components": 2, "steps": 3}} if method == "esm" else {}
    alpha = {} if method == "esm++" else {"alpha": 0.6}
    merge(models, tmp_path / "m", {"tokens": tokens}, method=method, calibration=texts, **alpha, **refine)
    original = row_of(models / "chatml_model", "<|original_token|>")
    for token, expected in [
        ("film", row_of(models / "chatml_model", "film")),
        ("<|new|>", original),
        ("plot", original),
    ]:
        assert torch.allclose(row_of(tmp_path / "m", token), expected, atol=1e-6), token
    assert not row_of(tmp_path / "m", "<|unused|>").any()
    ends = [row_of(models / name, "<|im_end|>").double() for name in ("chatml_model", "llama3_model")]
    assert relative_error(row_of(tmp_path / "m", "<|im_end|>"), (ends[0] + 2 * ends[1]) / 3) < 1e-5  # as it is read


def test_rows_that_adapters_lack_are_the_sources_too(models, tmp_path):
    """Adapters that do not touch the embeddings, one with a tokenizer that lacks a token of the base."""
    for name in ("chatml_model", "third"):
        model = AutoModelForCausalLM.from_pretrained(models / "base")
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(model, config).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(models / ("third" if name == "third" else "base")).save_pretrained(
            tmp_path / name
        )
    experts = {name: tmp_path / name for name in ("chatml_model", "third")}
    settings = {"tokens": {"film": {"source": {"kind": "model_token", "model": "base", "token": "so"}}}}
    options = {"tokenizer": settings, "method": "mean", "output_dir": tmp_path / "m", "progress": False}
    merge_models(models / "base", experts, **options)
    rows = [row_of(models / "base", token) for token in ("film", "so")]
    assert torch.allclose(row_of(tmp_path / "m", "film"), sum(rows) / 2, atol=1e-6)


def test_added_tokens_are_as_special_as_those_whose_rows_they_get(models, tmp_path):
    tokens = {"<|unused|>": {"source": {"kind": "zero"}}, "<|im_start|>": {"source": "chatml_model"}}
    merge(models, tmp_path / "m", {"source": "base", "tokens": tokens}, method="mean")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    assert added["<|im_start|>"].special and not added["<|unused|>"].special and "<|im_end|>" not in added
    assert tokenizer.tokenize("film <|im_start|>") == ["film", "<|im_start|>"]


def test_a_source_without_effect_is_warned_of_and_its_remedy_works(models, tmp_path):
    experts = {name: models / name for name in ("chatml_model", "llama3_model")}
    arguments = {"base": models / "base", "experts": experts, "method": "mean", "progress": False}
    for token in ("plot", "<|special|>"):
        tokens = {token: {"source": "llama3_model"}}
        result = merge_models(**arguments, tokenizer={"tokens": tokens}, output_dir=tmp_path / f"{token[0]}1")
        assert any(f"every expert has the token {token!r}" in warning for warning in result.warnings)
        tokens[token]["force"] = True
        result = merge_models(**arguments, tokenizer={"tokens": tokens}, output_dir=tmp_path / f"{token[0]}2")
        assert not any("has no effect" in warning for warning in result.warnings)
        assert torch.equal(row_of(result.output_dir, token), row_of(models / "llama3_model", token))


POSSIBLE = "there are base, chatml_model, llama3_model, third, {kind: zero}, {kind: model_token, model: …, token: …}"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("chat_model", f"no source 'chat_model' (did you mean 'chatml_model'?); {POSSIBLE}"),
        ("zeros", "did you mean 'zero'"),
        (None, POSSIBLE),
        ({"force": True}, POSSIBLE),
        ({"source": {"kind": "mean"}}, POSSIBLE),
        ({"source": {"model": "third"}}, POSSIBLE),
        ({"source": "base", "forced": True}, "did you mean 'force'"),
        ({"kind": "zero"}, "no key 'kind'"),
        ({"source": "base", "force": "yes"}, "force must be true or false"),
        ({"source": {"kind": "zero", "model": "base"}}, "no key of the kind zero: 'model'"),
        ({"source": {"kind": "model_token", "model": "fourth", "token": "so"}}, "no model 'fourth'"),
        ({"source": {"kind": "model_token", "model": "base"}}, "either `token` or `token_id`"),
        ({"source": {"kind": "model_token", "model": "base", "token": "so", "token_id": 3}}, "either `token` or"),
        ({"source": {"kind": "model_token", "model": "base", "token_id": -1}}, "token_id must be a whole number"),
        ({"source": {"kind": "model_token", "model": "base", "token_id": 60}}, "60 rows, and none with token_id 60"),
        ({"source": {"kind": "model_token", "model": "third", "token": "film"}}, "no token 'film' in expert 'third'"),
    ],
)
def test_other_sources_are_refused(models, tmp_path, setting, says):
    with pytest.raises(HfEsmError) as caught:
        merge(models, tmp_path / "m", {"tokens": {"<|x|>": setting}}, method="mean")
    assert says in str(caught.value) and "'<|x|>'" in str(caught.value) and not (tmp_path / "m").exists()


def test_tokens_are_named_only_where_a_tokenizer_tells_their_rows(models, tmp_path):
    base = LLAMA.build()
    for seed, name in enumerate(["base", "one", "two"]):
        perturbed(base, 0.1 * bool(seed), seed).save_pretrained(tmp_path / name)
    arguments = {"base": tmp_path / "base", "experts": {n: tmp_path / n for n in ("one", "two")}, "method": "mean"}
    arguments |= {"tokenizer": {"tokens": {"film": {"source": "one", "force": True}}}, "progress": False}
    with pytest.raises(HfEsmError, match="no model has a tokenizer"):
        merge_models(**arguments, output_dir=tmp_path / "m")
    AutoTokenizer.from_pretrained(models / "base").save_pretrained(tmp_path / "base")
    folder = merge_models(**arguments, output_dir=tmp_path / "m").output_dir
    row = AutoTokenizer.from_pretrained(folder).get_vocab()["film"]
    assert torch.equal(row_of(folder, "film"), stored_tensors(tmp_path / "one")[EMBEDDING][row])
