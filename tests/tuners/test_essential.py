"""Essential components as adapters: against the literal formulas, through every way that PEFT and Transformers load
them, and as ordinary LoRA where there is no hf_esm.
"""

import copy
import inspect
import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload
from peft import AutoPeftModel, LoraConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_esm import HfEsmError, MergeOptions, calibrate, essential_components, fuse_components, write_lora_adapter
from hf_esm.tuners.essential.config import EssentialComponentsConfig
from hf_esm.tuners.essential.layer import EssentialComponentsLayer
from hf_esm.tuners.essential.model import EssentialComponentsModel
from hf_esm.tuners.registration import HfEsmPeftType, register
from support import reference
from support.helpers import VOCABULARY, Architecture, perturbed, save, text_samples, token_inputs
from support.problems import SEEDS, relative_error
from support.processes import run_script
from support.tiny import BERT, GPT2, LLAMA, save_tokenizer, snapshot


RANK = 3
WEIGHTS = "adapter_model.safetensors"
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Kind:
    """An architecture, its auto class, and three of its linear maps: one that the expert tunes by a matrix of rank
    one, one that it leaves as it is, one that it tunes in full.
    """

    architecture: Architecture
    auto: str
    weak: str
    untuned: str
    full: str


KINDS = {
    "bert": Kind(
        BERT,
        "AutoModelForSequenceClassification",
        "bert.encoder.layer.0.attention.self.key",
        "bert.encoder.layer.0.attention.output.dense",
        "bert.encoder.layer.0.intermediate.dense",
    ),
    "gpt2": Kind(
        GPT2,
        "AutoModelForCausalLM",
        "transformer.h.1.attn.c_attn",
        "transformer.h.0.mlp.c_proj",
        "transformer.h.0.mlp.c_fc",
    ),
    "llama": Kind(
        LLAMA,
        "AutoModelForCausalLM",
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.up_proj",
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    """Per architecture a base and two experts on disk, and their adapters: `lora` and `left` of one, `right`."""
    made = {}
    for name, kind in KINDS.items():
        folder = tmp_path_factory.mktemp(name)
        base = perturbed(kind.architecture.build(), 0.1, SEEDS[0])
        experts = {task: tune(base, kind, SEEDS[0] + 1 + i) for i, task in enumerate(["left", "right"])}
        case = SimpleNamespace(kind=kind, folder=folder, base=base, experts=experts, at=save(base, folder / "base"))
        statistics = {task: calibrate(expert, samples(task), progress=False) for task, expert in experts.items()}
        case.statistics = statistics
        compress(case, experts["left"], statistics["left"], "lora")
        for task, expert in experts.items():
            compress(case, expert, statistics[task], task, as_lora=False)
        made[name] = case
    return made


def samples(task: str) -> list[dict[str, Tensor]]:
    return text_samples(["left", "right"].index(task))


@torch.no_grad()
def tune(base: PreTrainedModel, kind: Kind, seed: int) -> PreTrainedModel:
    expert = perturbed(base, 0.1, seed)
    before = base.get_submodule(kind.weak).weight
    generator = torch.Generator().manual_seed(seed)
    column, row = (torch.randn(size, generator=generator) for size in before.shape)
    expert.get_submodule(kind.weak).weight.copy_(before + 0.1 * column[:, None] * row)
    expert.get_submodule(kind.untuned).weight.copy_(base.get_submodule(kind.untuned).weight)
    return expert


def compress(case: SimpleNamespace, expert: Any, calibration: Any, name: str, **options: Any) -> Path:
    options = {"rank": RANK, "output_dir": case.folder / name, "progress": False, **options}
    return essential_components(case.at, expert, calibration, **options)


def fresh(case: SimpleNamespace, **options: Any) -> PreTrainedModel:
    """A new copy of the base."""
    return type(case.base).from_pretrained(case.at, **options).eval()


def loaded(case: SimpleNamespace, *names: str, **options: Any) -> PeftModel:
    """The base with adapters of these names on it, the first one active."""
    model = PeftModel.from_pretrained(fresh(case), case.folder / names[0], adapter_name=names[0], **options)
    for name in names[1:]:
        model.load_adapter(case.folder / name, adapter_name=name, **options)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(3, 19).reshape(2, 8)
    return model(input_ids=ids).logits


def linear_maps(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight as `[d_out, d_in]`, or a matrix as the module stores it."""
    return weight.T if isinstance(module, Conv1D) else weight


@torch.no_grad()
def expected_components(case: SimpleNamespace, task: str, rank: int = RANK) -> dict[str, tuple[Tensor, Tensor]]:
    """`E, C` of every linear map that the samples pass, by the literal formula."""
    found, tuned = {}, linear_maps(case.experts[task])
    inputs = token_inputs(case.experts[task], samples(task), case.kind.architecture)
    for name, module in linear_maps(case.base).items():
        if f"{name}.weight" in inputs and module.weight is not case.base.get_input_embeddings().weight:
            delta = matrix(module, tuned[name].weight.double() - module.weight.double())
            directions, _, coordinates = reference.esd(inputs[f"{name}.weight"], delta, rank)
            found[name] = directions, coordinates
    return found


@torch.no_grad()
def merged_by_hand(case: SimpleNamespace, updates: dict[str, Tensor]) -> PreTrainedModel:
    model = copy.deepcopy(case.base)
    for name, module in linear_maps(model).items():
        if name in updates:
            module.weight.copy_(module.weight.double() + matrix(module, updates[name]))
    return model


def summed(*parts: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(part[name][0] @ part[name][1] for part in parts) for name in parts[0]}


def stored(folder: Path, first: str, second: str) -> dict[str, tuple[Tensor, Tensor]]:
    """`E, C` by module, from the adapter's file."""
    tensors = load_file(folder / WEIGHTS)
    modules = {key.removeprefix("base_model.model.").removesuffix(f".{first}") for key in tensors if first in key}
    return {m: tuple(tensors[f"base_model.model.{m}.{part}"] for part in (first, second)) for m in modules}


FORMS = {
    "lora": ("lora_B.weight", "lora_A.weight"),
    "left": ("essential_components_E", "essential_components_C"),
}


@kinds
@pytest.mark.parametrize("form", FORMS)
def test_adapter_is_the_formula(cases, kind, form):
    case = cases[kind]
    expected = expected_components(case, "left")
    found = stored(case.folder / form, *FORMS[form])
    assert len(expected[case.kind.untuned][1]) == 0 and expected.pop(case.kind.untuned)
    assert found.keys() == expected.keys()
    for name, (e, c) in expected.items():
        directions, coordinates = found[name]
        assert directions.dtype == coordinates.dtype == torch.float32
        assert directions.shape == e.shape and coordinates.shape == c.shape
        assert len(coordinates) == (1 if name == case.kind.weak else RANK)
        assert relative_error(directions.double() @ coordinates.double(), e @ c) < 1e-4
        assert relative_error(directions.T.double() @ directions.double(), torch.eye(len(c))) < 1e-5
    by_hand = logits(merged_by_hand(case, summed(expected)))
    assert (logits(case.base) - by_hand).abs().max() > 1e-2
    model = loaded(case, form)
    torch.testing.assert_close(logits(model), by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), by_hand, rtol=1e-4, atol=1e-5)


def load_into(case: SimpleNamespace, adapter: Path, **options: Any) -> PreTrainedModel:
    model = fresh(case, **options)
    model.load_adapter(str(adapter))
    return model.eval()


LOADERS: dict[str, Callable] = {
    "low_cpu_mem_usage": lambda case, adapter, **options: PeftModel.from_pretrained(
        fresh(case, **options), adapter, low_cpu_mem_usage=True
    ).eval(),
    "AutoPeftModel": lambda case, adapter, **options: AutoPeftModel.from_pretrained(adapter, **options).eval(),
    "AutoModelFor": lambda case, adapter, **options: (
        getattr(transformers, case.kind.auto).from_pretrained(adapter, **options).eval()
    ),
    "load_adapter": load_into,
}


@kinds
@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_gives_the_same(cases, kind, loader):
    case = cases[kind]
    expected = logits(loaded(case, "left"))
    assert torch.equal(logits(LOADERS[loader](case, case.folder / "left")), expected)


@pytest.mark.parametrize("loader", ["PeftModel", *LOADERS])
def test_factors_stay_float32_over_a_bfloat16_base(cases, loader):
    case = cases["gpt2"]
    adapter = case.folder / "left"
    load = LOADERS.get(
        loader, lambda case, adapter, **options: PeftModel.from_pretrained(fresh(case, **options), adapter)
    )
    model = load(case, adapter, dtype=torch.bfloat16)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, EssentialComponentsLayer)}
    assert layers
    for name, (directions, coordinates) in stored(adapter, *FORMS["left"]).items():
        layer = layers.get(name) or layers[f"base_model.model.{name}"]
        assert layer.weight.dtype == torch.bfloat16
        assert torch.equal(next(iter(layer.essential_components_E.values())), directions)
        assert torch.equal(next(iter(layer.essential_components_C.values())), coordinates)
    assert logits(model).dtype == torch.bfloat16
    by_hand = logits(merged_by_hand(case, summed(expected_components(case, "left"))))
    assert relative_error(logits(model), by_hand) < 0.05


