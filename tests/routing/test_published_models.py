"""`esm++-roberta` and `esm++-vit`: the routed models of the published code, by name."""

import re

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModel

from hf_esm import METHODS, HfEsmError, RoutedModel, merge_models
from support.architectures import ARCHITECTURES
from support.helpers import image_samples, stored_tensors, token_inputs
from support.routed_toys import VIT, adapter, assert_expert, equal, expert, inputs, merge_bert, tuned
from support.toys import base_model


pytestmark = pytest.mark.slow


RANK = 4


def modules_of(tensors):
    return {name.rpartition(".")[0] for name in tensors if name.endswith("routed_experts_A")}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """The base, the experts, and the folders of the static merge and of the routed model."""
    folder, base = tmp_path_factory.mktemp("vit"), VIT.build()
    experts = {task: tuned(base, seed) for seed, task in enumerate("ab")}
    options = {"calibration": {task: image_samples(seed) for seed, task in enumerate("ab")}, "progress": False}
    merge_models(base, experts, method="esm-vit", output_dir=folder / "static", **options)
    merge_models(base, experts, method="esm++-vit", rank=RANK, output_dir=folder / "routed", **options)
    return base, experts, folder / "static", folder / "routed"


def test_roberta_routes_the_six_maps_of_each_block_over_its_static_model(models, tmp_path):
    folder = merge_bert(models, tmp_path / "routed", method="esm++-roberta", rank=RANK)
    static = merge_bert(models, tmp_path / "static", method="esm-roberta", rank=None)
    merged, found = AutoModel.from_pretrained(folder).state_dict(), adapter(folder)
    assert equal(stored_tensors(folder), stored_tensors(static))
    six = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    six += ("intermediate.dense", "output.dense")
    blocks = base_model().config.num_hidden_layers
    assert modules_of(found) == {f"encoder.layer.{i}.{name}" for i in range(blocks) for name in six}
    for i, task in enumerate("ab"):
        own = expert(task).state_dict()
        for module in sorted(modules_of(found)):
            x = inputs(task)[f"bert.{module}.weight"]
            residual = own[f"bert.{module}.weight"].double() - merged[f"{module}.weight"].double()
            assert_expert(*(found[f"{module}.routed_experts_{kind}"][i] for kind in "AB"), x, residual, RANK)
            prototype = found[f"{module}.routed_experts_prototypes"][i].double()
            assert torch.allclose(prototype, normalize(x.mean(0), dim=0), atol=1e-5)
    assert RoutedModel.from_pretrained(folder).config.router == "prototype"


def test_vit_routes_q_k_and_v_as_one_map_and_the_first_of_the_mlp(vit):
    base, experts, static, folder = vit
    merged, found = AutoModel.from_pretrained(folder).state_dict(), adapter(folder)
    assert equal(stored_tensors(folder), stored_tensors(static))
    assert RoutedModel.from_pretrained(folder).config.router == "prototype"
    linear = {
        name for name in dict(base.named_parameters()) if re.search(r"(attention|dense|fc\d|proj).*weight", name)
    }
    routed = {name for name in linear if re.search(r"query|key|value|[qkv]_proj|intermediate|fc1", name)}
    assert {f"{module}.weight" for module in modules_of(found)} == routed < linear
    blocks = {name.partition("attention")[0] for name in routed if "attention" in name}
    for i, (task, tuned_model) in enumerate(experts.items()):
        rows, weights = token_inputs(tuned_model, image_samples(i), VIT), tuned_model.state_dict()
        for block in blocks:
            qkv = sorted(name for name in routed if name.startswith(f"{block}attention"))
            assert len(qkv) == 3
            residual = torch.cat([weights[name].double() - merged[name].double() for name in qkv])
            parts = [[found[f"{n.removesuffix('.weight')}.routed_experts_{k}"][i] for n in qkv] for k in "AB"]
            assert all(torch.equal(a, parts[0][0]) for a in parts[0])
            assert_expert(parts[0][0], torch.cat(parts[1]), rows[qkv[0]], residual, RANK)
        for name in routed:
            if "attention" not in name:
                residual = weights[name].double() - merged[name].double()
                factors = [found[f"{name.removesuffix('.weight')}.routed_experts_{kind}"][i] for kind in "AB"]
                assert_expert(*factors, rows[name], residual, RANK)


@pytest.mark.parametrize("name", ["llama", "gpt2", "clip-vision", "swin", "distilbert", "t5", "modernbert", "bloom"])
def test_targets_are_maps_of_every_family(name):
    """ViT's: of each block what reads queries, keys and values, and what leads into the MLP; RoBERTa's: all maps."""
    names = [
        f"{module_name}.weight"
        for module_name, module in ARCHITECTURES[name].build().named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    ]
    vit_, roberta = METHODS["esm++-vit"](), METHODS["esm++-roberta"]()
    inside = [name for name in names if re.search(r"\.\d+\.", name)]
    assert [name for name in names if roberta.routes_on(name)] == inside
    into = r"q_|k_|v_|query|key|value|qkv|[qkv]_lin|SelfAttention\.[qkv]|EncDecAttention\.[qkv]|c_attn|fc1|c_fc|lin1"
    into += r"|wi|Wi|intermediate|gate_proj|up_proj|h_to_4h"
    expected = [name for name in inside if re.search(into, name)]
    assert [name for name in names if vit_.routes_on(name)] == expected


def test_targets_that_name_no_map_are_refused_before_any_work(models):
    with pytest.raises(HfEsmError, match="no linear maps to route experts on that the method's `targets` name"):
        merge_bert(models, models / "none", method={"name": "esm++", "targets": ["dence"]}, rank=RANK)
    assert not (models / "none").exists()
