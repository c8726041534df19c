"""Every type of adapter that PEFT has: merged as PEFT merges it, or refused in a sentence."""

from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftModel, PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import PreTrainedModel

import hf_esm.tuners  # noqa: F401 (puts our own types into PEFT's mapping)
from hf_esm import HfEsmError, calibrate, merge_models
from hf_esm.checkpoints import open_checkpoint, resolve_source
from hf_esm.checkpoints.adapter_layers import ADDED_TYPES
from support.helpers import save, stored_tensors, text_samples, train
from support.problems import relative_error
from support.tiny import LLAMA


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # PEFT warns of its own types

# Settings of types that take none of the others' or need smaller ones; a new type of PEFT is tried without any.
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10},
    "ADAMSS": {"r": 4, "num_subspaces": 2},  # of more, PEFT clusters rounding errors, each time otherwise
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "target_modules": None},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "ESSENTIAL_COMPONENTS": {"r": 4, "gates": True, "tasks": ["a", "b"]},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "ROUTED_EXPERTS": {"tasks": ["a", "b"], "r": 2, "router": "static"},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6], "target_modules": ["embed_tokens"]},
    "VBLORA": {"num_vectors": 8, "vector_length": 4, "topk": 2},
    "WAVEFT": {"n_frequency": 20},
    "XLORA": {"adapters": {}, "target_modules": None},
}
LEAVE_OUT = "Leave it out"
REFUSED = {
    "ADAPTION_PROMPT": ["changes no weight", LEAVE_OUT],
    "BEFT": ["has no bias", LEAVE_OUT],
    "FROD": ["all weights of the base at once", "merge_and_unload()"],
    "LILY": ["not supported for Lily", LEAVE_OUT],
    "POLY": [LEAVE_OUT],
    "ROUTED_EXPERTS": ["the experts of all tasks", "task: a"],
    "SHADOW": ["not a static weight-space delta", LEAVE_OUT],
    "XLORA": [LEAVE_OUT],
}
TYPES = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(LLAMA.build(), tmp_path_factory.mktemp("types") / "base")


def adapter_of(kind: str, base: str, folder, **settings: Any) -> str:
    """An adapter of one type over the base, in a folder."""
    config = TYPES[kind]
    arguments: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if issubclass(config, PromptLearningConfig):
        arguments["num_virtual_tokens"] = 4
    else:
        arguments["target_modules"] = ["q_proj", "v_proj"]
    arguments |= SETTINGS.get(kind, {}) | settings
    config = config(**{name: value for name, value in arguments.items() if value is not None})
    if kind == "XLORA":  # PEFT would load its LoRA adapters first
        config.save_pretrained(folder)
        (folder / "adapter_model.safetensors").write_bytes(b"")
    else:
        train(transformers.AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return str(folder)


def unloaded(base: str, adapter: str) -> dict[str, torch.Tensor]:
    """The weights that PEFT makes of the base and an adapter."""
    model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)
    return model.merge_and_unload(safe_merge=True).state_dict()


@pytest.mark.cases(20)
@pytest.mark.parametrize("kind", TYPES)
def test_a_type_is_merged_as_peft_merges_it_or_refused_in_a_sentence(kind, base, tmp_path):
    adapter = adapter_of(kind, base, tmp_path / "adapter")
    prompt = issubclass(TYPES[kind], PromptLearningConfig)
    arguments = {"method": "mean", "output_dir": tmp_path / "out", "progress": False}
    if kind in REFUSED or prompt:
        with pytest.raises(HfEsmError) as refusal:
            merge_models(base, {"t": adapter}, **arguments)
        for part in ["expert 't'", *(["changes no weight", LEAVE_OUT] if prompt else REFUSED[kind])]:
            assert part in str(refusal.value)
        assert not (tmp_path / "out").exists()
        return
    merge_models(base, {"t": adapter}, **arguments)
    merged, expected, before = stored_tensors(tmp_path / "out"), unloaded(base, adapter), stored_tensors(base)
    assert merged.keys() == before.keys()
    assert any(not torch.equal(expected[name], before[name]) for name in before)
    for name, weight in merged.items():
        assert relative_error(weight, expected[name]) < 1e-6, name
    opened = open_checkpoint(resolve_source(base, "base"))
    update_of = open_checkpoint(resolve_source(adapter, "t"), opened)
    for name in opened.names:
        weight = opened.tensor(name)
        update, difference = update_of.update(name, weight), expected[opened.names[name]] - weight
        assert torch.equal(update, update_of.update(name, weight)), f"{name}: a second merge gives another update"
        assert (update - difference).norm() <= 1e-6 * expected[opened.names[name]].norm(), name
        assert update_of.changes(name) or not difference.any(), name
    assert all(parameter.is_meta for parameter in update_of.skeleton.parameters())


