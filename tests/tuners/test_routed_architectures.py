"""Routed experts on real architectures: a sample's output is the same alone and in a mixed, padded batch,
also in generation.
"""

import copy
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Optional

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from hf_esm import HfEsmError
from hf_esm.tuners.routed.layer import RoutedExpertsLayer
from hf_esm.tuners.routed.model import recording, route, routing_state
from support.architectures import ARCHITECTURES
from support.helpers import Architecture, Samples
from support.routed import (
    ROUTERS,
    TASKS,
    chosen,
    layers,
    pad_rows,
    padded,
    rebuilt,
    recorded,
    save_adapter,
    task_samples,
)


pytestmark = pytest.mark.slow


ENCODERS = ["bert", "roberta", "distilbert", "deberta-v2", "deberta-v3", "mpnet", "albert"]
IMAGES = ["vit", "clip-vision", "dinov2", "swin"]
DECODERS = ["gpt2", "gpt-neox", "llama", "mistral", "qwen3", "gemma3", "phi3"]
SEQUENCES = ["t5", "bart", "whisper"]
LEFT = {*ENCODERS, *DECODERS, "t5"}  # what knows tokens' places from their mask; BART counts padding
# All but those of which Transformers cannot checkpoint activations.
CHECKPOINTED = [n for n in (*ENCODERS, *IMAGES, *DECODERS, *SEQUENCES) if n not in ("mpnet", "albert")]
NEW = 6

routers = pytest.mark.parametrize("router", ROUTERS)
Load = Callable[[str, str], PeftModel]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Loads an architecture's tiny model with an adapter of one kind of router; always the same model."""
    made: dict[tuple[str, str], PeftModel] = {}
    bases: dict[str, Any] = {}

    def build(name: str, router: str) -> PeftModel:
        if (name, router) not in made:
            if name not in bases:
                bases[name] = rebuilt(ARCHITECTURES[name])
                if bases[name].can_generate():
                    bases[name].generation_config.eos_token_id = None
            folder = tmp_path_factory.mktemp("routed") / "adapter"
            save_adapter(bases[name], ARCHITECTURES[name], folder, router)
            made[name, router] = PeftModel.from_pretrained(copy.deepcopy(bases[name]), folder).eval()
        return made[name, router]

    return build


def mixed(architecture: Architecture, count: int = 5) -> Samples:
    """Samples of all tasks in turn, of different lengths."""
    return [task_samples(architecture, (TASKS * 2)[i], seed=3)[i] for i in range(count)]


def alone(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[None] for name, value in sample.items()}


def prompts(samples: Samples) -> Samples:
    return [{n: v for n, v in sample.items() if n != "decoder_input_ids"} for sample in samples]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.cases(12)
@routers
@pytest.mark.parametrize("name", [*ENCODERS, *IMAGES, *DECODERS, *SEQUENCES])
def test_a_sample_gets_in_a_batch_what_it_gets_alone(load, name, router):
    """One of the lengths is the number of relative positions of DeBERTa-v3, which its shared projections also read."""
    architecture, model = ARCHITECTURES[name], load(name, router)
    samples = mixed(architecture, 6)
    expected = [recorded(model, **alone(sample)) for sample in samples]
    with route(model, "static"):
        static = [recorded(model, **alone(sample)) for sample in samples]
    assert not any(decisions for _, decisions in static)
    assert sum(float((own[0] - without[0]).abs().max()) > 1e-2 for (own, _), (without, _) in zip(expected, static)) > 2
    firsts = [next(iter(chosen(decisions).values()))[0] for _, decisions in expected]
    assert len(set(firsts)) > 1
    for side in ("right", "left") if name in LEFT else ("right",):
        output, decisions = recorded(model, **padded(model, samples, side))
        routes = chosen(decisions)
        for i, (sample, (own, own_decisions)) in enumerate(zip(samples, expected)):
            own_routes = chosen(own_decisions)
            assert own_routes.keys() == routes.keys()
            for key, (task,) in own_routes.items():
                # Of what stands first, a pooler reads padding.
                assert task == routes[key][i] or (side == "left" and "pooler" in key[1]), key
            length = own[0].shape[1]
            at_right = side == "left" and "decoder_input_ids" not in sample
            close(output[0][i][-length:] if at_right else output[0][i][:length], own[0][0])


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
}


