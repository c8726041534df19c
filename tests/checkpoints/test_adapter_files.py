"""Adapters whose files are wrong: refused in one sentence that names the cause, however many of their keys are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_esm import HfEsmError
from hf_esm.checkpoints import open_checkpoint, resolve_source
from support.helpers import save, train
from support.tiny import LLAMA


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # PEFT, on what it finds in these files

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, and a LoRA adapter of all of its linear maps."""
    folder = tmp_path_factory.mktemp("models")
    save(LLAMA.build(num_hidden_layers=6), folder / "base")
    adapted(folder, target_modules="all-linear").save_pretrained(folder / "lora")
    return folder


def adapted(folder: Path, rows: int = 60, **settings: Any) -> PeftModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model.resize_token_embeddings(rows, mean_resizing=False)
    return train(model, LoraConfig(r=4, task_type="CAUSAL_LM", **settings))


def refusal(folder: Path, adapter: Path) -> str:
    """The message about an adapter, which is one sentence of a readable length, and a remedy."""
    base = open_checkpoint(resolve_source(folder / "base", "base"))
    with pytest.raises(HfEsmError) as caught:
        open_checkpoint(resolve_source(adapter, "expert 't'"), base)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("expert 't'")
    assert len(message.replace(str(folder), "")) < 700
    return message.replace(str(folder), "")


def with_tensors(folder: Path, output: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    shutil.copytree(folder / "lora", output)
    save_file(change(load_file(output / WEIGHTS)), output / WEIGHTS, {"format": "pt"})
    return output


def with_settings(folder: Path, output: Path, **changes: Any) -> Path:
    shutil.copytree(folder / "lora", output)
    settings = json.loads((output / SETTINGS).read_text())
    (output / SETTINGS).write_text(json.dumps(settings | changes))
    return output


def renamed(old: str, new: str) -> Callable:
    return lambda tensors: {key.replace(old, new, 1): tensor for key, tensor in tensors.items()}


PREFIX = "base_model.model."
UNWRAP = "accelerator.unwrap_model(model, keep_torch_compile=False).save_pretrained(folder)"
TENSORS: dict[str, tuple[Callable, list[str]]] = {
    "all empty": (lambda t: {k: v[:0] for k, v in t.items()}, ["84 of the 84 tensors", "ZeRO-3", "get_state_dict"]),
    "one empty": (lambda t: {k: v[: len(v) * (i > 0)] for i, (k, v) in enumerate(t.items())}, ["1 of the 84 tensors"]),
    "data parallel": (renamed("", "module."), ["'module.base_model", "and 81 more", "'module' of a wrapped", UNWRAP]),
    "compiled": (renamed("", "_orig_mod."), ["'_orig_mod' of a wrapped", UNWRAP]),
    "compiled inside": (renamed(PREFIX, f"{PREFIX}_orig_mod."), ["'_orig_mod' of a wrapped", UNWRAP]),
    "sharded": (renamed("layers.3.", "layers.3._fsdp_wrapped_module."), ["'_fsdp_wrapped_module' of a", UNWRAP]),
    "recomputed": (renamed("self_attn.", "_checkpoint_wrapped_module.self_attn."), ["_checkpoint_wrapped_module"]),
    "bare": (renamed(PREFIX, ""), ["PEFT writes 'base_model.model.' once", "of one PeftModel"]),
    "twice": (renamed("", PREFIX), ["PEFT writes 'base_model.model.' once", "of one PeftModel"]),
    "other names": (renamed("layers.", "blocks."), ["no place for", "and 81 more", "trained on another base"]),
    "whole numbers": (lambda t: {k: v.int() for k, v in t.items()}, ["stored as int32, which no weight is", "again"]),
    "truth values": (lambda t: {k: v.bool() for k, v in t.items()}, ["stored as bool, which no weight is", "again"]),
    "nothing": (lambda t: {}, ["holds no tensors", UNWRAP]),
    "half of the layers": (lambda t: {k: v for k, v in t.items() if "layers.0" not in k}, ["lacks", "and 11 more"]),
    "other widths": (
        lambda t: {k: v.repeat(1, 2) for k, v in t.items()},
        ["lora_A.default.weight' is [4, 32] in its file, [4, 16] on the base, and 83 more", "another base"],
    ),
}


@pytest.mark.parametrize(("change", "says"), TENSORS.values(), ids=TENSORS)
def test_what_is_wrong_with_many_tensors_is_one_sentence(change, says, folder, tmp_path):
    message = refusal(folder, with_tensors(folder, tmp_path / "adapter", change))
    assert all(part in message for part in says), message


VALUES: dict[str, Any] = {
    "r": "8",
    "lora_alpha": None,
    "target_modules": "([",
    "rank_pattern": [1],
    "layers_to_transform": "x",
    "lora_dropout": "x",
    "task_type": "FOO",
    "peft_type": None,
    "base_model_name_or_path": 5,
    "revision": 5,
}


@pytest.mark.parametrize("name", VALUES)
def test_settings_that_peft_cannot_use_are_one_sentence(name, folder, tmp_path):
    assert SETTINGS in refusal(folder, with_settings(folder, tmp_path / "adapter", **{name: VALUES[name]}))


@pytest.mark.parametrize("content", ["[]", "null", '"x"', "{}", '{"peft_type": "LORA", "r": '])
def test_settings_that_are_none_are_one_sentence(content, folder, tmp_path):
    adapter = with_settings(folder, tmp_path / "adapter")
    (adapter / SETTINGS).write_text(content)
    refusal(folder, adapter)


RESIZED = {"embed_tokens": {"target_modules": ["embed_tokens"]}, "lm_head": {"target_modules": ["lm_head"]}}


@pytest.mark.parametrize("stores", [True, False], ids=["stored", "not stored"])
@pytest.mark.parametrize("module", RESIZED)
def test_an_adapter_of_a_resized_vocabulary_goes_over_the_resized_base(module, stores, folder, tmp_path):
    model = adapted(folder, 62, **RESIZED[module])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=stores)
    says = "for the 62 tokens that the adapter was trained with" if stores else "another vocabulary than that of base"
    message = refusal(folder, tmp_path / "adapter")
    assert says in message and "Give as base the checkpoint" in message
    resized = model.unload()  # the remedy
    base = open_checkpoint(resolve_source(save(resized, tmp_path / "resized"), "base"))
    assert open_checkpoint(resolve_source(tmp_path / "adapter", "t"), base).shape("embed_tokens.weight") == (62, 16)


