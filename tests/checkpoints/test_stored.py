"""Files as trainers and other tools leave them: names of wrapped models, and an index without metadata."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_esm import HfEsmError, merge_models
from hf_esm.checkpoints import open_checkpoint, resolve_source
from hf_esm.errors import DamagedFileError
from support.helpers import perturbed, save, stored_tensors, text_samples
from support.tiny import BERT, GPT2, LLAMA


def renamed(folder, change):
    path = folder / "model.safetensors"
    save_file({change(key): tensor for key, tensor in load_file(path).items()}, path, {"format": "pt"})


WRAPPERS = {
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "torch.compile, block by block": lambda key: re.sub(r"(\.\d+)\.", r"\1._orig_mod.", key),
    "data parallel": lambda key: f"module.{key}",
    "data parallel, compiled": lambda key: f"module._orig_mod.{key}",
    "compiled, data parallel": lambda key: f"_orig_mod.module.{key}",
    "FSDP, with checkpointing": lambda key: (
        "_fsdp_wrapped_module." + re.sub(r"(\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.", key)
    ),
    "PEFT": lambda key: f"base_model.model.{key}",
}


@pytest.mark.parametrize("change", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("architecture", [LLAMA, GPT2, BERT], ids=["llama", "gpt2", "bert"])
def test_a_model_that_was_saved_inside_a_wrapper_is_read_as_the_model(architecture, change, tmp_path):
    base = architecture.build()
    for name, model in (("base", base), ("plain", perturbed(base, 0.02, 1)), ("wrapped", perturbed(base, 0.02, 1))):
        save(model, tmp_path / name)
    renamed(tmp_path / "wrapped", change)
    plain, wrapped = (open_checkpoint(resolve_source(tmp_path / name, name)) for name in ("plain", "wrapped"))
    assert wrapped.names == plain.names and not wrapped.missing and wrapped.extra == plain.extra
    assert all(torch.equal(wrapped.tensor(name), plain.tensor(name)) for name in plain.names)
    expected, found = (model.load_model().state_dict() for model in (plain, wrapped))
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("which", ["base", "left"])
def test_a_wrapped_model_is_run_and_merged_as_the_model(which, tmp_path):
    base = LLAMA.build()
    for seed, name in enumerate(("base", "left", "right")):
        save(perturbed(base, 0.02 * seed, seed), tmp_path / name)
    tasks = ("left", "right")
    given = {
        "experts": {task: tmp_path / task for task in tasks},
        "calibration": {task: text_samples(seed) for seed, task in enumerate(tasks)},
        "method": "esm",
        "progress": False,
    }
    merge_models(tmp_path / "base", output_dir=tmp_path / "expected", **given)
    renamed(tmp_path / which, WRAPPERS["torch.compile"])
    merge_models(tmp_path / "base", output_dir=tmp_path / "found", **given)
    expected, found = stored_tensors(tmp_path / "expected"), stored_tensors(tmp_path / "found")
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


REFUSED = {
    "some names alone": (lambda key: key if "norm" in key else f"module.{key}", "and hold 'module."),
    "of another trainer": (lambda key: f"engine.{key}", "and hold 'engine."),
    "compiled, of another trainer": (lambda key: f"engine._orig_mod.{key}", "and hold 'engine._orig_mod."),
    "with LoRA in it": (
        lambda key: "base_model.model." + key.replace("q_proj.", "q_proj.base_layer."),
        "q_proj.base_layer.weight'",
    ),
}


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED)
def test_names_that_are_no_wrappers_are_refused_with_some_of_them(change, says, tmp_path):
    base = LLAMA.build()
    for name, model in (("base", base), ("task", perturbed(base, 0.02, 1))):
        save(model, tmp_path / name)
    renamed(tmp_path / "task", change)
    with pytest.raises(HfEsmError, match=r"expert 'task' .*: its files lack .*, and hold .* instead\. Save") as caught:
        merge_models(tmp_path / "base", {"task": tmp_path / "task"}, method="mean", dry_run=True)
    assert says in str(caught.value) and len(str(caught.value)) < 700 and "\n" not in str(caught.value)


def test_a_name_with_and_without_a_wrapper_is_not_taken_for_one(tmp_path):
    """Nothing tells which of the two is the weight."""
    base = LLAMA.build()
    for name, model in (("base", base), ("task", perturbed(base, 0.02, 1))):
        save(model, tmp_path / name)
    renamed(tmp_path / "task", WRAPPERS["torch.compile"])
    path = tmp_path / "task" / "model.safetensors"
    stored = load_file(path)
    save_file({**stored, "model.norm.weight": 2 * stored["_orig_mod.model.norm.weight"]}, path, {"format": "pt"})
    with pytest.raises(HfEsmError, match=r"expert 'task' .*: its files lack .*, and hold '_orig_mod\."):
        merge_models(tmp_path / "base", {"task": tmp_path / "task"}, method="mean", dry_run=True)


def test_an_index_without_metadata_is_enough(tmp_path):
    model = LLAMA.build()
    model.save_pretrained(tmp_path / "model", max_shard_size="8KB")
    path = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": index["weight_map"]}))
    with pytest.raises(KeyError, match="metadata"):  # if Transformers reads it some day, we need not
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(resolve_source(tmp_path / "model", "model"))
    (tmp_path / "offloaded").mkdir()
    placed = {"device_map": {"": "cpu"}, "offload_folder": str(tmp_path / "offloaded")}
    for options in ({}, placed):
        found = checkpoint.load_model(**options).state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())
    path.unlink()
    with pytest.raises(DamagedFileError, match=r"model .*: .* has \d+ shards without their .*index\.json"):
        open_checkpoint(resolve_source(tmp_path / "model", "model"))