def generate(model: PeftModel, samples: Samples, **options: Any) -> tuple[Tensor, tuple[Tensor, ...], dict]:
    """The new tokens, the logits of every step, and the decisions, of which there is one each."""
    batch = padded(model, samples, "left" if not model.config.is_encoder_decoder else "right")
    batch.pop("position_ids", None)
    torch.manual_seed(0)
    with recording(model) as records:
        found = model.generate(
            **batch, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, pad_token_id=0, **options
        )
    decisions = {(adapter, module): decision for adapter, module, decision in records}
    assert len(decisions) == len(records), "decided again after the prompt"
    return found.sequences[:, -NEW:], found.logits, chosen(decisions)


@pytest.mark.cases(12)
@routers
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "t5", "bart"])
def test_what_is_generated_in_a_batch_is_what_is_generated_alone(load, name, mode, router):
    model, samples = load(name, router), prompts(mixed(ARCHITECTURES[name]))
    tokens, logits, routes = generate(model, samples, **MODES[mode])
    again, _, _ = generate(model, samples, **MODES[mode])
    assert torch.equal(again, tokens)
    with route(model, "static"):
        assert not torch.equal(generate(model, samples, **MODES[mode])[0], tokens)
    for i, sample in enumerate(samples):
        own_tokens, own_logits, own_routes = generate(model, [sample], **MODES[mode])
        assert own_routes.keys() == routes.keys()
        for key, tasks in own_routes.items():
            times = len(routes[key]) // len(samples)
            assert set(tasks) == set(routes[key][i * times : (i + 1) * times]), key
        times = len(tokens) // len(samples)
        if mode == "sampling":  # which draws other tokens for other batches
            close(logits[0][i * times], own_logits[0][0])
        else:
            assert torch.equal(tokens[i], own_tokens[0])
        if mode in ("greedy", "static cache"):
            close(torch.stack(logits)[:, i], torch.stack(own_logits)[:, 0])


