"""Routed experts as adapters: loading and saving by PEFT and Transformers, training, and errors."""

import copy
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from hf_esm.tuners.routed.config import RoutedExpertsConfig
from hf_esm.tuners.routed.frames import CloseFrame, Frame, OpenFrame
from hf_esm.tuners.routed.model import recording, route, routing_state
from support.architectures import ARCHITECTURES
from support.routed import (
    KINDS,
    ROUTERS,
    TASKS,
    fresh,
    layers,
    loaded,
    logits,
    passed,
    pooled,
    recorded,
    refused,
    write_cases,
)


WEIGHTS = "adapter_model.safetensors"
kinds = pytest.mark.parametrize("kind", KINDS)
routers = pytest.mark.parametrize("router", ROUTERS)
cases = pytest.fixture(write_cases, scope="module")


def load_into(case: SimpleNamespace, adapter: Path, **options: Any) -> PreTrainedModel:
    model = fresh(case, **options)
    model.load_adapter(str(adapter))
    return model.eval()


LOADERS: dict[str, Callable] = {
    "PeftModel": lambda case, adapter, is_trainable=False, **options: PeftModel.from_pretrained(
        fresh(case, **options), adapter, is_trainable=is_trainable
    ).eval(),
    "low_cpu_mem_usage": lambda case, adapter, **options: PeftModel.from_pretrained(
        fresh(case, **options), adapter, low_cpu_mem_usage=True
    ).eval(),
    "AutoPeftModel": lambda case, adapter, **options: AutoPeftModel.from_pretrained(adapter, **options).eval(),
    "AutoModelFor": lambda case, adapter, **options: (
        getattr(transformers, case.auto).from_pretrained(adapter, **options).eval()
    ),
    "load_adapter": load_into,
}
loaders = pytest.mark.parametrize("loader", LOADERS)


@kinds
@routers
@loaders
def test_every_loader_gives_the_same(cases, kind, router, loader):
    case = cases[kind]
    expected = logits(loaded(case, router), case)
    assert (expected - logits(case.base, case)).abs().max() > 1e-2
    assert torch.equal(logits(LOADERS[loader](case, case.folder / router), case), expected)


@routers
@loaders
def test_experts_and_routers_stay_float32_over_a_bfloat16_base(cases, router, loader):
    case = cases["llama"]
    model = LOADERS[loader](case, case.folder / router, dtype=torch.bfloat16)
    found = {layer.name: layer for layer in layers(model)}
    stored = load_file(case.folder / router / WEIGHTS)
    assert found and stored
    for key, tensor in stored.items():
        module, _, name = key.removeprefix("base_model.model.").rpartition(".")
        (held,) = getattr(found[module], name).values()
        assert found[module].weight.dtype == torch.bfloat16
        assert held.dtype == torch.float32 and torch.equal(held, tensor)
    assert logits(model, case).dtype == torch.bfloat16


@routers
def test_autocast_leaves_routes_in_float32(cases, router):
    """The first reader reads bfloat16, but the router computes in float32."""
    case = cases["llama"]
    model = loaded(case, router)
    first = case.written["discriminant"].modules[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = passed(model.get_base_model(), case, [first])
        _, decisions = recorded(model, **case.batch)
    found = decisions[router, first].probabilities
    assert found.dtype == torch.float32
    if router == "prototype":
        means = pooled(seen[first][0], case.batch["attention_mask"])
        prototypes = case.written[router].prototypes[first].double()
        cosines = torch.nn.functional.normalize(means, dim=1) @ prototypes.T
        torch.testing.assert_close(found.double(), cosines, rtol=1e-5, atol=1e-6)


@kinds
@routers
def test_copies_and_saved_copies_give_the_same(cases, kind, router, tmp_path):
    case = cases[kind]
    model = loaded(case, router)
    expected = logits(model, case)
    model.save_pretrained(tmp_path)
    saved = tmp_path / router
    again = PeftModel.from_pretrained(fresh(case), saved, adapter_name="again").eval()
    assert AutoPeftModel.from_pretrained(saved).peft_config["default"].tasks == TASKS
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), again):
        assert torch.equal(logits(copied, case), expected)
        states = {id(layer.state) for layer in layers(copied)}
        hooks = [
            hook for m in copied.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())
        ]
        hooked = {id(hook.state) for hook in hooks if isinstance(hook, (OpenFrame, CloseFrame))}
        assert states == hooked and len(states) == 1 and id(routing_state(model)) not in states
        with route(copied, "left"):
            assert torch.equal(logits(model, case), expected)


