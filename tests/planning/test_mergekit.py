"""Recipes of mergekit: converted, they merge by mergekit's formulas; what cannot be converted is named."""

import re
from functools import partial

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_esm import HfEsmError, load_recipe, merge_models
from hf_esm.cli import main
from hf_esm.planning import convert_mergekit
from support.helpers import perturbed
from support.problems import relative_error


LAYERS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    for seed, name in enumerate(("one", "two")):
        perturbed(base, 0.01, seed).save_pretrained(folder / name)
    return folder


# The literal formulas, from mergekit's documentation, one tensor at a time in float64.


def setting(value, name, place):
    """The value of a parameter for one tensor: a number, a gradient, or the first filter that matches."""
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        first = next(p for p in value if p.get("filter") in (None, "*") or p["filter"] in name)
        return setting(first["value"], name, place)
    if isinstance(value, list):
        at = place * (len(value) - 1)
        low = min(int(at), len(value) - 2)
        return value[low] + (at - low) * (value[low + 1] - value[low])
    return value


def trimmed(delta, density):
    kept = delta.abs().flatten().argsort(descending=True)[: int(density * delta.numel())]
    mask = torch.zeros(delta.numel(), dtype=delta.dtype)
    mask[kept] = 1
    return delta * mask.view_as(delta)


def task_vectors(base, experts, name, place, kit, signs=False, trims=False):
    given = [{**kit.get("parameters", {}), **model.get("parameters", {})} for model in kit["models"]]
    at = [{key: setting(value, name, place) for key, value in parameters.items()} for parameters in given]
    deltas = [e - base for e in experts]
    if trims:
        deltas = [trimmed(d, p.get("density", 1.0)) for d, p in zip(deltas, at)]
    weights = torch.tensor([p["weight"] for p in at], dtype=torch.float64).view(-1, *[1] * base.dim())
    weighted = torch.stack(deltas) * weights
    mask = torch.ones_like(weighted)
    if signs:
        mask = (weighted.sign() == ((weighted.sum(0) >= 0) * 2 - 1)).double()
    mixed, divisor = (weighted * mask).sum(0), (weights * mask).sum(0)
    if at[0].get("normalize", signs):
        mixed = mixed / torch.where(divisor == 0, 1, divisor)
    return base + at[0].get("lambda", 1.0) * mixed


def slerped(base, experts, name, place, kit):
    t, (a, b) = setting(kit["parameters"]["t"], name, place), experts
    if kit.get("base_model", "").endswith("two"):
        a, b = b, a
    cosine = float((a / a.norm() * (b / b.norm())).sum())
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = torch.tensor(cosine, dtype=torch.float64).arccos()
    return ((1 - t) * angle).sin() / angle.sin() * a + (t * angle).sin() / angle.sin() * b


def linear(base, experts, name, place, kit):
    weights = [setting(model["parameters"]["weight"], name, place) for model in kit["models"]]
    return sum(w * e for w, e in zip(weights, experts)) / sum(weights)


def where(filter_, value):
    return {"filter": filter_, "value": value}