@routers
@torch.no_grad()
def test_a_state_keeps_the_route_as_a_cache_does(load, router):
    """Models with a state of fixed size pass on `cache_params`."""
    model, samples = load("mamba", router), prompts(mixed(ARCHITECTURES["mamba"]))
    samples = [{"input_ids": sample["input_ids"][:3]} for sample in samples]  # of one length: padding changes a state
    for options in ({}, {"num_beams": 3}):
        tokens, _, routes = generate(model, samples, **options)
        with route(model, "static"):
            assert not torch.equal(generate(model, samples, **options)[0], tokens)
        for i, sample in enumerate(samples):
            own_tokens, _, own_routes = generate(model, [sample], **options)
            assert torch.equal(tokens[i], own_tokens[0])
            assert all(
                found[0] == routes[key][i * len(routes[key]) // len(samples)] for key, found in own_routes.items()
            )
    with route(model, names := [TASKS[i % 3] for i in range(len(samples))]):
        tokens, _, _ = generate(model, samples, num_beams=2)
    for name, sample, expected in zip(names, samples, tokens):
        with route(model, name):
            assert torch.equal(generate(model, [sample], num_beams=2)[0][0], expected)


@pytest.mark.cases(3)
@routers
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
@torch.no_grad()
def test_scores_of_given_answers_are_those_of_generating_them(load, name, router):
    """Labels mark the end of a prompt, and the tokens after it must not change the route."""
    model, samples = load(name, router), prompts(mixed(ARCHITECTURES[name]))
    tokens, logits, _ = generate(model, samples, do_sample=True, top_k=0)
    whole = [torch.cat([sample["input_ids"], answer]) for sample, answer in zip(samples, tokens)]
    # A second question, which nobody answers, is not scored either.
    whole = [torch.cat([row, row[:2]]) for row in whole]
    labels = [
        torch.cat([torch.full((len(row) - NEW - 2,), -100), row[-NEW - 2 : -2], row.new_full((2,), -100)])
        for row in whole
    ]
    for side in ("right", "left"):
        batch = padded(model, [{"input_ids": row} for row in whole], side)
        scored, _ = recorded(model, **batch, labels=pad_rows(labels, -100, side))
        unlabelled, _ = recorded(model, **batch)
        for i, row in enumerate(whole):
            end = len(row) if side == "right" else batch["input_ids"].shape[1]
            close(scored.logits[i, end - NEW - 3 : end - 3], torch.stack(logits)[:, i])
        assert router == "discriminant" or (scored.logits - unlabelled.logits).abs().max() > 1e-2


@routers
@torch.no_grad()
def test_labels_without_a_prompt_leave_routes_alone(load, router):
    """If a text is scored from its first token on, all of its tokens decide. Padding has no label."""
    model, samples = load("llama", router), prompts(mixed(ARCHITECTURES["llama"]))
    for side in ("right", "left"):
        batch = padded(model, samples, side)
        expected, routes = recorded(model, **batch)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        found, own = recorded(model, **batch, labels=labels)
        assert chosen(own) == chosen(routes) and torch.equal(found.logits, expected.logits)


@routers
def test_labels_of_masked_tokens_leave_routes_alone(load, router):
    """A masked language model decides on all tokens, whichever are scored."""
    model, samples = load("roberta", router), mixed(ARCHITECTURES["roberta"])
    batch = padded(model, samples)
    expected, routes = recorded(model, **batch)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 2] = 5
    found, own = recorded(model, **batch, labels=labels)
    assert chosen(own) == chosen(routes) and torch.equal(found.logits, expected.logits)


@pytest.mark.cases(2)
@routers
@pytest.mark.parametrize("name", ["t5", "bart"])
@torch.no_grad()
def test_a_decoder_follows_its_encoder(load, name, router):
    """The decoder's tokens do not decide, whether one or many; scores are those of generation."""
    model, samples = load(name, router), prompts(mixed(ARCHITECTURES[name]))
    tokens, logits, routes = generate(model, samples, do_sample=True, top_k=0)
    start = torch.full((len(samples), 1), model.config.decoder_start_token_id)
    read = torch.cat([start, tokens[:, :-1]], dim=1)
    batch = padded(model, samples)
    scored, own = recorded(model, **batch, decoder_input_ids=read)
    assert chosen(own) == routes
    close(scored.logits.transpose(0, 1), torch.stack(logits))
    states = model.get_base_model().get_encoder()(**batch)
    again, _ = recorded(model, encoder_outputs=states, attention_mask=batch["attention_mask"], decoder_input_ids=read)
    close(again.logits, scored.logits)
    for anew in (BaseModelOutput(last_hidden_state=states[0]), (states[0],)):
        again, _ = recorded(
            model, encoder_outputs=anew, attention_mask=batch["attention_mask"], decoder_input_ids=read
        )
        close(again.logits, scored.logits)
    tasks = {key[1]: found for key, found in routes.items() if "decoder." in key[1]}
    if router == "prototype":
        of_tokens = [found for module, found in tasks.items() if not is_cross_attention(module)]
        assert len(of_tokens) > 10 and all(found == of_tokens[0] for found in of_tokens)
        assert len(set(of_tokens[0])) > 1
    else:
        assert not tasks and all("encoder." in module for _, module in routes)