def test_the_weights_of_a_wrapped_model_are_saved_by_unwrapping_it(folder, tmp_path):
    model = adapted(folder, target_modules=["q_proj"])
    wrapped = torch.compile(model)
    model.save_pretrained(tmp_path / "wrapped", state_dict=wrapped.state_dict())
    assert UNWRAP in refusal(folder, tmp_path / "wrapped")
    accelerator = Accelerator(cpu=True)
    accelerator.unwrap_model(wrapped, keep_torch_compile=False).save_pretrained(tmp_path / "remedied")
    gathered = accelerator.get_state_dict(accelerator.prepare_model(model, evaluation_mode=True))
    model.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    base = open_checkpoint(resolve_source(folder / "base", "base"))
    for name in ("remedied", "gathered"):
        found = open_checkpoint(resolve_source(tmp_path / name, "t"), base)
        weight = "layers.0.self_attn.q_proj.weight"
        expected = model.get_submodule(f"{PREFIX}model.layers.0.self_attn.q_proj").get_delta_weight("default")
        assert torch.allclose(found.update(weight, base.tensor(weight)), expected, atol=1e-6)


@pytest.mark.parametrize("kept", ["model", "adapter"])
def test_a_folder_of_a_model_and_an_adapter_is_refused_until_one_of_them_is_taken_away(kept, folder, tmp_path):
    """Transformers puts the adapter on the model in the folder, into which it may have been merged."""
    both = shutil.copytree(folder / "lora", tmp_path / "both")
    shutil.copytree(folder / "base", both, dirs_exist_ok=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(both)
    assert any("lora" in name for name in loaded.state_dict())
    assert "a full model and a PEFT adapter, which Transformers would add" in refusal(folder, both)
    for path in both.glob("adapter_*" if kept == "model" else "model*"):
        path.unlink()
    base = open_checkpoint(resolve_source(folder / "base", "base"))
    found = open_checkpoint(resolve_source(both, "t"), base)
    assert found.kind == ("LlamaForCausalLM" if kept == "model" else "LoRA adapter")
