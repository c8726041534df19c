"""Experts whose vocabularies differ: rows of embeddings and output maps are matched by token, not by index."""

import json

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_esm import HfEsmError, RoutedModel, calibrate, compare, load_recipe, merge_models
from hf_esm.checkpoints.layout import RECIPE_FILE
from hf_esm.methods.embeddings import PRIOR
from support.architectures import ARCHITECTURES
from support.helpers import perturbed, stored_tensors
from support.problems import relative_error
from support.tiny import LLAMA, SENTENCES, save_tokenizer
from support.vocabularies import EMBEDDING, HEAD, TOKENS, row_of, write


TEMPLATE = "{% for m in messages %}<|start|> {{ m.content }} <|end|> {% endfor %}"
OTHER_TEMPLATE = "{% for m in messages %}{{ m.content }} <|end|> {% endfor %}"
ROWS = 60  # of the base's embedding: 40 rows hold no token


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def chat(request, tmp_path_factory):
    """A base without template, and two fine-tunes with one, whose own tokens are in the base's padded rows."""
    folder = tmp_path_factory.mktemp("chat")
    base = LLAMA.build(tie_word_embeddings=request.param, max_position_embeddings=64)
    write(folder, "base", base)
    write(folder, "chat", perturbed(base, 0.2, 1), ["<|start|>", "<|end|>"], TEMPLATE, eos="<|end|>")
    write(folder, "tools", perturbed(base, 0.2, 2), ["<tool>", "<|end|>"], TEMPLATE, eos="<|end|>")
    return folder


CALIBRATION = {
    "chat": [f"<|start|> {text} <|end|>" for text in SENTENCES * 2],
    "tools": [f"{text} <tool> {text} <|end|> <|end|>" for text in SENTENCES * 2],
    "cut": SENTENCES,
}


def merge(folder, output, tasks=("chat", "tools"), **options):
    given = {"calibration": {t: CALIBRATION[t] for t in tasks}, "progress": False, "batch_size": 2, **options}
    return merge_models(folder / "base", {task: folder / task for task in tasks}, output_dir=output, **given)


SMALL = {"components": 4, "steps": 6, "batch_size": 2}
SETTINGS = {
    "mean": {"method": "mean", "weights": {"chat": 0.5}},
    "task-arithmetic": {"method": "task-arithmetic", "alpha": 0.4},
    "regmean": {"method": "regmean", "alpha": 0.7},
    "esm": {"method": "esm"},
    "refined": {"refine": SMALL},
    "routed": {"method": "esm++", "refine": SMALL, "rank": 2},
}


@pytest.mark.cases(4)
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_trained_token_keeps_its_row_and_a_turn_ends(chat, tmp_path, settings):
    merge(chat, tmp_path / "m", **SETTINGS[settings])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    ids = tokenizer.get_vocab()
    assert len({ids[token] for token in ("<|start|>", "<|end|>", "<tool>")}) == 3 and len(tokenizer) == TOKENS + 3
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == ROWS
    weights = [EMBEDDING] if model.config.tie_word_embeddings else [EMBEDDING, HEAD]
    for weight in weights:
        assert torch.allclose(
            row_of(tmp_path / "m", "<|start|>", weight), row_of(chat / "chat", "<|start|>", weight), atol=1e-6
        )
        assert torch.allclose(
            row_of(tmp_path / "m", "<tool>", weight), row_of(chat / "tools", "<tool>", weight), atol=1e-6
        )
        rows = [row_of(chat / task, "<|end|>", weight).double() for task in ("chat", "tools")]
        mixed = (rows[0] + 2 * rows[1]) / 3  # "tools" reads it twice as often
        assert relative_error(row_of(tmp_path / "m", "<|end|>", weight), mixed) < 1e-5
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == "<|end|>"
    assert model.generation_config.eos_token_id == ids["<|end|>"] and model.generation_config.temperature == 0.5
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "the film"}], tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    assert ids["<|start|>"] in inputs.input_ids and ids["[UNK]"] not in inputs.input_ids
    if settings == "routed":
        model = RoutedModel.from_pretrained(tmp_path / "m")
    end = torch.tensor(ids["<|end|>"])  # after any token, the end of a turn is likeliest
    plain = model.model.get_base_model() if settings == "routed" else model
    plain.get_output_embeddings().register_forward_hook(lambda module, read, logits: logits.index_fill(-1, end, 99.0))
    written = model.generate(**inputs, max_new_tokens=5)
    assert written.shape[1] == inputs.input_ids.shape[1] + 1 and written[0, -1] == ids["<|end|>"]