@pytest.mark.parametrize("kind", sorted(TYPES.keys() - REFUSED.keys() - {"LORA", "LN_TUNING", "TRAINABLE_TOKENS"}))
def test_the_types_whose_merge_adds_their_delta_are_those_that_are_read_so(kind, base, tmp_path):
    if issubclass(TYPES[kind], PromptLearningConfig):
        return
    model = PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), adapter_of(kind, base, tmp_path / "adapter")
    )
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer))
    weight = layer.get_base_layer().weight.detach().clone()
    try:
        delta = layer.get_delta_weight("default").detach()
        layer.merge(adapter_names=["default"])
        adds = delta.shape == weight.shape and torch.equal(layer.get_base_layer().weight, weight + delta)
    except (AttributeError, TypeError):  # has no such method, or one of another kind
        adds = False
    assert adds == (kind in ADDED_TYPES)


@pytest.mark.parametrize("kind", ["IA3", "VERA", "PSOFT", "TRAINABLE_TOKENS", "ESSENTIAL_COMPONENTS"])
def test_statistics_are_those_of_the_model_that_peft_makes(kind, base, tmp_path):
    adapter = adapter_of(kind, base, tmp_path / "adapter")
    model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)
    samples, settings = text_samples(1), {"progress": False, "batch_size": 1}
    found = calibrate(adapter, samples, base=base, **settings)
    full = save(model.merge_and_unload(), tmp_path / "full")
    expected = calibrate(full, samples, **settings)
    assert found.entries.keys() == expected.entries.keys()
    for name, entry in expected.entries.items():
        assert relative_error(found.entries[name].mean, entry.mean) < 1e-5, name
    merged, literal = (
        merge_models(base, {"t": expert}, calibration={"t": samples}, method="esm", progress=False)
        for expert in (adapter, full)
    )
    before, literal = stored_tensors(base), stored_tensors(literal.output_dir)
    for name, weight in stored_tensors(merged.output_dir).items():
        assert relative_error(weight - before[name], literal[name] - before[name]) < 1e-4, name


VARIANTS = {
    "monteclora": ({"monteclora_config": peft.tuners.lora.config.MontecloraConfig()}, []),
    "bdlora": ({"use_bdlora": peft.tuners.lora.config.BdLoraConfig(["q_proj"], ["v_proj"], 2)}, []),
    "mica": ({"init_lora_weights": "mica"}, []),
    "kasa": ({"kasa_config": peft.tuners.lora.config.KasaConfig()}, ["changes the base's own weights", "unload()"]),
    "quantisation-aware": ({"use_qalora": True, "qalora_group_size": 4}, []),
    "activated": ({"alora_invocation_tokens": [3]}, ["aLoRA does not support", LEAVE_OUT]),
}


@pytest.mark.parametrize(("settings", "says"), VARIANTS.values(), ids=VARIANTS)
def test_a_variant_of_lora_is_merged_as_peft_merges_it_or_refused(settings, says, base, tmp_path):
    adapter = adapter_of("LORA", base, tmp_path / "adapter", r=4, **settings)
    opened = open_checkpoint(resolve_source(base, "base"))
    if says:
        with pytest.raises(HfEsmError) as refusal:
            open_checkpoint(resolve_source(adapter, "t"), opened)
        assert all(part in str(refusal.value) for part in says)
        return
    found, expected = open_checkpoint(resolve_source(adapter, "t"), opened), unloaded(base, adapter)
    for name in found.names:
        assert relative_error(found.tensor(name), expected[found.names[name]]) < 1e-6, name