@kinds
def test_saved_again_it_is_the_same(cases, kind, tmp_path):
    case = cases[kind]
    model = loaded(case, "left", "right")
    model.save_pretrained(tmp_path)
    for task in ("left", "right"):
        before, after = load_file(case.folder / task / WEIGHTS), load_file(tmp_path / task / WEIGHTS)
        extra = after.keys() - before.keys()  # PEFT adds the weight of an output embedding that is adapted
        assert extra <= {"base_model.model.lm_head.base_layer.weight"}
        assert all(torch.equal(before[key], after[key]) for key in before)
        config = json.loads((tmp_path / task / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"]) == ("ESSENTIAL_COMPONENTS", RANK)
        again = PeftModel.from_pretrained(fresh(case), tmp_path / task).eval()
        model.set_adapter(task)
        assert torch.equal(logits(again), logits(model))


@kinds
def test_switch_disable_sum_merge_and_unload(cases, kind):
    case = cases[kind]
    left, right = expected_components(case, "left"), expected_components(case, "right")
    alone = {task: logits(loaded(case, task)) for task in ("left", "right")}
    both = logits(merged_by_hand(case, summed(left, right)))
    plain = logits(fresh(case))
    model = loaded(case, "left", "right")
    assert torch.equal(logits(model), alone["left"])
    model.set_adapter("right")
    assert torch.equal(logits(model), alone["right"])
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.base_model.set_adapter(["left", "right"])
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(logits(model), both, **near)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, **near)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain, **near)
    torch.testing.assert_close(logits(model), both, **near)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), both, **near)
    model.delete_adapter("left")
    torch.testing.assert_close(logits(model), alone["right"], **near)
    with pytest.raises(ValueError):
        model.set_adapter("left")
    unloaded = copy.deepcopy(model).unload()
    torch.testing.assert_close(logits(unloaded), plain, **near)
    assert unloaded.state_dict().keys() == case.base.state_dict().keys()
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), alone["right"], **near)
    assert merged.state_dict().keys() == case.base.state_dict().keys()