WEIGHTS = ({"weight": 0.7}, {"weight": 0.3})
FILTERED = [where("self_attn", 0.2), where("q_proj", 9.0), where("mlp", [0.1, 0.9]), {"value": 0.6}]
T = [where("self_attn", [0, 0.5, 1]), where("mlp", 0.1), {"value": 0.5}]
SIGNED = partial(task_vectors, signs=True)
CASES = {  # mergekit's keys, the parameters of both models, and the formula
    "task arithmetic": (
        {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.7}},
        ({"weight": 0.5}, {"weight": -0.3}),
        task_vectors,
    ),
    "filters and gradients": (
        {"merge_method": "task_arithmetic"},
        ({"weight": FILTERED}, {"weight": [where("self_attn.q", 0.4), {"value": 1.0}]}),
        task_vectors,
    ),
    "a gradient of lambda": (
        {"merge_method": "task_arithmetic", "parameters": {"lambda": [where("mlp", 2), {"value": [1, 0]}]}},
        WEIGHTS,
        task_vectors,
    ),
    "normalized": (
        {"merge_method": "task_arithmetic", "parameters": {"normalize": True, "weight": 0.4}},
        ({}, {"weight": 0.8}),
        task_vectors,
    ),
    "ties": (
        {"merge_method": "ties", "parameters": {"density": 0.5, "int8_mask": True}},
        WEIGHTS,
        partial(SIGNED, trims=True),
    ),
    "ties, summed, with a filter": (
        {
            "merge_method": "ties",
            "parameters": {"density": [where("mlp", 0.3), {"value": 0.6}], "lambda": 2, "normalize": False},
        },
        WEIGHTS,
        partial(SIGNED, trims=True),
    ),
    "dare_ties that drops nothing": (
        {"merge_method": "dare_ties", "parameters": {"normalize": False}},
        WEIGHTS,
        SIGNED,
    ),
    "linear": ({"merge_method": "linear", "base_model": None}, ({"weight": 1.0}, {"weight": 0.25}), linear),
    "slerp": ({"merge_method": "slerp", "base_model": "one", "parameters": {"t": 0.3}}, ({}, {}), slerped),
    "slerp from the second, with filters": (
        {"merge_method": "slerp", "base_model": "two", "parameters": {"t": T}},
        ({}, {}),
        slerped,
    ),
}


def kit_recipe(models, case, folder):
    config, parameters, formula = CASES[case]
    config = {"base_model": str(models / "base"), **config}
    if config["base_model"] in ("one", "two"):
        config["base_model"] = str(models / config["base_model"])
    config["models"] = [
        {"model": str(models / name), **({"parameters": given} if given else {})}
        for name, given in zip(("one", "two"), parameters)
    ]
    config = {key: value for key, value in config.items() if value is not None}
    path = folder / "mergekit.yml"
    path.write_text(yaml.safe_dump(config))
    return path, config, formula


@pytest.mark.parametrize("case", CASES)
def test_a_converted_recipe_merges_by_the_formula_of_mergekit(models, case, tmp_path):
    path, config, formula = kit_recipe(models, case, tmp_path)
    base = str(models / "base")
    recipe, notes = convert_mergekit(path, None if config.get("base_model") == base else base)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merge_models(**load_recipe(tmp_path / "recipe.yaml"), output_dir=tmp_path / "merged", progress=False)
    folders = {**{name: models / name for name in ("base", "one", "two")}, "merged": tmp_path / "merged"}
    weights = {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}
    for name, found in weights["merged"].items():
        block = re.search(r"layers\.(\d+)\.", name)
        place = int(block[1]) / (LAYERS - 1) if block else float("embed" not in name)
        start, *experts = (weights[which][name].double() for which in ("base", "one", "two"))
        assert relative_error(found, formula(start, experts, name, place, config)) < 1e-5, name
    assert any("lists of numbers" in note for note in notes) == ("gradient" in case or "second" in case)


