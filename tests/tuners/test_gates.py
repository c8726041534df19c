"""Gates on essential components: against the literal formula, in training, and through every way that PEFT handles
an adapter.
"""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_esm import HfEsmError
from hf_esm.tuners.essential import EssentialComponentsConfig, EssentialComponentsLayer
from support.helpers import perturbed, save
from support.problems import relative_error
from support.tiny import GPT2, LLAMA


KINDS = {
    "gpt2": replace(GPT2, settings=GPT2.settings | dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)),
    "llama": LLAMA,
}
TARGETS = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "down_proj"]}
TASKS = ["law", "code"]
IDS = torch.arange(3, 35).reshape(4, 8)
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        kind: save(perturbed(architecture.build(), 0.1, 0), tmp_path_factory.mktemp(kind))
        for kind, architecture in KINDS.items()
    }


def config_of(kind: str, **options) -> EssentialComponentsConfig:
    """Six components of two tasks, three each; of five in the second map, one and four."""
    second = TARGETS[kind][1]
    settings = {"r": 6, "rank_pattern": {second: 5}, "target_modules": TARGETS[kind], "gates": True, "tasks": TASKS}
    return EssentialComponentsConfig(**{**settings, "task_ranks": {second: [1, 4]}, **options})


@pytest.fixture(params=KINDS)
def case(request, bases) -> SimpleNamespace:
    """A base, and an adapter on it with random directions and coordinates."""
    base = load(bases[request.param], request.param)
    torch.manual_seed(1)
    return SimpleNamespace(kind=request.param, at=bases[request.param], base=base, model=gated(base, request.param))


def load(at: str, kind: str, **options) -> PreTrainedModel:
    return type(KINDS[kind].build()).from_pretrained(at, **options).eval()


def gated(base: PreTrainedModel, kind: str, **options) -> PeftModel:
    return get_peft_model(copy.deepcopy(base), config_of(kind, **options)).eval()


def layers(model: nn.Module) -> dict[str, EssentialComponentsLayer]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, EssentialComponentsLayer)}
    return {name.removeprefix("base_model.model."): module for name, module in found.items()}


@torch.no_grad()
def open_gates(model: nn.Module, seed: int = 2, adapter: str = "default") -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model).values():
        gates = layer.essential_components_gates[adapter]
        gates.copy_(torch.randn(len(gates), generator=generator))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def by_hand(base: PreTrainedModel, model: nn.Module, adapter: str = "default") -> PreTrainedModel:
    """The base with `W + Σ_i g_i e_i c_iᵀ` in every adapted map, summed in float64."""
    merged = copy.deepcopy(base)
    for name, layer in layers(model).items():
        e, c, g = (getattr(layer, f"essential_components_{part}")[adapter].double() for part in ("E", "C", "gates"))
        update = sum(g[i] * torch.outer(e[:, i], c[i]) for i in range(len(g)))
        module = merged.get_submodule(name)
        with torch.no_grad():
            module.weight.copy_(module.weight.double() + (update.T if isinstance(module, Conv1D) else update))
    return merged