@torch.no_grad()
def test_states_that_nothing_was_decided_about_are_refused(load):
    """A copy of encoder states lacks the decision: without the error, no expert would be added."""
    for name in ("t5", "bart"):
        model, samples = load(name, "discriminant"), prompts(mixed(ARCHITECTURES[name]))
        batch = padded(model, samples)
        states = model.get_base_model().get_encoder()(**batch)
        copied = BaseModelOutput(last_hidden_state=states[0].clone())
        given = {"attention_mask": batch["attention_mask"], "max_new_tokens": 2}
        with pytest.raises(HfEsmError, match=r"reads encoder states without a decision"):
            model.generate(encoder_outputs=copied, **given)
        with route(model, "static"):
            model.generate(encoder_outputs=copied, **given)
        decoder, ids = model.get_base_model().get_decoder(), torch.full((len(samples), 1), 2)
        read = {"input_ids": ids, "encoder_attention_mask": batch["attention_mask"]}
        found, _ = recorded(decoder, encoder_hidden_states=states[0], **read)
        whole, _ = recorded(model, **batch, decoder_input_ids=ids, output_hidden_states=True)
        close(found[0], whole.decoder_hidden_states[-1])
        with model.disable_adapter():
            model.generate(encoder_outputs=copied, **given)


@pytest.mark.parametrize("name", ["deberta-v3", "deberta-v2"])
@torch.no_grad()
def test_a_task_named_for_all_reaches_what_is_of_no_sample(load, name):
    """DeBERTa projects relative positions, too: with a named task, the model is the base with the expert merged."""
    model, samples = load(name, "discriminant"), mixed(ARCHITECTURES[name])
    batch = padded(model, samples)
    for expert, task in enumerate(TASKS):
        expected = copy.deepcopy(model.get_base_model())
        for module_name, layer in list(expected.named_modules()):
            if isinstance(layer, RoutedExpertsLayer):
                if "default" in layer.routed_experts_A:
                    delta = layer.routed_experts_B["default"][expert] @ layer.routed_experts_A["default"][expert]
                    layer.get_base_layer().weight.add_(delta)
                parent, _, leaf = module_name.rpartition(".")
                setattr(expected.get_submodule(parent), leaf, layer.get_base_layer())
        expected = expected(**batch)[0]
        with route(model, task):
            close(model(**batch)[0], expected)
            close(model(**alone(samples[0]))[0][0], expected[0][: len(samples[0]["input_ids"])])
        if name == "deberta-v3":
            with route(model, [task] * len(samples)):  # of each by itself: positions are of none
                assert (model(**batch)[0] - expected).abs().max() > 1e-3


def is_cross_attention(module: str) -> bool:
    """Whether a decoder's projection reads the encoder's states."""
    return any(f"{attention}.{p}" in module for attention in ("EncDecAttention", "encoder_attn") for p in "kv")


@pytest.mark.cases(6)
@routers
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing_trains_the_same(load, name, router):
    """Blocks are computed again with the route of the forward pass, whichever route is open then."""
    model = copy.deepcopy(load(name, router)).train()
    batch = padded(model, mixed(ARCHITECTURES[name]))
    model.requires_grad_(True)

    def gradients(task: Optional[str]) -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(0)  # dropout
        with route(model, task) if task else nullcontext():
            loss = model(**batch)[0].square().mean()
        with recording(model) as records, route(model, "static"):
            loss.backward(retain_graph=True)
            loss.backward()
        assert not records
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = {task: gradients(task) for task in (None, TASKS[1])}
    model.activation_checkpointing_enable({"use_reentrant": False})
    runs: Counter[str] = Counter()
    for layer in layers(model):
        layer.register_forward_hook(lambda layer, *_: runs.update([layer.name]))
    for task, wanted in expected.items():
        found = gradients(task)
        assert found.keys() == wanted.keys() and any("routed_experts_A" in name for name in found)
        for name, gradient in found.items():
            close(gradient, wanted[name])
    assert max(runs.values()) > 2


