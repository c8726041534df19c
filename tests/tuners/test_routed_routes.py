"""Routes that the caller names, decisions without a full pass, passes that raise, and compiled models."""

import copy
import random
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_esm.tuners.routed import Decisions, Route
from hf_esm.tuners.routed.layer import add_by_expert, grouping_pays
from hf_esm.tuners.routed.model import decide, route, routing_state
from support.routed import (
    KINDS,
    ROUTERS,
    TASKS,
    chosen,
    fresh,
    layers,
    loaded,
    logits,
    recorded,
    refused,
    write_cases,
)


pytestmark = pytest.mark.slow


kinds = pytest.mark.parametrize("kind", KINDS)
routers = pytest.mark.parametrize("router", ROUTERS)
cases = pytest.fixture(write_cases, scope="module")


@torch.no_grad()
def with_expert(case: SimpleNamespace, router: str, task: str) -> PreTrainedModel:
    """The base with one expert added to its weights."""
    model = copy.deepcopy(case.base)
    for name, (a, b) in case.written[router].factors.items():
        module, delta = model.get_submodule(name), b[TASKS.index(task)] @ a[TASKS.index(task)]
        module.weight.add_(delta.T if isinstance(module, Conv1D) else delta)
    return model


@pytest.fixture(params=[True, False], ids=["by-expert", "gathered"])
def way(request, monkeypatch):
    """All batches expert by expert; all batches with the factors of each sample's expert gathered."""
    monkeypatch.setattr("hf_esm.tuners.routed.layer.grouping_pays", lambda *_: request.param)


@pytest.mark.cases(4)
@kinds
@routers
def test_given_routes_hold_whatever_the_router_says(cases, kind, router, way):
    case = cases[kind]
    model = loaded(case, router)
    routed, count = logits(model, case), len(case.samples)
    alone = {task: logits(with_expert(case, router, task), case) for task in TASKS}
    alone["static"] = logits(case.base, case)
    named = [[*TASKS, "static"][i % 4] for i in range(count)]
    wanted = torch.stack([alone[task][i] for i, task in enumerate(named)])
    number = {"static": 0} | {task: i for i, task in enumerate(TASKS)}
    weights = torch.tensor([float(task != "static") for task in named])
    given = Route(torch.tensor([number[task] for task in named]), weights)
    for tasks in (named, tuple(named), given):
        with route(model, tasks):
            torch.testing.assert_close(logits(model, case), wanted, rtol=1e-4, atol=1e-4)
    with route(model, "middle"):
        torch.testing.assert_close(logits(model, case), alone["middle"], rtol=1e-4, atol=1e-4)
        with route(model, "static"):
            assert torch.equal(logits(model, case), alone["static"])
            others: list[Tensor] = []
            thread = threading.Thread(target=lambda: others.append(logits(model, case)))
            thread.start()
            thread.join()
            assert torch.equal(others[0], routed)
        torch.testing.assert_close(logits(model, case), alone["middle"], rtol=1e-4, atol=1e-4)
        _, decisions = recorded(model, **case.batch)
        assert not decisions
    assert torch.equal(logits(model, case), routed)


@routers
def test_decisions_that_are_given_back_are_followed(cases, router):
    case = cases["bert"]
    model = loaded(case, router)
    expected, made = recorded(model, **case.batch)
    decisions = {
        adapter if router == "discriminant" else (adapter, at): found for (adapter, at), found in made.items()
    }
    other = {name: value.flip(1) if name == "input_ids" else value for name, value in case.batch.items()}
    with route(model, Decisions(decisions)):
        output, again = recorded(model, **case.batch)
        recorded(model, **other)
    assert torch.equal(output[0], expected[0]) and not again
    elsewhere = {
        key: replace(found, route=Route(torch.full_like(found.route.experts, 2))) for key, found in decisions.items()
    }
    with route(model, Decisions(elsewhere)):
        assert not torch.allclose(recorded(model, **case.batch)[0][0], expected[0], atol=1e-3)