def test_an_offloaded_model_gives_the_same(cases):
    case = cases["bert"]
    model = loaded(case, "left", "right")
    model.base_model.set_adapter(["left", "right"])
    expected = logits(model)
    assert torch.equal(logits(cpu_offload(model, "cpu")), expected)
    assert next(model.parameters()).is_meta


@kinds
def test_copies_and_pickles(cases, kind):
    model = loaded(cases[kind], "left", "right")
    expected = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), expected)
        assert copied.peft_config["left"].peft_type is HfEsmPeftType.ESSENTIAL_COMPONENTS
        copied.merge_and_unload()
    assert torch.equal(logits(model), expected)


VANILLA = """
import sys, torch, transformers
from peft import PeftModel
from safetensors.torch import save_file
found = {}
for at, auto, adapter, out in zip(*[iter(sys.argv[1:])] * 4):
    base = getattr(transformers, auto).from_pretrained(at).eval()
    model = PeftModel.from_pretrained(base, adapter).eval()
    ids = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        after = model.merge_and_unload()(input_ids=ids).logits
    save_file({"before": before, "after": after}, out)
assert "hf_esm" not in sys.modules
"""


def test_lora_form_needs_no_hf_esm(cases, tmp_path):
    outputs = {name: tmp_path / f"{name}.safetensors" for name in cases}
    arguments = [(c.at, c.kind.auto, c.folder / "lora", outputs[name]) for name, c in cases.items()]
    flat = [str(argument) for of_case in arguments for argument in of_case]
    ran = run_script(VANILLA, *flat)
    assert ran.returncode == 0, ran.output
    for name, case in cases.items():
        found = load_file(outputs[name])
        config = json.loads((case.folder / "lora" / "adapter_config.json").read_text())
        assert config["rank_pattern"] == config["alpha_pattern"] == {f"^{case.kind.weak}": 1}
        assert (config["r"], config["lora_alpha"], config["bias"]) == (RANK, RANK, "none")
        assert config["fan_in_fan_out"] is (name == "gpt2")
        model = loaded(case, "left")
        torch.testing.assert_close(found["before"], logits(model), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["after"], logits(model.merge_and_unload()), rtol=1e-5, atol=1e-6)


