"""Live PEFT models as experts and as wrappers of the base, adapters without a base, and the classes of adapters."""

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from peft import LoraConfig, PeftModel

from hf_esm import HfEsmError, calibrate, compare, merge_models
from hf_esm.checkpoints import open_checkpoint, resolve_source
from hf_esm.planning import load_recipe
from support.helpers import Architecture, perturbed, save, stored_tensors, text_samples, train
from support.problems import relative_error
from support.tiny import BERT, LLAMA


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def base(folder):
    return save(LLAMA.build(), folder / "base")


def adapted(base: str, seed: int = 3, **settings: Any) -> PeftModel:
    return train(transformers.AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA | settings), seed)


def same(one, other) -> None:
    one, other = stored_tensors(one), stored_tensors(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("config", [LoraConfig(**LORA), peft.IA3Config(task_type="CAUSAL_LM")], ids=["lora", "ia3"])
def test_a_live_adapter_is_merged_as_its_folder_is(config, base, tmp_path):
    live = train(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    live.save_pretrained(tmp_path / "adapter")
    before = copy.deepcopy(live.state_dict())
    arguments = {"method": "mean", "progress": False}
    result = merge_models(base, {"t": live}, output_dir=tmp_path / "live", **arguments)
    merge_models(base, {"t": tmp_path / "adapter"}, output_dir=tmp_path / "folder", **arguments)
    same(tmp_path / "live", tmp_path / "folder")
    assert "live model" in str(result.plan) and "adapter" in str(result.plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in live.state_dict().items())
    samples = text_samples(1)
    found, expected = (
        calibrate(expert, samples, base=base, progress=False) for expert in (live, str(tmp_path / "adapter"))
    )
    assert all(torch.equal(entry.mean, expected.entries[name].mean) for name, entry in found.entries.items())


def test_a_live_model_with_several_active_adapters_is_refused(base):
    live = adapted(base)
    live.add_adapter("other", LoraConfig(**LORA))
    live.base_model.set_adapter(["default", "other"])
    with pytest.raises(HfEsmError, match=r"expert 't' .*2 active adapters \(default, other\).*set_adapter"):
        merge_models(base, {"t": live}, method="mean", dry_run=True)
    live.set_adapter("other")
    assert merge_models(base, {"t": live}, method="mean", dry_run=True).experts["t"].kind == "LoRA adapter"


@pytest.mark.parametrize(
    "settings",
    [{}, {"modules_to_save": ["lm_head", "norm"]}, {"trainable_token_indices": [5]}, {"bias": "all"}],
    ids=["plain", "saved-modules", "rows", "biases"],
)
def test_the_base_inside_a_live_peft_model_is_the_base(settings, base, tmp_path):
    wrapper = adapted(base, **settings)
    expert = save(perturbed(LLAMA.build(), 0.1, 1), tmp_path / "expert")
    arguments = {"experts": {"t": expert, "u": wrapper}, "method": "mean", "progress": False}
    merge_models(wrapper, output_dir=tmp_path / "wrapped", **arguments)
    merge_models(base, output_dir=tmp_path / "plain", **arguments)
    same(tmp_path / "wrapped", tmp_path / "plain")
    opened = open_checkpoint(resolve_source(wrapper, "base"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in opened.load_model().state_dict().items())


def test_a_wrapper_with_its_adapter_merged_in_is_no_base(base):
    wrapper = adapted(base)
    wrapper.merge_adapter()
    with pytest.raises(HfEsmError, match=r"base .*merged into its weights.*unmerge_adapter"):
        merge_models(wrapper, {"t": base}, method="mean", dry_run=True)
    wrapper.unmerge_adapter()
    assert open_checkpoint(resolve_source(wrapper, "base")).names


def test_a_base_that_all_adapters_name_may_be_left_out(base, folder, tmp_path):
    for task, seed in (("a", 1), ("b", 2)):
        adapted(base, seed).save_pretrained(tmp_path / task)
    experts = {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")}
    arguments = {"method": "mean", "progress": False}
    merge_models(None, experts, output_dir=tmp_path / "out", **arguments)
    merge_models(base, experts, output_dir=tmp_path / "named", **arguments)
    same(tmp_path / "out", tmp_path / "named")
    assert yaml.safe_load((tmp_path / "out" / "merge_recipe.yaml").read_text())["base"] == base
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"experts": experts, "method": "mean"}))
    plan = merge_models(**load_recipe(tmp_path / "recipe.yaml"), dry_run=True)
    assert plan.base.source == base
    samples = text_samples(1)
    found, expected = (calibrate(experts["a"], samples, base=named, progress=False) for named in (None, base))
    assert all(torch.equal(entry.mean, expected.entries[name].mean) for name, entry in found.entries.items())
    assert found.pooled.keys() == expected.pooled.keys() and found.pooled
    rows = {task: [{"input_ids": row["input_ids"].tolist()} for row in samples] for task in experts}
    settings = {"test": rows, "metric": "perplexity", "methods": ["mean"], "progress": False}
    without, with_base = (
        compare(named, experts, output_dir=tmp_path / f"report-{bool(named)}", **settings) for named in (None, base)
    )
    assert without.experts == with_base.experts


def test_a_base_is_asked_for_where_the_adapters_do_not_agree_on_one(base, tmp_path):
    other = save(perturbed(LLAMA.build(), 0.1, 5), tmp_path / "other")
    for task, named in (("a", base), ("b", other)):
        adapted(named).save_pretrained(tmp_path / task)
    nameless = adapted(base)
    nameless.peft_config["default"].base_model_name_or_path = ""
    for experts, says in (
        ({"a": tmp_path / "a", "b": tmp_path / "b"}, ["expert 'a'", f"names {base}", "expert 'b'", f"names {other}"]),
        ({"a": base}, ["No expert is an adapter"]),
        ({"a": nameless}, ["names no base"]),
    ):
        with pytest.raises(HfEsmError) as refusal:
            merge_models(None, experts, method="mean", dry_run=True)
        assert all(part in str(refusal.value) for part in [*says, "Pass `base`"])


TEXT = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {k: v for k, v in TEXT.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 8}
LLAVA = Architecture(
    "LlavaForConditionalGeneration",
    {
        "text_config": TEXT | {"model_type": "llama", "num_key_value_heads": 2},
        "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
        "image_token_index": 59,
        "vision_feature_layer": -1,
    },
)
WHISPER = Architecture(
    "WhisperForConditionalGeneration",
    {
        **{"vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
        **{"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8},
        **{"max_source_positions": 20, "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1},
        **{"eos_token_id": 2, "decoder_start_token_id": 1, "begin_suppress_tokens": None},
    },
)
CLIP = Architecture(
    "CLIPModel",
    {
        "text_config": TEXT | {"max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1},
        "vision_config": VISION,
        "projection_dim": 16,
    },
)
CLASSES = {  # the base, the class that the adapter is trained on, its task type, and what it adapts
    "vision-language": (LLAVA, None, "CAUSAL_LM", r".*language_model.*q_proj"),
    "vision-tower": (LLAVA, None, "CAUSAL_LM", r".*vision_tower.*q_proj"),
    "speech": (WHISPER, None, "SEQ_2_SEQ_LM", ["q_proj", "v_proj"]),
    "one-tower": (CLIP, "CLIPVisionModelWithProjection", "FEATURE_EXTRACTION", ["q_proj", "v_proj"]),
    "no-class": (BERT, "BertModel", "QUESTION_ANS", ["query"]),
}


@pytest.mark.parametrize("case", CLASSES)
def test_an_adapter_whose_task_type_is_of_no_class_of_the_base_is_one_of_the_bases_class(case, tmp_path):
    architecture, trained_on, task_type, modules = CLASSES[case]
    whole = architecture.build("BertModel" if case == "no-class" else None)
    base, part = save(whole, tmp_path / "base"), whole
    if trained_on and case != "no-class":
        config = copy.deepcopy(whole.config.vision_config)
        config.projection_dim = whole.config.projection_dim
        part = getattr(transformers, trained_on)(config)
        part.load_state_dict({name: whole.state_dict()[name] for name in part.state_dict()})
    adapter = train(copy.deepcopy(part), LoraConfig(r=4, task_type=task_type, target_modules=modules))
    adapter.save_pretrained(tmp_path / "adapter")
    expected = whole.state_dict() | adapter.merge_and_unload().state_dict()
    assert any(not torch.equal(expected[name], tensor) for name, tensor in whole.state_dict().items())
    merge_models(base, {"t": tmp_path / "adapter"}, method="mean", output_dir=tmp_path / "out", progress=False)
    merged = type(whole).from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in merged.items():
        assert relative_error(tensor, expected[name]) < 1e-6, name