@pytest.mark.cases(1)
def test_rows_of_base_tokens_follow_the_rule_of_embeddings(chat, tmp_path):
    """By the formula in float64, with counts and rows by token."""
    weights = {"chat": 0.5, "tools": 2.0}
    merge(chat, tmp_path / "m", method="regmean", weights=weights)
    base = stored_tensors(chat / "base")[EMBEDDING].double()
    counts, updates = {}, {}
    for task in weights:
        texts = CALIBRATION[task]
        tokenizer = AutoTokenizer.from_pretrained(chat / task)
        ids = torch.tensor([i for text in texts for i in tokenizer(text).input_ids])
        counts[task] = torch.bincount(ids, minlength=ROWS)[:TOKENS].double()
        counts[task] /= len(ids)
        updates[task] = stored_tensors(chat / task)[EMBEDDING].double() - base
    shares = {t: w * (counts[t] + PRIOR / ROWS) for t, w in weights.items()}
    expected = sum(shares[t][:, None] * updates[t][:TOKENS] for t in weights) / sum(shares.values())[:, None]
    found = stored_tensors(tmp_path / "m")[EMBEDDING][:TOKENS].double() - base[:TOKENS]
    assert relative_error(found, expected) < 1e-4


@pytest.mark.cases(1)
def test_other_tasks_are_no_aim_of_a_single_giver(chat, tmp_path):
    """A setting takes a token's row from one model, also that of a token of the base."""
    names = {"<|end|>": "chat", "film": "tools", "plot": "base"}
    tokens = {token: {"source": name, "force": True} for token, name in names.items()}
    result = merge(
        chat, tmp_path / "m", method="task-arithmetic", tokenizer={"tokens": tokens, "pad_to_multiple_of": 64}
    )
    for token, name in names.items():
        assert torch.equal(row_of(tmp_path / "m", token), row_of(chat / name, token))
    rows = stored_tensors(tmp_path / "m")[EMBEDDING]
    assert rows.shape[0] == 64
    base = stored_tensors(chat / "base")[EMBEDDING]
    assert torch.allclose(rows[ROWS:], base.mean(0).expand(4, -1), atol=1e-6)
    recipe = result.output_dir / RECIPE_FILE
    assert yaml.safe_load(recipe.read_text())["tokenizer"]["pad_to_multiple_of"] == 64
    merge_models(**load_recipe(recipe), output_dir=tmp_path / "again", progress=False)
    again = stored_tensors(tmp_path / "again")
    assert all(torch.equal(tensor, again[name]) for name, tensor in stored_tensors(tmp_path / "m").items())