@kinds
def test_full_rank_components_are_the_expert(cases, kind, tmp_path):
    case = cases[kind]
    # With some shrinkage no direction of the update is lost, however few directions the samples have.
    compress(case, case.experts["left"], samples("left"), "full", rank=64, shrinkage=1e-2, output_dir=tmp_path / "a")
    merged = PeftModel.from_pretrained(fresh(case), tmp_path / "a").merge_and_unload()
    names = expected_components(case, "left").keys()
    for name in names:
        tuned, own = case.experts["left"].get_submodule(name).weight, merged.get_submodule(name).weight
        assert (tuned - own).abs().max() < 1e-5
    own = dict(merged.named_parameters())
    for name, weight in case.base.named_parameters():
        if name.removesuffix(".weight") not in names:
            assert torch.equal(own[name], weight)


@kinds
def test_fusion_is_the_formula(cases, kind):
    case = cases[kind]
    tasks = ("left", "right")
    inputs = [token_inputs(case.experts[task], samples(task), case.kind.architecture) for task in tasks]
    parts = [expected_components(case, task) for task in tasks]
    expected = {}
    for name in parts[0]:
        deltas = [part[name][0] @ part[name][1] for part in parts]
        expected[name] = reference.esm(deltas, [x[f"{name}.weight"] for x in inputs], shrinkage=0.0)
    model = loaded(case, *tasks)
    model.add_adapter("other", EssentialComponentsConfig(target_modules=[case.kind.untuned]))
    before = logits(model)
    fuse_components(model, tasks, "fused")
    assert torch.equal(logits(model), before) and model.active_adapter == "left"
    for name, update in expected.items():
        layer = model.get_base_model().get_submodule(name)
        if name == case.kind.untuned:
            assert layer.essential_components_E.keys() == {"other"}
            continue
        assert relative_error(matrix(layer.get_base_layer(), layer.get_delta_weight("fused")), update) < 1e-4
        directions = layer.essential_components_E["fused"].double()
        assert directions.shape[1] == min(sum(len(part[name][1]) for part in parts), *update.shape)
        assert relative_error(directions.T @ directions, torch.eye(directions.shape[1])) < 1e-5
        norms = layer.essential_components_C["fused"].norm(dim=1)
        assert norms.tolist() == sorted(norms.tolist(), reverse=True)
    model.set_adapter("fused")
    by_hand = logits(merged_by_hand(case, expected))
    torch.testing.assert_close(logits(model), by_hand, rtol=1e-4, atol=1e-5)
    model.delete_adapter("left")
    model.save_pretrained(case.folder / "of-fused", selected_adapters=["fused"])
    again = PeftModel.from_pretrained(fresh(case), case.folder / "of-fused" / "fused").eval()
    assert torch.equal(logits(again), logits(model))