@kinds
def test_two_adapters_are_switched_disabled_and_deleted(cases, kind):
    case = cases[kind]
    expected = {router: logits(loaded(case, router), case) for router in ROUTERS}
    static = logits(case.base, case)
    model = loaded(case, *ROUTERS)
    assert torch.equal(logits(model, case), expected["prototype"])
    model.set_adapter("discriminant")
    assert torch.equal(logits(model, case), expected["discriminant"])
    with model.disable_adapter():
        assert torch.equal(logits(model, case), static)
    model.set_adapter("prototype")
    assert torch.equal(logits(model, case), expected["prototype"])
    model.base_model.set_adapter(list(ROUTERS))
    _, decisions = recorded(model, **case.batch)
    assert {adapter for adapter, _ in decisions} == {*ROUTERS}
    model.set_adapter("discriminant")
    model.delete_adapter("prototype")
    assert torch.equal(logits(model, case), expected["discriminant"])
    assert not any("prototype" in key for key in model.state_dict())
    plain = model.unload()
    assert torch.equal(logits(plain, case), static) and not layers(plain) and routing_state(plain) is None
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._forward_hooks_always_called for m in plain.modules())
    assert not any(m._forward_pre_hooks_with_kwargs or m._forward_hooks_with_kwargs for m in plain.modules())
    again = PeftModel.from_pretrained(plain, case.folder / "prototype").eval()
    assert torch.equal(logits(again, case), expected["prototype"])


def test_tasks_of_a_deleted_or_inactive_adapter_are_unknown(cases, tmp_path):
    case = cases["llama"]
    config = case.folder / "prototype" / "adapter_config.json"
    shutil.copytree(config.parent, tmp_path / "other")
    (tmp_path / "other" / config.name).write_text(config.read_text().replace('"left"', '"elsewhere"'))
    model = loaded(case, "discriminant")
    model.load_adapter(tmp_path / "other", adapter_name="other")
    refused("no expert for 'elsewhere'; there are left, middle, right", route(model, "elsewhere").__enter__)
    model.set_adapter("other")
    with route(model, "elsewhere"):
        logits(model, case)
    model.delete_adapter("other")
    model.set_adapter("discriminant")
    refused("no expert for 'elsewhere'", route(model, "elsewhere").__enter__)


def test_merging_is_refused(cases):
    model = loaded(cases["gpt2"], "prototype")
    for call in (model.merge_and_unload, model.merge_adapter, layers(model)[0].merge):
        refused("`hf-esm export`", call)
    assert len(layers(model)) == 8


@torch.no_grad()
def test_another_base_is_refused(cases):
    case = cases["bert"]
    other = fresh(case)
    other.bert.encoder.layer[1].output.dense.weight.mul_(1.05)
    refused("their weights differ", PeftModel.from_pretrained, other, case.folder / "prototype")
    refused("it has no 'bert.", PeftModel.from_pretrained, fresh(cases["gpt2"]), case.folder / "prototype")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