@pytest.mark.cases(1)
def test_the_vocabulary_may_be_that_of_the_base_or_of_a_task(chat, tmp_path):
    merge(chat, tmp_path / "base", method="mean", tokenizer="base", chat_template="chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert len(tokenizer) == TOKENS and "<|end|>" not in tokenizer.get_vocab()
    merge(chat, tmp_path / "tools", method="mean", tokenizer="tools")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tools")
    assert "<tool>" in tokenizer.get_vocab() and "<|start|>" not in tokenizer.get_vocab()
    assert torch.equal(row_of(tmp_path / "tools", "<tool>"), row_of(chat / "tools", "<tool>"))
    with pytest.raises(HfEsmError, match="every sample holds a token that the merged model does not have"):
        merge(chat, tmp_path / "refused", method="regmean", alpha="auto", tokenizer="base", chat_template="chat")
    assert not (tmp_path / "refused").exists()


@pytest.mark.cases(1)
def test_statistics_are_of_an_experts_own_tokens(chat, tmp_path):
    """They were collected without a thought of this merge, and give what its samples give."""
    samples = {"chat": CALIBRATION["chat"], "tools": ["<tool> film <|end|>"]}
    for task, texts in samples.items():
        calibrate(chat / task, texts, progress=False, batch_size=2).save(tmp_path / f"{task}.safetensors")
    merge(chat, tmp_path / "samples", method="esm", calibration=samples)
    merge(chat, tmp_path / "statistics", method="esm", calibration=str(tmp_path))
    one, other = (stored_tensors(tmp_path / name) for name in ("samples", "statistics"))
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """A base without padding, an expert with more rows, one with fewer, and one whose ids are in another order."""
    folder = tmp_path_factory.mktemp("sizes")
    base = LLAMA.build(vocab_size=TOKENS, pad_token_id=0)
    write(folder, "base", base)
    write(folder, "more", perturbed(base, 0.2, 1), ["<new>"], rows=TOKENS + 1)
    return folder, base


def test_rows_are_added_and_heads_config_and_ids_follow(sizes, tmp_path):
    folder, base = sizes
    write(folder, "plain", perturbed(base, 0.2, 2))
    merge_models(
        folder / "base",
        {t: folder / t for t in ("more", "plain")},
        method="mean",
        output_dir=tmp_path / "m",
        progress=False,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.config.vocab_size == TOKENS + 1 and model.get_output_embeddings().weight.shape[0] == TOKENS + 1
    more, plain, found = (stored_tensors(place) for place in (folder / "more", folder / "plain", tmp_path / "m"))
    for name in (EMBEDDING, HEAD):
        assert torch.equal(found[name][TOKENS], more[name][TOKENS])
        assert torch.allclose(found[name][:TOKENS], (more[name][:TOKENS] + plain[name]) / 2, atol=1e-6)


def test_rows_are_matched_by_token_whatever_their_ids(sizes, tmp_path):
    """An expert whose ids are permuted merges to the model that it merges to unpermuted."""
    folder, base = sizes
    plain = perturbed(base, 0.2, 3)
    write(folder, "straight", plain)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for weight in (plain.get_input_embeddings().weight, plain.get_output_embeddings().weight):
            weight.copy_(weight[order].clone())
    write(folder, "permuted", plain)
    words = (folder / "straight" / "vocab.txt").read_text().splitlines()
    path = folder / "permuted" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {words[old]: new for new, old in enumerate(order.tolist())}
    for added in content["added_tokens"]:
        added["id"] = content["model"]["vocab"][added["content"]]
    path.write_text(json.dumps(content))
    (folder / "permuted" / "vocab.txt").write_text("\n".join(words[old] for old in order.tolist()))
    results = {}
    for task in ("straight", "permuted"):
        calibration = {task: SENTENCES * 2, "more": SENTENCES * 2}
        merge_models(
            folder / "base",
            {task: folder / task, "more": folder / "more"},
            calibration=calibration,
            method="esm",
            output_dir=tmp_path / task,
            progress=False,
        )
        results[task] = stored_tensors(tmp_path / task)
    assert all(torch.allclose(results["straight"][n], results["permuted"][n], atol=1e-5) for n in results["straight"])


def test_rows_that_an_expert_has_cut_off_are_the_bases_there(chat, tmp_path):
    cut = AutoModelForCausalLM.from_pretrained(chat / "chat")
    cut.resize_token_embeddings(TOKENS + 2)
    cut.save_pretrained(chat / "cut")
    tokenizer = AutoTokenizer.from_pretrained(chat / "chat")
    tokenizer.save_pretrained(chat / "cut")
    merge(chat, tmp_path / "m", ("cut", "tools"), method="mean")
    base, tools, found = (
        stored_tensors(place)[EMBEDDING] for place in (chat / "base", chat / "tools", tmp_path / "m")
    )
    rows = slice(TOKENS + 3, ROWS)  # of no token, and cut off
    assert torch.allclose(found[rows], (base[rows] + tools[rows]) / 2, atol=1e-6)


@pytest.mark.cases(3)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("settings", ["mean", "regmean", "esm", "refined", "routed"])
def test_an_adapter_brings_the_rows_that_it_trains(tmp_path, tied, settings):
    """Two fine-tunes with tokens of their own, and a LoRA adapter that trains rows of a resized embedding."""
    base = LLAMA.build(tie_word_embeddings=tied, max_position_embeddings=64, vocab_size=TOKENS)
    write(tmp_path, "base", base)
    expert = perturbed(base, 0.2, 1)
    write(tmp_path, "chat", expert, ["<|start|>", "<|end|>"], TEMPLATE, rows=TOKENS + 2, eos="<|end|>")
    code = perturbed(base, 0.2, 2)
    write(tmp_path, "cut", code, ["<code>"], TEMPLATE, rows=TOKENS + 1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(TOKENS + 1, mean_resizing=False)
    config = LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [TOKENS]}, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    adapted.save_pretrained(tmp_path / "tools")
    tokenizer = save_tokenizer(tmp_path / "tools")
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "tools")
    trained = adapted.merge_and_unload().get_input_embeddings().weight[TOKENS]
    merge(tmp_path, tmp_path / "m", ("chat", "cut", "tools"), **SETTINGS[settings])
    assert torch.allclose(row_of(tmp_path / "m", "<tool>"), trained, atol=1e-6)
    for token in ("<|start|>", "<|end|>"):
        assert torch.allclose(row_of(tmp_path / "m", token), row_of(tmp_path / "chat", token), atol=1e-6)
    assert torch.allclose(row_of(tmp_path / "m", "<code>"), row_of(tmp_path / "cut", "<code>"), atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == "<|end|>"


def test_a_row_that_one_adapter_alone_trains_is_taken_whole(tmp_path):
    """Two adapters train rows of the base: one each, and one row together."""
    base = LLAMA.build(vocab_size=TOKENS)
    write(tmp_path, "base", base)
    rows = {"one": [6, 8], "two": [7, 8]}
    for seed, (task, indices) in enumerate(rows.items()):
        config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": indices})
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "trainable_tokens" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        adapted.save_pretrained(tmp_path / task)
        rows[task] = adapted.merge_and_unload().get_input_embeddings().weight
    experts = {task: tmp_path / task for task in rows}
    merge_models(tmp_path / "base", experts, method="task-arithmetic", output_dir=tmp_path / "m", progress=False)
    found, own = stored_tensors(tmp_path / "m")[EMBEDDING], stored_tensors(tmp_path / "base")[EMBEDDING]
    assert torch.allclose(found[6], rows["one"][6], atol=1e-6) and torch.allclose(found[7], rows["two"][7], atol=1e-6)
    assert torch.allclose(found[8], (rows["one"][8] + rows["two"][8]) / 2, atol=1e-6)
    assert torch.equal(found[9:], own[9:]) and not torch.allclose(found[6:9], own[6:9])


@pytest.mark.cases(1)
def test_templates_that_differ_are_refused_until_one_is_named(chat, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(chat / "tools")
    write(chat, "other", other, ["<|end|>", "<tool>"], OTHER_TEMPLATE)
    experts = {task: chat / task for task in ("chat", "other")}
    with pytest.raises(HfEsmError, match=r"The chat templates of 'chat', 'other' differ.*`chat_template='chat'`"):
        merge_models(chat / "base", experts, method="mean", output_dir=tmp_path / "m", progress=False)
    for name, template in (("other", OTHER_TEMPLATE), ("chat", TEMPLATE)):
        options = {"chat_template": name, "method": "mean", "output_dir": tmp_path / name, "progress": False}
        merge_models(chat / "base", experts, **options)
        assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template == template
    with pytest.raises(HfEsmError, match=r"'base' has no template. Name one of chat, other"):
        merge_models(chat / "base", experts, method="mean", chat_template="base", progress=False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tokenizer": "unoin"}, "did you mean 'union'"),
        ({"tokenizer": {"sorce": "union"}}, "did you mean 'source'"),
        ({"tokenizer": {"tokens": {"<no>": "chat"}}}, "no token '<no>' in expert 'chat'"),
        ({"tokenizer": {"tokens": {"<tool>": "chat"}}}, "no token '<tool>' in expert 'chat'"),
        ({"tokenizer": {"tokens": {"film": "other"}}}, "token 'film': there is no source 'other'"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "pad_to_multiple_of must be"),
        ({"tokenizer": 3}, "`tokenizer` must be"),
        ({"tokenizer": "base", "processor": "…"}, "Leave one out"),
    ],
)
def test_what_is_wrong_is_named(chat, tmp_path, options, says):
    if "processor" in options:
        options = {**options, "processor": AutoTokenizer.from_pretrained(chat / "base")}
    with pytest.raises(HfEsmError) as caught:
        merge(chat, tmp_path / "m", method="mean", **options)
    assert says in str(caught.value) and not (tmp_path / "m").exists()


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "deberta-v3", "bart", "t5", "gpt2", "gemma3", "opt", "llava", "mixtral"]
)
def test_all_that_has_a_row_per_token_follows_in_every_architecture(kind, tmp_path):
    """Embeddings, output maps, and biases of these, which are not always of one dimension."""
    base = ARCHITECTURES[kind].build()
    more, plain = perturbed(base, 0.2, 1), perturbed(base, 0.2, 2)
    rows = base.get_input_embeddings().weight.shape[0]
    more.resize_token_embeddings(rows + 3, mean_resizing=False)
    for name, model in {"base": base, "more": more, "plain": plain}.items():
        model.save_pretrained(tmp_path / name)
    experts = {task: tmp_path / task for task in ("more", "plain")}
    result = merge_models(tmp_path / "base", experts, method="mean", output_dir=tmp_path / "m", progress=False)
    found, grown = result.load_model().state_dict(), 0
    for name, tensor in plain.state_dict().items():
        other = more.state_dict()[name]
        assert found[name].shape == other.shape
        if tensor.shape != other.shape:
            (dim,) = [d for d in range(tensor.dim()) if tensor.shape[d] != other.shape[d]]
            new = torch.arange(rows, rows + 3)
            assert torch.allclose(found[name].index_select(dim, new), other.index_select(dim, new), atol=1e-6)
            other, grown = other.narrow(dim, 0, rows), grown + 1
            tensor, found[name] = tensor, found[name].narrow(dim, 0, rows)
        assert not tensor.is_floating_point() or torch.allclose(found[name], (tensor + other) / 2, atol=1e-5), name
    assert grown and result.load_model().config.get_text_config().vocab_size == rows + 3


