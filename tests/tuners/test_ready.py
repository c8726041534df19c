"""Experts made ready for a request, or folded into private weights, are the formula; nothing else changes."""

import copy
import gc
import weakref

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from hf_esm.tuners.routed.layer import RoutedExpertsLinear
from hf_esm.tuners.routed.model import route, routing_state
from hf_esm.tuners.routed.ready import Conditions, Gathered, Grouped, Kept, add_to_all, make_ready
from hf_esm.tuners.routed.routes import Ready, Route
from support.architectures import ARCHITECTURES
from support.problems import relative_error, seeds
from support.routed import TASKS, layers, loaded, task_samples, write_cases


cases = pytest.fixture(write_cases, scope="module")

NEW = 6


def literal(result, rows, a, b, experts, weights):
    """`y + Σ w_t (x A_tᵀ) B_tᵀ` for each sample, float64."""
    added = result.double().clone()
    for i, (of_sample, shares) in enumerate(zip(experts.tolist(), weights.tolist(), strict=True)):
        for expert, share in zip(of_sample, shares, strict=True):
            added[i] += share * (rows[i].double() @ a[expert].double().T @ b[expert].double().T)
    return added


def problem(seed, samples, tokens, k, count=5):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(count, 3, 7, generator=generator), torch.randn(count, 9, 3, generator=generator)
    rows = torch.randn(samples, tokens, 7, generator=generator)
    experts = torch.randint(count, (samples, k), generator=generator)
    weights = torch.rand(samples, k, generator=generator) * torch.randint(2, (samples, k), generator=generator)
    return torch.randn(samples, tokens, 9, generator=generator), rows, a, b, experts, weights


@seeds
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("samples", [1, 3, 40])
@pytest.mark.parametrize("form", [Gathered.of, Gathered.of_all, Grouped.of, None])
def test_ready_experts_are_the_formula(seed, samples, k, form):
    """Also where an expert is named twice, or every weight is 0."""
    result, rows, a, b, experts, weights = problem(seed, samples, 1, k)
    for shares in (weights, torch.zeros_like(weights)):
        if form:
            ready = form(a, b, experts, shares, torch.float32)
        else:
            ready = make_ready(a, b, Route(experts, shares), torch.float32)
        assert relative_error(ready.add(result, rows), literal(result, rows, a, b, experts, shares)) < 1e-6


def layer_modules(base):
    def experts():
        return torch.nn.ParameterDict({"a": torch.ones(2, 2)})

    return {"base_layer": base, "routed_experts_A": experts(), "routed_experts_B": experts()}


def conditions(base, x):
    return Conditions(layer_modules(base), ["a"], len(x), x)


def replace_expert(modules):
    modules["routed_experts_B"]["a"] = torch.nn.Parameter(torch.ones(2, 2))