def test_fusion_of_components_of_higher_rank_than_their_share(cases, tmp_path):
    """The merge takes the leading components of each adapter, and a part of the sum of all."""
    case = cases["llama"]
    for task, expert in case.experts.items():
        compress(case, expert, case.statistics[task], "", rank=13, as_lora=False, output_dir=tmp_path / task)
    model = PeftModel.from_pretrained(fresh(case), tmp_path / "left", adapter_name="left")
    model.load_adapter(tmp_path / "right", adapter_name="right")
    fuse_components(model, ["left", "right"], "fused")
    name = case.kind.full
    x = [token_inputs(expert, samples(task), case.kind.architecture) for task, expert in case.experts.items()]
    parts = [expected_components(case, task, 13)[name] for task in case.experts]
    expected = reference.esm([e @ c for e, c in parts], [inputs[f"{name}.weight"] for inputs in x], shrinkage=0.0)
    layer = model.get_base_model().get_submodule(name)
    assert relative_error(layer.get_delta_weight("fused"), expected) < 1e-4
    assert layer.essential_components_C["fused"].shape[0] == min(26, *expected.shape)


@torch.no_grad()
def test_fusion_depends_on_the_updates_alone(cases):
    """Fusing depends on the update `E C` alone, and not on how training left the factors."""
    case = cases["bert"]
    fused = []
    for mix in (False, True):
        model = loaded(case, "left", "right")
        for layer in model.modules():
            if mix and isinstance(layer, EssentialComponentsLayer) and "left" in layer.essential_components_E:
                e, c = layer.essential_components_E["left"], layer.essential_components_C["left"]
                turn = torch.eye(len(c)) + torch.triu(torch.full((len(c), len(c)), 0.7))
                e.copy_(e @ turn)
                c.copy_(torch.linalg.solve(turn, c))
        fuse_components(model, ["left", "right"], "fused")
        fused.append(model.get_base_model().get_submodule(case.kind.full).get_delta_weight("fused"))
    assert relative_error(fused[1], fused[0]) < 1e-4


def test_trains_as_any_adapter(cases, tmp_path):
    case = cases["bert"]
    torch.manual_seed(0)
    config = EssentialComponentsConfig(
        r=4, rank_pattern={"query": 2}, target_modules=["query", "dense"], task_type="SEQ_CLS"
    )
    model = get_peft_model(fresh(case), config)
    with torch.no_grad():
        assert torch.equal(logits(model.eval()), logits(case.base))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".default" in name for name in trained)
    assert any(".classifier." in name for name in trained) and any(
        "essential_components_E" in name for name in trained
    )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "layer.0.attention.self.query" in name}
    assert shapes.pop("base_model.model.bert.encoder.layer.0.attention.self.query.essential_components_E.default") == (
        16,
        2,
    )
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    ids, labels = torch.arange(3, 35).reshape(4, 8), torch.tensor([0, 1, 2, 0])
    losses = []
    for _ in range(60):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in model.named_parameters():
        assert (name in trained) is not torch.equal(parameter, before[name]), name
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh(case), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert torch.allclose(logits(again.merge_and_unload()), logits(model), atol=1e-5)


def test_a_head_of_several_layers_is_unloaded():
    settings = SMALL | {"intermediate_size": 24, "max_position_embeddings": 40}
    base = Architecture("RobertaForSequenceClassification", settings).build()
    config = EssentialComponentsConfig(target_modules=["query"], modules_to_save=["classifier"])
    expected = logits(base)
    assert torch.equal(logits(get_peft_model(copy.deepcopy(base), config).merge_and_unload()), expected)