@pytest.mark.cases(1)
def test_a_comparison_takes_experts_of_other_vocabularies(chat, tmp_path):
    rows = {task: [{"text": text, "label": "film"} for text in SENTENCES[:2]] for task in ("chat", "tools")}
    found = compare(
        chat / "base",
        {task: chat / task for task in rows},
        methods=["mean", "regmean"],
        calibration={task: CALIBRATION[task] for task in rows},
        test=rows,
        metric="perplexity",
        tokenizer={"pad_to_multiple_of": 64},
        output_dir=tmp_path / "report",
        progress=False,
    )
    assert [row.label for row in found.rows] == ["mean", "regmean"]


def test_rows_without_samples_are_those_of_the_usual_tokenizer_sources(chat, tmp_path):
    """As mergekit documents a union: a token of one expert keeps its row, one of several has the mean of the rows, and
    an expert that lacks a token of the base counts with the base's row.
    """
    cut = AutoModelForCausalLM.from_pretrained(chat / "tools")
    write(chat, "fewer", cut, ["<tool>", "<|end|>"], TEMPLATE)
    path = chat / "fewer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["other"] = content["model"]["vocab"].pop("film")
    path.write_text(json.dumps(content))
    experts = {task: chat / task for task in ("chat", "fewer")}
    merge_models(chat / "base", experts, method="mean", output_dir=tmp_path / "m", tokenizer="base", progress=False)
    base, one = row_of(chat / "base", "film"), row_of(chat / "chat", "film")
    assert torch.allclose(row_of(tmp_path / "m", "film"), (base + one) / 2, atol=1e-6)
    experts = {task: chat / task for task in ("chat", "tools")}
    merge_models(chat / "base", experts, method="mean", output_dir=tmp_path / "union", progress=False)
    rows = [row_of(chat / task, "<|end|>") for task in experts]
    assert torch.allclose(row_of(tmp_path / "union", "<|end|>"), sum(rows) / 2, atol=1e-6)
    assert torch.equal(row_of(tmp_path / "union", "<tool>"), row_of(chat / "tools", "<tool>"))


def test_a_base_that_does_not_fit_into_memory_is_loaded_in_its_own_vocabulary_alone(chat):
    """The remedy of the error works: with the base's vocabulary, the base is loaded as it is."""
    plan = merge(chat, None, method="mean", dry_run=True)
    with pytest.raises(HfEsmError, match="tokenizer='base'"):
        plan.base.load_model(device_map="cpu")
    plan = merge(chat, None, method="mean", tokenizer="base", chat_template="chat", dry_run=True)
    found = plan.base.load_model(device_map="cpu").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(chat / "base").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