LAYERS_OF_TWO = [
    {"sources": [{"model": "a", "layer_range": [0, 2]}]},
    {"sources": [{"model": "b", "layer_range": [1, 3]}]},
]
DENSITIES = [{"model": m, "parameters": {"weight": 1, "density": d}} for m, d in (("a", 0.1), ("b", 0.2))]
REFUSED = {  # what is changed in a recipe, and what the error says
    "slices of layers": ({"models": None, "slices": LAYERS_OF_TWO}, "`slices` takes layers"),
    "passthrough": ({"merge_method": "passthrough"}, "stacks layers"),
    "an unknown method": ({"merge_method": "tied"}, "no merge_method 'tied' (did you mean 'ties'?)"),
    "an unknown key": ({"mergemethod": 1}, "no key 'mergemethod' (did you mean 'merge_method'?)"),
    "an unknown parameter": ({"parameters": {"wait": 1}}, "nothing for 'wait' of ties"),
    "no base": ({"base_model": None}, "there is no `base_model`"),
    "no weight": ({"models": [{"model": "a"}, {"model": "b"}]}, "the model of 'a' has no `weight`"),
    "densities": ({"models": DENSITIES}, "`density` differs between the models"),
    "a gradient of density": ({"parameters": {"density": [0.1, 0.2]}}, "no gradient of it"),
    "a template": ({"chat_template": "chatml"}, "`chat_template` 'chatml'"),
    "tokens of another model": ({"tokenizer_source": "c"}, "'c' is none of the models"),
    "modules": ({"modules": {"text": {}}}, "`modules` assembles"),
    "dare without scale": ({"merge_method": "dare_ties", "parameters": {"rescale": False}}, "always scales"),
    "slerp of the base": ({"merge_method": "slerp", "base_model": "a", "parameters": {"t": 0.5}}, "--base MODEL"),
    "a text for a number": ({"parameters": {"lambda": "much"}}, "must be a number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_named(case, tmp_path):
    changes, words = REFUSED[case]
    models = [{"model": model, "parameters": {"weight": 1}} for model in "ab"]
    config = {"merge_method": "ties", "base_model": "base", "models": models, **changes}
    path = tmp_path / "kit.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(HfEsmError, match=re.escape(words)) as caught:
        convert_mergekit(path)
    assert str(path) in str(caught.value)


def test_tokens_models_and_dtype_are_converted(tmp_path):
    path = tmp_path / "kit.yml"
    path.write_text(
        """
merge_method: della
base_model: {model: {path: org/base, revision: v1}}
slices:
  - sources:
      - {model: org/chat@main, layer_range: [0, 16], parameters: {weight: 1, density: 0.8}}
      - {model: org/base+org/lora, layer_range: [0, 16], parameters: {weight: 0.5, density: 0.8}}
parameters: {epsilon: 0.1}
dtype: float32
out_dtype: bfloat16
chat_template: auto
tokenizer:
  source: union
  pad_to_multiple_of: 8
  tokens:
    <|im_end|>: {source: org/chat@main, force: true}
    <pad>: {source: {kind: model_token, model: "org/base+org/lora", token_id: 3}}
"""
    )
    recipe, notes = convert_mergekit(path)
    assert recipe == {
        "base": "org/base@v1",
        "experts": {"chat": "org/chat@main", "lora": "org/lora"},
        "method": {"name": "della", "density": 0.8, "epsilon": 0.2, "normalize": "weights"},
        "alpha": 1.0,
        "weights": {"lora": 0.5},
        "overrides": [{"kind": "embedding", "method": recipe["method"], "alpha": 1.0}],
        "tokenizer": {
            "source": "union",
            "pad_to_multiple_of": 8,
            "tokens": {
                "<|im_end|>": {"source": "chat", "force": True},
                "<pad>": {"source": {"kind": "model_token", "model": "lora", "token_id": 3}},
            },
        },
        "dtype": "bfloat16",
    }
    assert [note.partition(":")[0] for note in notes[:1]] == ["slices"] and any("chat_template" in n for n in notes)


def test_a_recipe_of_mergekit_given_by_mistake_says_so_and_is_converted_on_the_command_line(models, tmp_path, capsys):
    path, _, _ = kit_recipe(models, "ties", tmp_path)
    assert main(["merge", str(path)]) == 2
    said = capsys.readouterr().err
    assert f"is a recipe of mergekit. Convert it: `hf-esm convert {path}`" in said
    assert main(said.strip().rpartition("`hf-esm ")[2].rstrip("`.").split()) == 0
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out)["method"]["name"] == "ties" and "note: int8_mask" in printed.err
    written = tmp_path / "recipe.yaml"
    assert main(["convert", str(path), "--output", str(written)]) == 0
    assert main(["convert", str(path), "--output", str(written)]) == 2
    assert main(["merge", str(written), "--output-dir", str(tmp_path / "merged")]) == 0
