"""A route belongs to a request: to its asyncio task or thread, and to nobody else's."""

import asyncio
import threading

import pytest
import torch

from hf_esm import HfEsmError
from hf_esm.tuners.routed import routing_state
from support.routed_toys import encoded, task_texts


pytestmark = pytest.mark.slow


@pytest.fixture
def inputs(routed):
    """A text of task `a`, which the router finds."""
    (sample,) = encoded(task_texts("a", 3, 1))
    return {"input_ids": sample["input_ids"][None]}


@torch.no_grad()
def pooled(routed, inputs, **options):
    """The mean output; without options that of the PEFT model, which is called by many that know no `RoutedModel`."""
    return (routed if options else routed.model)(**inputs, **options).last_hidden_state.mean(1)


@pytest.fixture
def expected(routed, inputs):
    """The outputs by route; None for the router's own."""
    found = {task: pooled(routed, inputs, tasks=task) for task in ("a", "b", "static")} | {
        None: pooled(routed, inputs)
    }
    assert not torch.allclose(found["a"], found["b"], atol=1e-3)
    return found


def same(found, expected):
    return torch.allclose(found, expected, atol=1e-5)


def test_overlapping_tasks_have_each_their_own_route_and_none_stays(routed, inputs, expected):
    order = []

    async def ask(task, turns):
        with routed.route(task):
            found = []
            for _ in range(turns):
                await asyncio.sleep(0)
                found.append(pooled(routed, inputs))
                order.append(task)
        await asyncio.sleep(0)
        return found, pooled(routed, inputs)

    async def ask_both():
        return await asyncio.gather(ask("a", 2), ask("b", 4), ask("static", 3))

    for task, (inside, after) in zip(("a", "b", "static"), asyncio.run(ask_both()), strict=True):
        assert all(same(found, expected[task]) for found in inside)
        assert same(after, expected[None])
    assert order[:3] == ["a", "b", "static"]
    assert same(pooled(routed, inputs), expected[None]) and routing_state(routed.model).route.get() is None


def test_a_thread_of_asyncio_inherits_the_route_and_one_started_by_hand_names_it(routed, inputs, expected):
    async def ask():
        with routed.route("b"):
            return await asyncio.to_thread(pooled, routed, inputs)

    assert same(asyncio.run(ask()), expected["b"])
    found = {}

    def work():
        found["router"], found["named"] = pooled(routed, inputs), pooled(routed, inputs, tasks="b")

    with routed.route("static"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert same(pooled(routed, inputs), expected["static"])
    assert same(found["router"], expected[None]) and same(found["named"], expected["b"])


def test_compiled_models_read_the_route_of_their_request(models, merged, inputs):
    from hf_esm import RoutedModel

    routed = RoutedModel.from_pretrained(merged)
    model = routed.task_model("a")
    with torch.no_grad():
        plain = {}
        for task in ("a", "b"):
            with routed.route(task):
                plain[task] = model(**inputs).logits
    model.compile(backend="eager", fullgraph=True)

    async def ask(task):
        with routed.route(task):
            await asyncio.sleep(0)
            with torch.no_grad():  # which is the thread's: it must not be open while other tasks run
                return model(**inputs).logits

    async def ask_both():
        return await asyncio.gather(ask("a"), ask("b"))

    for task, found in zip("ab", asyncio.run(ask_both()), strict=True):
        assert same(found, plain[task])


def test_a_replica_of_data_parallel_is_refused(routed, inputs):
    replica = routed.model.get_base_model()._replicate_for_data_parallel()
    with pytest.raises(HfEsmError, match="accelerate launch"):
        replica(**inputs)
    assert not routing_state(routed.model).local.frames


def test_predictions_after_training_are_without_dropout_and_every_module_gets_its_mode_back(routed):
    texts = task_texts("a", 5, 6)
    expected = [(p.task, p.label, pytest.approx(p.score)) for p in routed.predict(texts)]
    explained = [e.probabilities for e in routed.explain(texts)]
    heads = [routed.task_model(task) for task in routed.tasks]
    modes = {module: module.training for model in (routed.model, *heads) for module in model.modules()}
    try:
        for model in (routed.model, *heads):
            model.train()
        routed.model.get_base_model().encoder.eval()
        before = {module: module.training for module in modes}
        assert any(before.values()) and not all(before.values())
        assert [(p.task, p.label, p.score) for p in routed.predict(texts)] == expected
        assert [e.probabilities for e in routed.explain(texts)] == explained
        assert {module: module.training for module in modes} == before
    finally:
        for module, mode in modes.items():
            module.training = mode