def gates_alone(model: nn.Module, adapter: str = "default") -> bool:
    """Whether the gates of one adapter require gradients, and nothing else does."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return len(trained) == 4 and all(name.endswith(f"essential_components_gates.{adapter}") for name in trained)


def test_a_new_adapter_changes_nothing_and_open_gates_are_the_formula(case):
    assert torch.equal(logits(case.model), logits(case.base))
    open_gates(case.model)
    expected = logits(by_hand(case.base, case.model))
    assert (expected - logits(case.base)).abs().max() > 1e-2
    torch.testing.assert_close(logits(case.model), expected, rtol=0, atol=1e-5)
    with case.model.disable_adapter():
        assert torch.equal(logits(case.model), logits(case.base))
    for layer in layers(case.model).values():
        assert layer.get_delta_weight("default").shape == layer.get_base_layer().weight.shape
    case.model.merge_adapter()
    torch.testing.assert_close(logits(case.model), expected, rtol=0, atol=1e-5)
    case.model.unmerge_adapter()
    torch.testing.assert_close(logits(case.model), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(case.model.merge_and_unload()), expected, rtol=0, atol=1e-5)


def test_trains_the_gates_alone_and_comes_back_from_its_folder(case, tmp_path):
    model, before = case.model, {name: p.clone() for name, p in case.model.named_parameters()}
    assert gates_alone(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    losses = []
    for _ in range(25):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not ("gates" in name), name
    model.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["format_version"] == 2 and written["tasks"] == TASKS and written["gates"] is True
    for trainable in (False, True):
        again = PeftModel.from_pretrained(load(case.at, case.kind), tmp_path / "adapter", is_trainable=trainable)
        assert torch.equal(logits(again.eval()), logits(model))
        assert gates_alone(again) if trainable else not any(p.requires_grad for p in again.parameters())
    torch.testing.assert_close(logits(again.merge_and_unload()), logits(model), rtol=0, atol=1e-5)


def test_gradient_checkpointing_gives_equal_gradients(case):
    open_gates(case.model)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            case.model.activation_checkpointing_enable({"use_reentrant": False})
            case.model.train()  # Transformers checkpoints in training alone
        case.model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append({n: p.grad.clone() for n, p in case.model.named_parameters() if p.requires_grad})
        case.model.zero_grad()
    assert found[0].keys() == found[1].keys() and len(found[0]) == 4
    for name, gradient in found[0].items():
        assert gradient.any()
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_adapters_with_and_without_gates_take_turns(case):
    model, plain = case.model, EssentialComponentsConfig(r=2, target_modules=TARGETS[case.kind])
    open_gates(model)
    model.add_adapter("plain", plain)
    model.add_adapter("other", config_of(case.kind))
    open_gates(model, 3, "other")
    assert gates_alone(model)
    model.set_adapter("plain")
    trained = {name.rsplit(".", 2)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"essential_components_E", "essential_components_C"}
    model.set_adapter("other")
    assert gates_alone(model, "other")
    torch.testing.assert_close(logits(model), logits(by_hand(case.base, model, "other")), rtol=0, atol=1e-5)
    model.set_requires_grad("default")
    model.set_requires_grad("other", False)
    assert gates_alone(model, "default")
    model.base_model.set_adapter(["default", "other"])
    both = logits(by_hand(by_hand(case.base, model, "other"), model))
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-5)
    model.delete_adapter("default")
    model.set_adapter("other")
    model.add_adapter("default", plain)  # a name that had gates before
    model.set_adapter("default")
    assert not any("gates" in name for name, p in model.named_parameters() if p.requires_grad)


def test_gates_stay_float32_over_a_bfloat16_base(case, tmp_path):
    open_gates(case.model)
    case.model.save_pretrained(tmp_path)
    base = load(case.at, case.kind, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    for name, layer in layers(model).items():
        assert layer.get_base_layer().weight.dtype == torch.bfloat16
        for _, tensor in layer.tensors("default"):
            assert tensor.dtype == torch.float32, name
    assert logits(model).dtype == torch.bfloat16
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert relative_error(logits(model), logits(case.model)) < 0.05


def test_converts_to_lora(case):
    open_gates(case.model)
    assert case.model.supports_lora_conversion()
    _, state = convert_to_lora(case.model, rank=6)
    for name, layer in layers(case.model).items():
        a, b = (state[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        update = by_hand(case.base, case.model).get_submodule(name).weight - layer.get_base_layer().weight
        torch.testing.assert_close(b @ a, update.T if case.kind == "gpt2" else update, rtol=0, atol=1e-5)


def test_the_task_of_a_component_is_known():
    config = config_of("llama")
    assert config.task_ranks_of("model.layers.0.self_attn.q_proj") == {"law": 3, "code": 3}
    assert config.task_ranks_of("model.layers.0.mlp.down_proj") == {"law": 1, "code": 4}
    assert EssentialComponentsConfig(r=3, gates=True).task_ranks_of("any") == {}
    assert EssentialComponentsConfig(r=3).format_version == 1
    assert EssentialComponentsConfig(r=3, gates=True).format_version == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gates": False}, "Only gates combine the components of several tasks"),
        ({"gates": False, "tasks": None}, "Only gates combine the components of several tasks"),
        ({"tasks": ["law", "law"]}, "different names"),
        ({"tasks": []}, "different names"),
        ({"format_version": 3}, "reads versions 1 and 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(HfEsmError, match=message):
        config_of("llama", **settings)


@pytest.mark.parametrize("ranks", [{}, {"down_proj": [5]}, {"down_proj": [2, 2]}])
def test_components_of_no_task_are_refused(bases, ranks):
    with pytest.raises(HfEsmError, match="down_proj has 5 components, but its 2 tasks have"):
        gated(load(bases["llama"], "llama"), "llama", task_ranks=ranks)


def test_a_file_that_lacks_gates_is_refused(bases, tmp_path):
    base = load(bases["llama"], "llama")
    gated(base, "llama").save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    lost = next(name for name in tensors if name.endswith("gates"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, weights)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    with pytest.raises(HfEsmError, match="has no essential_components_gates"):
        logits(model)