@routers
@torch.no_grad()
def test_conversations_keep_their_routes_on_their_caches(load, router):
    """Two conversations generate in turn, token by token, and each continues with a second question."""
    model = load("llama", router)
    asked = [task_samples(ARCHITECTURES["llama"], task, seed=3)[4]["input_ids"][None] for task in ("left", "right")]
    questions = [row.flip(1)[:, :2] for row in reversed(asked)]
    caches = [DynamicCache(config=model.config), None]  # one of ours, one that the model makes
    logits: list[list[Tensor]] = [[], []]
    texts = [row.clone() for row in asked]
    routes = []
    for i, row in enumerate(asked):
        output, decisions = recorded(model, input_ids=row, past_key_values=caches[i], use_cache=True)
        caches[i] = output.past_key_values
        routes.append(chosen(decisions))
        logits[i].append(output.logits[:, -1:])
    assert routes[0] != routes[1]
    for step in range(NEW):
        for i, cache in enumerate(caches):
            read = questions[i] if step == 3 else logits[i][-1][:, -1:].argmax(-1)
            texts[i] = torch.cat([texts[i], read], dim=1)
            output, decisions = recorded(model, input_ids=read, past_key_values=cache)
            assert not decisions
            logits[i].append(output.logits)
    for row, whole, found in zip(asked, texts, logits):
        labels = whole.clone()
        labels[:, : row.shape[1]] = -100
        expected, _ = recorded(model, input_ids=whole, labels=labels)
        close(torch.cat(found, dim=1), expected.logits[:, row.shape[1] - 1 :])


@routers
@torch.no_grad()
def test_an_emptied_cache_decides_anew(load, router):
    """A prompt may have one token, and then looks like a step of decoding."""
    model = load("llama", router)
    first, second = (task_samples(ARCHITECTURES["llama"], task, seed=3)[4]["input_ids"][None] for task in TASKS[:2])
    cache = DynamicCache(config=model.config)
    model(input_ids=first, past_key_values=cache, use_cache=True)
    cache.crop(-cache.get_seq_length())
    for prompt in (second[:, :1], second):
        expected, routes = recorded(model, input_ids=prompt)
        found, own = recorded(model, input_ids=prompt, past_key_values=cache, use_cache=True)
        cache.crop(-cache.get_seq_length())
        assert chosen(own) == chosen(routes)
        close(found.logits, expected.logits)


@routers
@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2-group-norm"])
def test_padded_sounds_are_routed_by_what_is_real(load, name, router):
    model, samples = load(name, router), mixed(ARCHITECTURES[name], 4)
    waves = [sample["input_values"] for sample in samples]
    batch = {"input_values": pad_rows(waves, 0, "right")}
    batch["attention_mask"] = pad_rows([torch.ones_like(wave, dtype=torch.long) for wave in waves], 0, "right")
    _, routes = recorded(model, **batch)
    alone = [recorded(model, input_values=wave[None])[1] for wave in waves]
    firsts = list(chosen(alone[0]))
    assert len({len(wave) for wave in waves}) > 1 and len({chosen(own)[firsts[0]][0] for own in alone}) > 1
    if name == "wav2vec2":  # in the other, padding shows in the norms of the first layers
        for i, own in enumerate(alone):
            key = firsts[0]
            close(own[key].probabilities[0], routes[key].probabilities[i])


@routers
def test_threads_share_a_model(load, router):
    """Both threads are inside their forward passes at the same time."""
    architecture, model = ARCHITECTURES["bert"], load("bert", router)
    batches = [padded(model, mixed(architecture)[:3]), padded(model, mixed(architecture)[3:])]
    expected = [recorded(model, **batch)[0][0] for batch in batches]
    meeting = threading.Barrier(2, timeout=20)

    def meet(*_: Any) -> None:
        meeting.wait()

    handles = [layer.register_forward_pre_hook(meet) for layer in layers(model)]
    found: list[Any] = [None, None]

    @torch.no_grad()
    def run(i: int) -> None:
        if i:
            found[i] = model(**batches[i])[0]
        else:
            with route(model, "middle"):  # of this thread alone
                found[i] = model(**batches[i])[0]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    with route(model, "middle"):
        forced = recorded(model, **batches[0])[0][0]
    close(found[0], forced)
    close(found[1], expected[1])
    assert (forced - expected[0]).abs().max() > 1e-2
    assert not routing_state(model).local.frames
