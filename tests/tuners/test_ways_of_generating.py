"""A routed language model is one model: whatever reads a prompt and its answer, the same logits and routes come out.

The models are deep enough that several blocks run before the router decides.
"""

import copy

import pytest
import torch
from peft import PeftModel
from transformers import DynamicCache, StaticCache

from hf_esm.tuners.routed import padding
from hf_esm.tuners.routed.model import prompt_length, recording, route
from support.architectures import ARCHITECTURES
from support.routed import ROUTERS, TASKS, chosen, rebuilt, save_adapter, task_samples


pytestmark = pytest.mark.slow

DECODERS = ["gpt2", "gpt-neox", "llama", "mistral", "qwen3", "gemma3", "phi3"]
NEW, PROMPT = 5, 6


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads an architecture's model of six blocks, whose discriminant router decides in the fourth."""
    made = {}

    def build(name, router):
        if (name, router) not in made:
            architecture = ARCHITECTURES[name]
            deeper = {key: 6 for key in ("n_layer", "num_hidden_layers") if key in architecture.settings}
            if kinds := architecture.settings.get("layer_types"):
                deeper["layer_types"] = kinds * 3
            base = rebuilt(architecture, **deeper)
            base.generation_config.eos_token_id = None
            folder = tmp_path_factory.mktemp("routed") / "adapter"
            save_adapter(base, architecture, folder, router, depth=0.6)
            made[name, router] = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        return made[name, router]

    return build


def prompts_of(name):
    """A prompt of each task."""
    samples = [task_samples(ARCHITECTURES[name], task, seed=3)[0]["input_ids"] for task in TASKS]
    return torch.stack([row.repeat(3)[:PROMPT] for row in samples])


def at_once(model, ids, **inputs):
    return model(input_ids=ids, **inputs).logits[:, PROMPT - 1 : -1]


def with_labels(model, ids):
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return at_once(model, ids, labels=labels)


def by_name(model, ids):
    """As callers do that skip a model's hooks."""
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return model.get_base_model().forward(input_ids=ids, labels=labels).logits[:, PROMPT - 1 : -1]


def with_length(model, ids):
    with prompt_length(model, PROMPT):
        return at_once(model, ids)


def with_lengths_behind_padding(model, ids):
    """Padding on the left does not count."""
    padding = ids.new_zeros(len(ids), 2)
    mask = torch.cat([padding, torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with prompt_length(model, [PROMPT] * len(ids)):
        logits = model(torch.cat([padding, ids], 1), attention_mask=mask, position_ids=positions).logits
    return logits[:, PROMPT + 1 : -1]


def in_steps(model, ids, cache):
    """Prefill, then one token after another."""
    logits = [model(input_ids=ids[:, :PROMPT], past_key_values=cache, use_cache=True).logits[:, -1]]
    for place in range(PROMPT, ids.shape[1] - 1):
        logits.append(model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(logits, 1)


def in_two_parts(model, ids, cache):
    """Prefill, then all of the answer, as an assistant's draft is checked."""
    first = model(input_ids=ids[:, :PROMPT], past_key_values=cache, use_cache=True).logits[:, -1:]
    rest = model(input_ids=ids[:, PROMPT:-1], past_key_values=cache, use_cache=True).logits
    return torch.cat([first, rest], 1)


def without_a_cache(model, ids):
    """Every pass reads the prompt and the answer so far."""
    with prompt_length(model, PROMPT):
        ends = range(PROMPT, ids.shape[1])
        return torch.stack([model(input_ids=ids[:, :end], use_cache=False).logits[:, -1] for end in ends], 1)


def one_by_one(model, ids):
    return torch.cat([with_length(model, row[None]) for row in ids])


def static(model, ids):
    return in_steps(model, ids, StaticCache(config=model.config, max_cache_len=PROMPT + NEW))


WAYS = {
    "labels": with_labels,
    "by name": by_name,
    "length": with_length,
    "padding": with_lengths_behind_padding,
    "steps": lambda model, ids: in_steps(model, ids, DynamicCache(config=model.config)),
    "static cache": static,
    "draft": lambda model, ids: in_two_parts(model, ids, DynamicCache(config=model.config)),
    "no cache": without_a_cache,
    "alone": one_by_one,
}


@pytest.mark.cases(6)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_every_way_gives_the_logits_and_routes_of_generating(load, name, router):
    model, prompts = load(name, router), prompts_of(name)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with recording(model) as records:
        found = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, **options)
    expected, routes = torch.stack(found.logits, 1), chosen({record[:2]: record[2] for record in records})
    if router == "discriminant":
        (decision,) = [decision for _, _, decision in records]
        assert len(decision.before) > 8 and len(set(*routes.values())) > 1
    with route(model, "static"):
        assert not torch.allclose(with_length(model, found.sequences), expected, atol=1e-2)
    for way in WAYS.values():
        with recording(model) as records:
            logits = way(model, found.sequences)
        assert float((logits - expected).abs().max()) < 1e-4, way
        assert records
        if way is not one_by_one:
            assert all(chosen({record[:2]: record[2]}).items() <= routes.items() for record in records), way


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_named_task_is_added_in_every_layer_also_while_decoding(load, name):
    model, prompts = load(name, "discriminant"), prompts_of(name)
    ids = torch.cat([prompts, prompts[:, :NEW]], 1)
    with route(model, list(TASKS)):
        expected = at_once(model, ids)
        for way in (WAYS["steps"], WAYS["draft"], WAYS["static cache"]):
            assert float((way(model, ids) - expected).abs().max()) < 1e-4
    assert float((with_length(model, ids) - expected).abs().max()) > 1e-3  # the first blocks have no expert there


@torch.no_grad()
def test_callers_that_pad_without_a_mask_get_what_each_sample_gets_alone(load, caplog):
    """As evaluation harnesses do: on the right, where no real token of a decoder sees it."""
    model, prompts = load("llama", "discriminant"), prompts_of("llama")
    rows, pad = [prompts[0], prompts[1][:4], prompts[2][:3]], 1
    assert not any((row == pad).any() for row in rows)
    batch = torch.stack([torch.cat([row, row.new_full((PROMPT - len(row),), pad)]) for row in rows])
    alone = [model(input_ids=row[None]).logits[0] for row in rows]
    config = model.get_base_model().config
    before = config.pad_token_id, config.eos_token_id
    try:
        config.pad_token_id, config.eos_token_id = pad, 2
        found = model(input_ids=batch).logits
        assert all(float((f[: len(e)] - e).abs().max()) < 1e-4 for f, e in zip(found, alone, strict=True))
        assert not caplog.records
        config.eos_token_id = [2, pad]
        padding._warn_once.cache_clear()
        other = [model(input_ids=batch).logits for _ in range(2)]
        assert max(float((f[: len(e)] - e).abs().max()) for f, e in zip(other[0], alone, strict=True)) > 1e-4
        assert len(caplog.records) == 1 and "Pass attention_mask" in caplog.text
    finally:
        config.pad_token_id, config.eos_token_id = before