@pytest.mark.parametrize("loaded", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_right_base_is_known_in_every_dtype_and_another_is_refused(cases, tmp_path, stored, loaded):
    case = cases["bert"]
    written = case.written["prototype"]
    base = fresh(case).to(stored)
    written.save(tmp_path / "adapter", base)
    PeftModel.from_pretrained(copy.deepcopy(base).to(loaded), tmp_path / "adapter")
    other = base.to(loaded)
    other.bert.encoder.layer[1].output.dense.weight[8:].mul_(1.05)
    refused("their weights differ", PeftModel.from_pretrained, other, tmp_path / "adapter")


@torch.no_grad()
def test_a_base_that_cannot_be_read_is_mentioned(cases, caplog):
    case = cases["bert"]
    with torch.device("meta"):
        base = type(case.base)(case.base.config)
    PeftModel.from_pretrained(base, case.folder / "prototype", low_cpu_mem_usage=True)
    assert "cannot be compared" in caplog.text


def test_a_name_with_a_dot_is_refused(cases):
    case = cases["bert"]
    refused("'v1.0' cannot name an adapter", PeftModel.from_pretrained, fresh(case), case.folder / "prototype", "v1.0")


@routers
def test_adapter_names_are_refused(cases, router):
    case = cases["bert"]
    refused("not by adapter_names", loaded(case, router), **case.batch, adapter_names=[router] * len(case.samples))


@kinds
@routers
@torch.no_grad()
def test_a_part_of_the_model_alone_has_no_route_but_the_one_that_is_named(cases, kind, router):
    model = loaded(cases[kind], router).get_base_model()
    layer = next(layer for layer in layers(model) if router in layer.routed_experts_A)
    rows = torch.randn(2, 4, layer.in_features)
    refused("outside of its model's forward pass", layer, rows)
    with route(model, TASKS[1]):
        found = layer(rows)
    a, b = layer.routed_experts_A[router][1], layer.routed_experts_B[router][1]
    torch.testing.assert_close(found, layer.base_layer(rows) + rows @ a.T @ b.T)


def test_a_sample_trains_its_own_expert(cases):
    case = cases["llama"]
    model = loaded(case, "prototype", is_trainable=True).train()
    sample = {"input_ids": case.samples[0]["input_ids"][None]}
    with recording(model) as records:
        model(**sample).logits.square().mean().backward()
    assert len(records) == len(layers(model))
    for adapter, module, decision in records:
        layer = model.get_base_model().get_submodule(module)
        for factors in (layer.routed_experts_A, layer.routed_experts_B):
            trained = factors[adapter].grad.flatten(1).any(1)
            assert trained.tolist() == [task == int(decision.route.experts) for task in range(len(TASKS))]


@kinds
def test_reentrant_gradient_checkpointing_is_refused(cases, kind):
    case = cases[kind]
    model = loaded(case, "prototype", is_trainable=True).train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    refused("activation_checkpointing_enable({'use_reentrant': False})", model, **case.batch)
    model.activation_checkpointing_disable()
    model(**case.batch).logits.square().mean().backward()


@routers
def test_masks_that_do_not_fit_are_refused(cases, router):
    case = cases["bert"]
    model = loaded(case, router)
    first = "bert.encoder.layer.0.attention.self.query"
    batch = {name: value.clone() for name, value in case.batch.items()}
    batch["attention_mask"][2] = False
    refused(f"{first}: a sample has no real token", recorded, model, **batch)
    layer = next(layer for layer in layers(model) if layer.name == first)
    state, rows = routing_state(model), torch.ones(2, 5, layer.in_features)
    for mask, fits in ((torch.tensor([[1] * 8, [1] * 7 + [0]]), False), (torch.ones(2, 8), True)):
        state.local.frames.append(Frame(2, mask=mask))
        try:
            if fits:  # nothing is padded
                layer(rows)
            else:
                refused(f"{first}: the attention mask has (2, 8) positions and the layer reads (2, 5)", layer, rows)
        finally:
            state.local.frames.clear()


CONFIG = {"tasks": TASKS, "router": "prototype"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["word_embeddings"]}, "'bert.embeddings.word_embeddings' is a Embedding"),
        ({"router": "magic"}, "no router 'magic'; there are prototype, discriminant"),
        ({"router": "discriminant"}, "needs the modules that it reads"),
        ({"tasks": []}, "tasks of different names"),
        ({"tasks": ["a", "a"]}, "tasks of different names"),
        ({"format_version": 1}, "format version 1; this hf_esm reads version 3"),
        ({"target_modules": ["query"]}, "query: adapter 'default' has no routed_experts_prototypes"),
    ],
)
def test_bad_settings_are_refused(cases, settings, message):
    def use() -> None:
        logits(get_peft_model(fresh(cases["bert"]), RoutedExpertsConfig(**CONFIG | settings)), cases["bert"])

    refused(message, use)


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("vit", "projection", "'embeddings.patch_embeddings.projection' is a Conv2d"),
        ("switch", "wi", ".mlp.experts.expert_0.wi' reads some of each sample's tokens"),
        ("xlnet", "layer_1", "XLNetModel read tokens first"),
        ("longformer", "query", "LongformerModel read tokens first"),
        ("llava", "q_proj", "LlavaForConditionalGeneration reads text with any number"),
    ],
)
def test_modules_and_models_that_cannot_be_routed_are_refused(name, module, message):
    config = RoutedExpertsConfig(**CONFIG, target_modules=[module])
    refused(message, get_peft_model, ARCHITECTURES[name].build(), config)


def test_a_plain_module_is_refused():
    config = RoutedExpertsConfig(**CONFIG, target_modules=["0"])
    refused("not a Sequential", get_peft_model, nn.Sequential(nn.Linear(3, 3)), config)


@pytest.mark.parametrize("loader", ["PeftModel", "low_cpu_mem_usage", "load_adapter"])
@pytest.mark.parametrize("lacks", ["A", "B", "projection", "classes", "precision", "prototypes", "everything"])
def test_files_that_lack_tensors_are_refused(cases, lacks, loader, tmp_path):
    """PEFT only warns about such files. Experts or routes would silently be wrong."""
    case = cases["bert"]
    shutil.copytree(case.folder / ("prototype" if lacks == "prototypes" else "discriminant"), tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    gone = sorted(key for key in tensors if key.endswith(f"routed_experts_{lacks}") or lacks == "everything")
    assert gone
    kept = {key: value for key, value in tensors.items() if key not in (gone if lacks == "everything" else gone[-1:])}
    save_file(kept or {"base_model.model.bert.lora_A.weight": torch.ones(2)}, tmp_path / "adapter" / WEIGHTS)
    module, _, name = gone[-1].removeprefix("base_model.model.").rpartition(".")
    says = "has no routed_experts_" if lacks == "everything" else f"{module}: adapter 'default' has no {name}"
    refused(says, lambda: logits(LOADERS[loader](case, tmp_path / "adapter"), case))
    if loader == "PeftModel":  # to train on it, where new tensors would have values of their own
        refused(says, lambda: logits(LOADERS[loader](case, tmp_path / "adapter", is_trainable=True), case))