def test_converts_to_lora(cases):
    model = loaded(cases["gpt2"], "left")
    assert model.supports_lora_conversion("left")
    config, state = convert_to_lora(model, rank=RANK, adapter_name="left")
    assert isinstance(config, LoraConfig) and len(state) == 2 * len(
        stored(cases["gpt2"].folder / "left", *FORMS["left"])
    )


def test_bare_body_as_base(cases, tmp_path):
    """The adapter is of the shared body, under the base's names, without modules that only the head reads."""
    case = cases["bert"]
    body = case.base.bert
    (tmp_path / "base").mkdir()
    body.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    texts = ["the film was good", "dull plot", "it is a fine film so fine"]
    adapter = essential_components(
        tmp_path / "base", case.experts["left"], texts, rank=2, output_dir=tmp_path / "adapter", progress=False
    )
    modules = stored(adapter, *FORMS["lora"])
    assert modules and all(name.startswith("encoder.layer.") for name in modules)
    model = AutoPeftModel.from_pretrained(adapter)
    assert type(model.get_base_model()) is transformers.BertModel


def test_a_lora_expert_and_a_file_of_statistics(cases, tmp_path):
    """Compressing the update of an adapter at the adapter's rank does not change it."""
    case = cases["gpt2"]
    model = get_peft_model(fresh(case), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(SEEDS[0]))
    model.save_pretrained(tmp_path / "tuned")
    file = calibrate(tmp_path / "tuned", samples("left"), base=case.at, progress=False).save(
        tmp_path / "s.safetensors"
    )
    compress(case, tmp_path / "tuned", file, "", output_dir=tmp_path / "adapter")
    found = PeftModel.from_pretrained(fresh(case), tmp_path / "adapter").eval()
    assert found.peft_config["default"].r == 2
    torch.testing.assert_close(logits(found), logits(model.eval()), rtol=1e-3, atol=1e-4)


def test_a_module_whose_name_ends_as_another(tmp_path):
    """PEFT matches patterns with the ends of names, but each rank must hold for one module alone."""
    inner = nn.ModuleDict({"fc": nn.Linear(4, 5, bias=False)})
    model = nn.Sequential()
    model.add_module("part", inner)
    model.add_module("whole", nn.Sequential())
    model.whole.add_module("part", copy.deepcopy(inner))
    factors = {
        name: (torch.randn(rank, 4), torch.randn(5, rank)) for name, rank in {"part.fc": 1, "whole.part.fc": 3}.items()
    }
    write_lora_adapter(tmp_path / "adapter", factors)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").merge_and_unload()
    for name, (a, b) in factors.items():
        added = loaded.get_submodule(name).weight - model.get_submodule(name).weight
        torch.testing.assert_close(added, b @ a)


def refused(says: str, call: Callable, *arguments: Any, **options: Any) -> None:
    with pytest.raises(HfEsmError) as caught:
        call(*arguments, **options)
    assert says in str(caught.value), str(caught.value)


def test_bad_input_is_refused_and_leaves_nothing(cases, tmp_path):
    case = cases["bert"]
    expert, statistics = case.experts["left"], case.statistics["left"]
    before = snapshot(case.folder)
    refused("left exists", compress, case, expert, statistics, "left")
    for rank in (0, 2.5, "4"):
        refused("rank must be a whole number, 1 or more", compress, case, expert, statistics, "new", rank=rank)
    refused("shrinkage must be 0 or more", compress, case, expert, statistics, "new", shrinkage=-1.0)
    refused("equals the base", compress, case, case.base, statistics, "new")
    refused("has no `calibration`", compress, case, expert, None, "new")
    refused("of another model", compress, case, expert, cases["gpt2"].statistics["left"], "new")
    refused("is a gpt2 model", compress, case, cases["gpt2"].experts["left"], statistics, "new")
    with pytest.raises(TypeError, match="unexpected keyword argument 'alpha'"):
        compress(case, expert, statistics, "new", alpha=1.0)
    refused("would be empty", write_lora_adapter, case.folder / "new", {"a": (torch.zeros(0, 4), torch.zeros(5, 0))})
    assert snapshot(case.folder) == before