CHANGES = {
    "another linear map": lambda modules: modules.update(base_layer=torch.nn.Linear(7, 9)),
    "another weight": lambda modules: setattr(modules["base_layer"], "weight", torch.nn.Parameter(torch.ones(9, 7))),
    "other data": lambda modules: setattr(modules["base_layer"].weight, "data", torch.ones(9, 7)),
    "other numbers": lambda modules: modules["base_layer"].bias.mul_(2),
    "no bias": lambda modules: setattr(modules["base_layer"], "bias", None),
    "another expert": replace_expert,
    "other numbers in an expert": lambda modules: modules["routed_experts_A"]["a"].mul_(2),
    "a hook": lambda modules: modules["base_layer"].register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_every_change_of_a_layer_is_noticed(change):
    x = torch.ones(2, 3, 7)
    modules = layer_modules(torch.nn.Linear(7, 9))
    found = Conditions(modules, ["a"], 2, x)
    assert found.hold(modules, ["a"], 2, torch.zeros(2, 3, 7))
    CHANGES[change](modules)
    assert not found.hold(modules, ["a"], 2, x)


@torch.no_grad()
def test_every_change_of_a_call_is_noticed():
    x = torch.ones(2, 3, 7)
    modules = layer_modules(torch.nn.Linear(7, 9))
    found = Conditions(modules, ["a"], 2, x)
    assert not found.hold(modules, ["b"], 2, x)
    assert not found.hold(modules, ["a"], 1, x)
    assert not found.hold(modules, ["a"], 2, x[:, :1])
    assert not found.hold(modules, ["a"], 2, x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not found.hold(modules, ["a"], 2, x)


@torch.inference_mode()
def test_conditions_hold_for_tensors_that_count_no_changes():
    x = torch.ones(2, 3, 7)
    modules = layer_modules(torch.nn.Linear(7, 9))
    assert Conditions(modules, ["a"], 2, x).hold(modules, ["a"], 2, x)


@seeds
@pytest.mark.parametrize("base", [torch.nn.Linear(7, 9), torch.nn.Linear(7, 9, bias=False), Conv1D(9, 7)])
def test_a_folded_weight_is_the_formula(seed, base):
    _, rows, a, b, experts, weights = problem(seed, 1, 4, 2)
    with torch.no_grad():
        torch.nn.init.normal_(base.weight)
        kept, ready = Kept(conditions(base, rows), a, b, Route(experts, weights)), Ready()
        for _ in range(2):
            found = kept.run(rows, rows, ready)
            assert relative_error(found, literal(base(rows), rows, a, b, experts, weights)) < 1e-6
        assert kept.folded is not None and ready.folded_bytes == kept.folded.nbytes == 4 * 7 * 9


def test_experts_are_kept_in_the_form_that_reads_least():
    *_, a, b, _, _ = problem(0, 1, 1, 1)

    def form(experts, dtype=torch.float32, weights=None):
        return make_ready(a, b, Route(torch.tensor(experts), weights), dtype)

    assert len(form([2] * 8).down) == 1  # what all samples get
    assert form([2, 2], weights=torch.tensor([1.0, 0.5])).shares[:, 0].tolist() == [1, 0.5]
    assert len(form([1, 2, 3, 4]).down) == 4  # those of each sample
    assert form([1, 2, 1, 2]).shares.shape == (4, 2 * a.shape[1])  # those of all samples, with shares
    assert isinstance(form([1, 2] * 20), Grouped)
    assert form([1, 2] * 20, torch.float16).shares is None


def test_experts_of_weight_0_are_left_out_where_all_samples_get_the_same():
    *_, a, b, _, _ = problem(0, 1, 1, 1)
    ready = make_ready(a, b, Route(torch.tensor([[2, 4]] * 3), torch.tensor([[0.5, 0.0]] * 3)), torch.float32)
    assert torch.equal(ready.down, a[2:3]) and torch.equal(ready.up, b[2:3].mT / 2)
    ready = make_ready(a, b, Route(torch.tensor([2])), torch.float32)
    assert ready.down.data_ptr() == a[2].data_ptr() and ready.up.data_ptr() == b[2].data_ptr()  # nothing is copied


@pytest.fixture(params=["llama", "gpt2"])
def model(cases, request):
    return loaded(cases[request.param], "discriminant")


@pytest.fixture
def prompts():
    """A prompt of each task."""
    rows = [task_samples(ARCHITECTURES["llama"], task, seed=3)[0]["input_ids"] for task in TASKS]
    return torch.stack([row.repeat(3)[:6] for row in rows])


def generated(model, ids):
    """The logits of new tokens `[B, NEW, V]`, and the cache."""
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return torch.stack(found.logits, dim=1), found.past_key_values


def kept_of(cache):
    """What layers keep on a cache."""
    (decision,) = cache._hf_esm_decisions.values()
    return decision.ready.layers.values()


@pytest.mark.parametrize("which", [slice(0, 1), slice(0, 3), [0, 0, 1, 1, 2, 2, 0], [1, 1]], ids=str)
@torch.no_grad()
def test_generation_is_the_same_whether_experts_are_ready_or_not(model, prompts, which, monkeypatch):
    ids, before = prompts[which], {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found, cache = generated(model, ids)
    assert all(entry.folded is not None for entry in kept_of(cache)) == (len(ids.unique(dim=0)) == 1)
    assert any(kept_of(cache))
    monkeypatch.setattr(RoutedExpertsLinear, "_ready", lambda *_: None)
    torch.testing.assert_close(found, generated(model, ids)[0], rtol=1e-4, atol=1e-4)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_a_named_task_is_folded_from_the_second_pass_on_and_gone_after_the_request(model, prompts, monkeypatch):
    monkeypatch.setattr("hf_esm.tuners.routed.ready.FOLDED_BYTES", 10**6)
    with route(model, TASKS[1]):
        first, second = model(prompts).logits, model(prompts).logits
        ready = routing_state(model).local.forced.ready
        assert len(ready.layers) == len(layers(model))
        assert all(entry.folded is not None for entry in ready.layers.values())
        assert ready.folded_bytes == sum(4 * layer.in_features * layer.out_features for layer in layers(model))
        weight = weakref.ref(next(iter(ready.layers.values())).folded)
        copied = copy.deepcopy(ready)
        assert not copied.layers and not copied.folded_bytes
    del ready
    gc.collect()
    assert weight() is None
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    with monkeypatch.context() as without:
        without.setattr(RoutedExpertsLinear, "_ready", lambda *_: None)
        with route(model, TASKS[1]):
            torch.testing.assert_close(model(prompts).logits, second, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_request_copies_no_more_than_it_may(model, prompts, monkeypatch):
    layer = layers(model)[0]
    monkeypatch.setattr("hf_esm.tuners.routed.ready.FOLDED_BYTES", 4 * layer.in_features * layer.out_features)
    with route(model, TASKS[1]):
        expected, found = model(prompts).logits, model(prompts).logits
        entries = routing_state(model).local.forced.ready.layers.values()
        assert sum(entry.folded is not None for entry in entries) == 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_is_changed_within_a_request_counts(model, prompts):
    layer = layers(model)[-1]
    expert, weight = layer.routed_experts_B["discriminant"], layer.get_base_layer().weight
    for tensor in (expert, weight):
        with route(model, TASKS[1]):
            before = [model(prompts).logits for _ in range(3)][-1]
            tensor.mul_(2)
            after = model(prompts).logits
        with route(model, TASKS[1]):
            torch.testing.assert_close(model(prompts).logits, after, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(before, after, atol=1e-3)


@torch.no_grad()
def test_nothing_is_folded_where_the_linear_map_is_more_than_its_weight(model, prompts):
    """In half precision, under autocast, and where somebody looks at what the linear map itself gives."""

    def folded(model):
        with route(model, TASKS[1]):
            for _ in range(3):
                model(prompts)
            return sum(e.folded is not None for e in routing_state(model).local.forced.ready.layers.values())

    number = len(layers(model))
    assert folded(model) == number
    seen = []
    handle = layers(model)[0].base_layer.register_forward_hook(lambda *_: seen.append(1))
    assert folded(model) == number - 1 and len(seen) == 3
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert not folded(model)
    assert not folded(model.to(torch.bfloat16))


def test_experts_that_are_trained_are_not_made_ready(cases, prompts):
    model = loaded(cases["llama"], "discriminant", is_trainable=True)
    with route(model, TASKS[1]):
        for _ in range(2):
            model(prompts).logits.sum().backward()
        assert not routing_state(model).local.forced.ready.layers
    assert layers(model)[-1].routed_experts_A["discriminant"].grad.any()


def test_weights_of_a_route_can_be_learned(model, prompts):
    """Also with one sample, whose route is otherwise read as numbers."""
    weights = torch.tensor([[0.7, 0.3]], requires_grad=True)
    with route(model, Route(torch.tensor([[0, 1]]), weights)):
        model(prompts[:1]).logits.square().mean().backward()
    assert (weights.grad != 0).all()


@seeds
@torch.no_grad()
def test_experts_of_one_route_are_added_to_all_samples(seed):
    result, rows, a, b, experts, _ = problem(seed, 3, 4, 2)
    weights = torch.tensor([[0.75, 0.0]])
    one = Route(experts[:1], weights)
    expected = literal(result, rows, a, b, experts[:1].expand(3, 2), weights.expand(3, 2))
    assert relative_error(add_to_all(result, rows, a, b, one), expected) < 1e-6
    expected = literal(result, rows, a, b, experts[:1, :1].expand(3, 1), torch.ones(3, 1))
    assert relative_error(add_to_all(result, rows, a, b, Route(experts[0, :1])), expected) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert add_to_all(result, rows, a, b, one).dtype == result.dtype