def grown(model: PreTrainedModel) -> PreTrainedModel:
    """The model with two rows more in its embeddings."""
    model.resize_token_embeddings(model.config.vocab_size + 2, mean_resizing=False)
    return model


ROWS = {  # settings of LoRA, whether the vocabulary grew, and the rows that the adapter trains by themselves
    "rows": ({"trainable_token_indices": [5, 6]}, False, [5, 6]),
    "rows-of-both": ({"trainable_token_indices": {"embed_tokens": [5], "lm_head": [7]}}, False, [5]),
    "new-rows": ({"trainable_token_indices": [60, 61]}, True, [60, 61]),
    "resized": ({}, True, None),
    "resized-and-saved": ({"modules_to_save": ["embed_tokens", "lm_head"]}, True, None),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", ROWS)
def test_rows_of_embeddings_are_read_as_the_adapter_has_them(case, tied, tmp_path):
    settings, grows, rows = ROWS[case]
    if tied and case in ("rows-of-both", "resized-and-saved"):
        pytest.skip("the head is untied: see test_tied_weights")
    base = save(LLAMA.build(tie_word_embeddings=tied), tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], **settings)
    adapted = train(grown(model) if grows else model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    opened = open_checkpoint(resolve_source(base, "base"))
    found = open_checkpoint(resolve_source(tmp_path / "adapter", "t"), opened)
    expected = adapted.merge_and_unload().state_dict()
    for name, live in found.names.items():
        assert found.shape(name) == expected[live].shape
        assert relative_error(found.tensor(name), expected[live]) < 1e-6, name
    for live, tensor in found.load_model().state_dict().items():
        assert relative_error(tensor, expected[live]) < 1e-6, live
    of_tokens = found.token_rows("embed_tokens.weight")
    assert (of_tokens and of_tokens[0]) == rows
    if rows:
        assert torch.equal(of_tokens[1], expected["model.embed_tokens.weight"][rows])
    merge_models(base, {"t": tmp_path / "adapter"}, method="mean", output_dir=tmp_path / "merged", progress=False)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for live, tensor in expected.items():
        assert relative_error(merged[live], tensor) < 1e-6, live


def test_rows_that_the_base_lacks_and_the_adapter_does_not_store_are_refused(base, tmp_path):
    model = grown(transformers.AutoModelForCausalLM.from_pretrained(base))
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[61])
    train(model, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(HfEsmError, match="row of token 61, but the base has 60 rows"):
        open_checkpoint(resolve_source(tmp_path / "adapter", "t"), open_checkpoint(resolve_source(base, "base")))


def test_an_adapter_is_planned_without_a_weight_of_the_base(base, tmp_path, monkeypatch):
    """Also one that PEFT makes out of these weights."""
    adapter = adapter_of("PSOFT", base, tmp_path / "adapter")
    opened = open_checkpoint(resolve_source(base, "base"))
    monkeypatch.setattr(type(opened), "tensor", lambda *args: pytest.fail("a weight was read"))
    found = open_checkpoint(resolve_source(adapter, "t"), opened, headers_only=True)
    assert {name for name in found.names if found.changes(name)} == {
        name for name in found.names if "q_proj" in name or "v_proj" in name
    }


def test_only_one_layer_of_the_base_is_in_memory_while_an_adapter_is_made(base, tmp_path, monkeypatch):
    adapter = adapter_of("PSOFT", base, tmp_path / "adapter")
    opened = open_checkpoint(resolve_source(base, "base"))
    read = type(opened).tensor
    asked = []
    monkeypatch.setattr(type(opened), "tensor", lambda self, name: asked.append(name) or read(self, name))
    found = open_checkpoint(resolve_source(adapter, "t"), opened)
    assert sorted(asked) == sorted(name for name in found.names if found.changes(name))  # each once, no other


def test_a_prompt_that_was_left_out_goes_on_the_merged_model(base, tmp_path):
    prompt, lora = (adapter_of(kind, base, tmp_path / kind) for kind in ("PROMPT_TUNING", "LORA"))
    merge_models(base, {"t": lora}, method="mean", output_dir=tmp_path / "out", progress=False)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert PeftModel.from_pretrained(merged, prompt)(torch.tensor([[3, 4]])).logits.isfinite().all()