def test_unsupported_modules_and_ranks_are_refused(cases):
    config = EssentialComponentsConfig(target_modules=["word_embeddings"])
    refused("'bert.embeddings.word_embeddings' is a Embedding", get_peft_model, fresh(cases["bert"]), config)
    refused("version 3; this hf_esm reads versions 1 and 2", EssentialComponentsConfig, format_version=3)
    refused("rank 0", EssentialComponentsConfig, r=0)
    refused("rank 0", EssentialComponentsConfig, rank_pattern={"query": 0})


def test_a_file_that_lacks_components_is_refused_and_so_are_adapter_names(cases, tmp_path):
    case = cases["bert"]
    shutil.copytree(case.folder / "left", tmp_path / "left")
    stored = load_file(tmp_path / "left" / WEIGHTS)
    lost = next(name for name in stored if name.endswith("components_C"))
    save_file({name: tensor for name, tensor in stored.items() if name != lost}, tmp_path / "left" / WEIGHTS)
    model = PeftModel.from_pretrained(fresh(case), tmp_path / "left").eval()
    refused("has no essential_components_", logits, model)
    refused("has no essential_components_", model.merge_and_unload)
    whole = loaded(case, "left")
    refused("the same adapters to a whole batch", whole, input_ids=torch.tensor([[5, 6]]), adapter_names=["left"])


def test_broken_and_quantised_weights_are_not_merged(cases):
    model = loaded(cases["bert"], "left")
    layer = model.get_base_model().get_submodule(KINDS["bert"].full)
    with torch.no_grad():
        layer.essential_components_C["left"][0, 0] = float("inf")
    refused("'left' gives NaN", layer.merge, safe_merge=True)
    weight = torch.zeros(layer.weight.shape, dtype=torch.int8)
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
    refused("quantised Linear", layer.merge)
    assert not layer.merged and not layer.weight.any()


def test_bad_fusions_are_refused(cases):
    case = cases["bert"]
    model = loaded(case, "left", "right")
    model.add_adapter("gated", EssentialComponentsConfig(target_modules=["query"], gates=True))
    refused("'gated' has gates", fuse_components, model, ["left", "gated"], "fused")
    model.delete_adapter("gated")
    refused("no adapter 'middle'; it has left, right", fuse_components, model, ["left", "middle"], "fused")
    refused("two adapters or more", fuse_components, model, ["left"], "fused")
    refused("two adapters or more", fuse_components, model, ["left", "left"], "fused")
    refused("two adapters or more", fuse_components, model, "left", "fused")
    refused("already has an adapter 'right'", fuse_components, model, ["left", "right"], "right")
    refused("takes a PeftModel", fuse_components, case.base, ["left", "right"], "fused")
    refused("'lora' is a LORA adapter", fuse_components, loaded(case, "lora"), ["lora", "lora2"], "fused")
    assert list(model.peft_config) == ["left", "right"]


def test_registration_is_idempotent_and_never_overwrites():
    register(HfEsmPeftType.ESSENTIAL_COMPONENTS, EssentialComponentsConfig, EssentialComponentsModel)

    class Other(EssentialComponentsModel):
        prefix = "other_"

    refused("already has a method", register, HfEsmPeftType.ESSENTIAL_COMPONENTS, EssentialComponentsConfig, Other)
    assert EssentialComponentsModel.prefix == HfEsmPeftType.ESSENTIAL_COMPONENTS.value.lower() + "_"


def test_nothing_warns(cases):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of Transformers, about how PEFT calls it
        for name in ("left", "lora"):
            loaded(cases["gpt2"], name).merge_and_unload()


def test_the_parameters_of_essential_components_are_options_of_a_merge():
    parameters = inspect.signature(essential_components).parameters
    options = {field.name: field.default for field in fields(MergeOptions)}
    shared = parameters.keys() & options.keys() - {
        "rank",
        "output_dir",
        "num_samples",
    }  # a merge takes samples for agreement, too
    assert shared >= {"heads", "seed", "max_length", "columns", "batch_size", "progress"}
    assert {name: parameters[name].default for name in shared} == {name: options[name] for name in shared}
