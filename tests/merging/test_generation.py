"""Settings of generation of a merged model: the sampling of one model, and the ends of turns of all."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_esm import HfEsmError, merge_models
from support.helpers import perturbed
from support.tiny import LLAMA, save_tokenizer


# Whatever ends a turn is the template's own word for it: equal templates, different ends.
TEMPLATE = "{% for m in messages %}{{ m.content }} {{ eos_token }} {% endfor %}"
OTHER_TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {{ eos_token }} {% endfor %}"


def write(folder, model, template=None, end=None, settings=None):
    """Save a model whose tokenizer names its end of a turn, and with `settings` a file of settings."""
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer = save_tokenizer(folder)
    tokenizer.chat_template, tokenizer.eos_token = template, end
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(settings or {}))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base that ends at `[SEP]`, an expert `asks` that ends at `bad` and `good`, and one, `tells`, at `so`."""
    folder = tmp_path_factory.mktemp("models")
    base = LLAMA.build(vocab_size=20, max_position_embeddings=64)
    write(folder / "base", base, end="[SEP]", settings={"eos_token_id": 3})
    ids = AutoTokenizer.from_pretrained(folder / "base").get_vocab()
    asks = {"eos_token_id": [ids["bad"], ids["good"]], "temperature": 0.3, "do_sample": True}
    write(folder / "asks", perturbed(base, 0.2, 1), TEMPLATE, "good", asks)
    write(folder / "tells", perturbed(base, 0.2, 2), TEMPLATE, "so", {"eos_token_id": 3, "temperature": 0.8})
    write(folder / "other", perturbed(base, 0.2, 2), OTHER_TEMPLATE, "so", {"eos_token_id": 3, "top_p": 0.8})
    return folder


def merge(folder, output, *tasks, **options):
    experts = {task: folder / task for task in tasks}
    merge_models(folder / "base", experts, method="mean", output_dir=output, progress=False, **options)
    return AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)


def test_an_answer_ends_where_any_expert_ends_its_turn(models, tmp_path):
    model, tokenizer = merge(models, tmp_path / "m", "asks", "tells")
    ids = tokenizer.get_vocab()
    assert model.generation_config.temperature == 0.3 and tokenizer.eos_token == "good"
    for word, ends in {"good": True, "bad": True, "so": True, "[SEP]": True, "film": False}.items():
        always = torch.tensor(ids[word])
        hook = model.get_output_embeddings().register_forward_hook(lambda *a, at=always: a[2].index_fill(-1, at, 99.0))
        written = model.generate(torch.tensor([[ids["the"], ids["plot"]]]), max_new_tokens=5)
        hook.remove()
        assert written.shape[1] == 2 + (1 if ends else 5), word


@pytest.mark.parametrize("voice", ["asks", "other"])
def test_sampling_and_template_are_those_of_the_named_model(models, tmp_path, voice):
    with pytest.raises(HfEsmError, match="chat templates of 'asks', 'other' differ"):
        merge(models, tmp_path / "m", "asks", "other")
    model, tokenizer = merge(models, tmp_path / "m", "asks", "other", chat_template=voice)
    found = model.generation_config
    assert (found.temperature, found.top_p) == {"asks": (0.3, None), "other": (None, 0.8)}[voice]
    assert tokenizer.chat_template == {"asks": TEMPLATE, "other": OTHER_TEMPLATE}[voice]
    assert set(found.eos_token_id) == {tokenizer.get_vocab()[word] for word in ("bad", "good", "so", "[SEP]")}