def test_given_routes_hold_for_beams(cases):
    case = cases["gpt2"]
    model = loaded(case, "discriminant")
    ids = torch.stack([sample["input_ids"][:3] for sample in case.samples])
    options = {"num_beams": 3, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    named = [[*TASKS, "static"][i % 4] for i in range(len(ids))]
    with route(model, named):
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    for row, task, tokens in zip(ids, named, found):
        plain = case.base if task == "static" else with_expert(case, "discriminant", task)
        expected = plain.generate(input_ids=row[None], attention_mask=torch.ones(1, 3), **options)
        assert torch.equal(tokens, expected[0])


def test_routes_that_cannot_be_given_are_refused(cases):
    case = cases["bert"]
    model, count = loaded(case, "prototype"), len(case.samples)
    routed = logits(model, case)
    refused("no expert for 'up'; there are left, middle, right, static", route(model, "up").__enter__)
    refused("no expert for 'up'", route(model, ["left"] * (count - 1) + ["up"]).__enter__)
    for wrong in (["left"] * (count - 1), ["left"], ["left"] * 2 * count, Route(torch.zeros(1, dtype=torch.int64))):
        with route(model, wrong):
            refused("Give one task per sample", logits, model, case)
    for call in (lambda: route(case.base, "left").__enter__(), lambda: decide(case.base, case.batch)):
        refused("has no routed experts", call)
    assert torch.equal(logits(model, case), routed)


@pytest.mark.cases(3)
@kinds
@routers
@torch.no_grad()
def test_a_decision_alone_runs_no_more_than_it_needs(cases, kind, router):
    case = cases[kind]
    model = loaded(case, router)
    output, expected = recorded(model, **case.batch)
    ran: list[str] = []
    for layer in layers(model):
        layer.register_forward_pre_hook(lambda layer, _: ran.append(layer.name))
    found = {(adapter, module): decision for adapter, module, decision in decide(model, case.batch)}
    assert chosen(found) == chosen(expected)
    for key, decision in found.items():
        assert torch.equal(decision.probabilities, expected[key].probabilities)
    if router == "discriminant":
        assert ran[-1] == model.peft_config[router].readers[-1] and len(ran) < len(layers(model)) // 2 + 2
    else:
        assert len(ran) == len(layers(model))
    local = routing_state(model).local
    assert not local.frames and local.records is None and not local.deciding
    assert torch.equal(logits(model, case), output.logits)


@routers
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_pass_that_breaks_leaves_nothing_behind(cases, router, error):
    case = cases["llama"]
    model = loaded(case, router)
    expected = logits(model, case)

    def stop(*_: Any) -> None:
        raise error

    handle = layers(model)[-1].register_forward_pre_hook(stop)
    for call in (lambda: logits(model, case), lambda: recorded(model, **case.batch)):
        with pytest.raises(error), route(model, ["right"] * len(case.samples)):
            call()
    handle.remove()
    # What an interrupt leaves open is gone with the next pass.
    assert error is KeyboardInterrupt or not routing_state(model).local.frames
    assert torch.equal(logits(model, case), expected)
    assert not routing_state(model).local.frames and routing_state(model).local.records is None


@pytest.mark.cases(2)
@kinds
@routers
def test_a_compiled_model_gives_the_same(cases, kind, router):
    case = cases[kind]
    model = loaded(case, router)
    expected = logits(model, case)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(logits(compiled, case), expected, rtol=1e-4, atol=1e-5)
        assert not routing_state(model).local.frames


def test_a_compiled_model_is_compiled_once_for_all_routes_that_are_named(cases):
    case = cases["bert"]
    model = loaded(case, "prototype")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    draw = random.Random(0)
    for _ in range(12):  # more than it would be compiled anew for
        named = draw.choices([*TASKS, "static"], k=len(case.samples))
        with route(model, named):
            torch.testing.assert_close(logits(compiled, case), logits(model, case), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("grouped", [True, False])
@torch.no_grad()
def test_experts_are_added_in_the_precision_of_their_layer(cases, dtype, error, grouped, monkeypatch):
    case = cases["llama"]
    model, seen = loaded(case, "discriminant").to(dtype), {}
    layer = layers(model)[1]
    monkeypatch.setattr("hf_esm.tuners.routed.layer.grouping_pays", lambda *_: grouped)
    handle = layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    products = []
    for name in ("bmm", "baddbmm", "mm"):
        taken = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=taken, **k: products.append(a[0].dtype) or f(*a, **k))
    named = [[*TASKS, "static"][i % (len(TASKS) + 1)] for i in range(len(case.samples))]
    with route(model, named):
        model(**case.batch)
    handle.remove()
    expected = layer.base_layer(seen["x"]).double()
    a, b = (held["discriminant"].double() for held in (layer.routed_experts_A, layer.routed_experts_B))
    for i, task in enumerate(named):
        if task != "static":
            expected[i] += seen["x"][i].double() @ a[TASKS.index(task)].T @ b[TASKS.index(task)].T
    assert seen["y"].dtype == dtype
    assert (seen["y"] - expected).norm() < error * (expected - layer.base_layer(seen["x"]).double()).norm()
    assert set(products) <= {dtype} and (grouped or products)


def test_a_route_is_of_whatever_adapter_is_active(cases):
    case = cases["bert"]
    model = loaded(case, "prototype", "discriminant")
    for task in (TASKS[1], "static"):
        with route(model, task):
            model.set_adapter("prototype")
            logits(model, case)
            model.set_adapter("discriminant")
            expected = case.base if task == "static" else with_expert(case, "discriminant", task)
            torch.testing.assert_close(logits(model, case), logits(expected, case), rtol=1e-4, atol=1e-4)
        model.set_adapter("prototype")


def test_a_batch_goes_by_expert_where_many_short_samples_share_one(monkeypatch):
    a, b = torch.zeros(3, 2, 8), torch.zeros(3, 8, 2)
    monkeypatch.setattr("hf_esm.tuners.routed.layer.TURN_BYTES", 3 * 4 * (16 + 16))  # three samples spared per expert
    assert not grouping_pays(torch.tensor([0, 1, 2] * 4), a, b, 1)
    assert grouping_pays(torch.tensor([0, 1, 2] * 4 + [0]), a, b, 1)
    assert grouping_pays(torch.tensor([[0, 1], [2, 0]] * 4), a, b, 1)
    assert not grouping_pays(torch.tensor([0, 1, 2] * 4 + [0]), a, b, 2)  # of as many tokens as an expert has rows
    assert not grouping_pays(torch.tensor([0]), a, b, 1)


@kinds
@torch.no_grad()
def test_a_sample_gets_a_share_of_several_experts(cases, kind, way):
    case = cases[kind]
    model, generator = loaded(case, "discriminant"), torch.Generator().manual_seed(0)
    experts = torch.tensor([[0, 1], [1, 2], [2, 0], [2, 2], [0, 2], [1, 0], [0, 1]])[: len(case.samples)]
    weights = torch.rand(experts.shape, generator=generator).round(decimals=1)
    with route(model, Route(experts, weights)):
        found = logits(model, case)
    for i, (tasks, given) in enumerate(zip(experts.tolist(), weights.tolist(), strict=True)):
        mixed = fresh(case)
        for name, (a, b) in case.written["discriminant"].factors.items():
            delta = sum(weight * b[task] @ a[task] for task, weight in zip(tasks, given, strict=True))
            module = mixed.get_submodule(name)
            module.weight.add_(delta.T if isinstance(module, Conv1D) else delta)
        torch.testing.assert_close(found[i], logits(mixed, case)[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_going_by_expert_adds_what_every_sample_has_to_get(weighted):
    generator = torch.Generator().manual_seed(0)
    rows, a, b = (torch.randn(size, generator=generator) for size in ((7, 3, 5), (4, 2, 5), (4, 6, 2)))
    experts = torch.tensor([3, 0, 0, 2, 3, 0, 2])
    weights = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 2.0, 0.0]) if weighted else None
    found = add_by_expert(rows.requires_grad_(), a, b, experts, weights)
    for i, t in enumerate(experts):
        expected = rows[i] @ a[t].T @ b[t].T * (1 if weights is None else weights[i])
        torch.testing.assert_close(found[i], expected)
    found.sum().backward()
    assert rows.grad.any(-1).all(-1).equal(torch.ones(7, dtype=bool) if weights is None else weights != 0)
    with torch.autocast("cpu", torch.bfloat16):
        half = add_by_expert(rows, a, b, experts, weights)
    torch.testing.assert_close(half, found, rtol=0.1, atol=0.1)
