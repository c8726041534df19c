"""Merges of quantised models: the merge of the weights that Transformers dequantises, written in bfloat16."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_esm import RoutedModel, calibrate, merge_models
from support.helpers import perturbed, save, text_samples
from support.problems import relative_error
from support.quantised import EVERY_KIND, KINDS


merge = partial(merge_models, progress=False)
ROUNDING = 2**-8  # of bfloat16


@pytest.fixture(scope="module", params=EVERY_KIND)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def models(kind, tmp_path_factory):
    """A quantised base and expert, and another expert as it was trained."""
    folder, model = tmp_path_factory.mktemp("models"), kind.architecture.build()
    base, law = (kind.save(m, folder / name) for m, name in ((model, "base"), (perturbed(model, 0.1, 1), "law")))
    code = perturbed(kind.architecture.build(), 0.1, 2)
    return {"base": base, "law": law, "code": save(code, folder / "code")}


def stored(folder):
    return load_file(Path(folder) / "model.safetensors")


def live(folder, kind, **options):
    cls = getattr(transformers, kind.architecture.model_class)
    return cls.from_pretrained(folder, **options)


def dense_copy(kind, quantised, folder):
    """A folder with the weights that Transformers dequantises, in bfloat16."""
    model = kind.architecture.build()
    model.load_state_dict({name: weight.float() for name, weight in kind.weights(quantised).items()})
    return save(model.to(torch.bfloat16), folder)


def test_the_merge_is_that_of_the_dequantised_weights(kind, models, tmp_path):
    result = merge(
        models["base"],
        {"law": models["law"], "code": models["code"]},
        method="task-arithmetic",
        alpha=0.5,
        output_dir=tmp_path / "merged",
    )
    assert f"  quantised  base ({kind.named}), law ({kind.named}): read as bfloat16\n" in str(result.plan)
    base, law = kind.weights(models["base"]), kind.weights(models["law"])
    code = live(models["code"], kind).state_dict()
    merged = live(tmp_path / "merged", kind)
    assert merged.dtype == torch.bfloat16
    changed = 0
    for name, weight in merged.state_dict().items():
        one, two, three = (state[name].double() for state in (base, law, code))
        expected = one + 0.5 * (two - one) + 0.5 * (three - one)
        assert (weight.double() - expected).abs().max() <= ROUNDING * expected.abs().max(), name
        changed += not torch.equal(weight, base[name])
    assert changed == len(base)
    assert {tensor.dtype for tensor in stored(tmp_path / "merged").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert merged(torch.tensor([[4, 5, 6]])).logits.isfinite().all()


def test_dtype_decides_what_is_written_and_a_plain_base_keeps_its_own(kind, models, tmp_path):
    options = {"method": "mean", "alpha": 1.0}
    merge(models["base"], {"law": models["law"]}, dtype="float32", output_dir=tmp_path / "wide", **options)
    assert {tensor.dtype for tensor in stored(tmp_path / "wide").values()} == {torch.float32}
    assert live(tmp_path / "wide", kind).dtype == torch.float32
    merge(models["code"], {"law": models["law"]}, output_dir=tmp_path / "plain", **options)
    law = kind.weights(models["law"])
    for name, weight in live(tmp_path / "plain", kind).state_dict().items():
        assert weight.dtype == torch.float32
        assert relative_error(weight, law[name].float()) < 1e-6, name


def test_statistics_are_those_of_the_dequantised_model(kind, models, tmp_path):
    dense = live(dense_copy(kind, models["law"], tmp_path / "dense"), kind).eval()
    samples, options = text_samples(3), {"progress": False, "num_samples": 0}
    expected = calibrate(dense, samples, **options)
    for max_memory in (None, 4000):  # in memory, and from a copy on disk
        found = calibrate(models["law"], samples, max_memory=max_memory, **options)
        assert found.entries.keys() == expected.entries.keys()
        for name, entry in found.entries.items():
            assert torch.equal(entry.mean, expected.entries[name].mean), name


def save_adapter(kind, base, folder):
    """Save a LoRA adapter with noise for factors, trained over this base."""
    torch.manual_seed(5)
    turned = kind.architecture.model_class == "GPT2LMHeadModel"
    targets = ["c_attn"] if turned else ["q_proj", "v_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, fan_in_fan_out=turned)
    adapted = get_peft_model(live(base, kind), config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.cases(10)
@pytest.mark.parametrize("method", ["mean", "regmean"])
def test_with_a_lora_adapter_the_merge_is_that_of_the_dequantised_folders(method, kind, models, tmp_path):
    dense = {name: dense_copy(kind, models[name], tmp_path / name) for name in ("base", "law")}
    lora = save_adapter(kind, dense["base"], tmp_path / "lora")
    calibration = {"lora": text_samples(1), "law": text_samples(2)} if method == "regmean" else None
    for name, given in {"quantised": models, "dense": dense}.items():
        merge(
            given["base"],
            {"lora": lora, "law": given["law"]},
            method=method,
            alpha=1.0,
            calibration=calibration,
            output_dir=tmp_path / "merged" / name,
        )
    found, expected = (stored(tmp_path / "merged" / name) for name in ("quantised", "dense"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    changed = [key for key, weight in found.items() if not torch.equal(weight, stored(dense["base"])[key])]
    assert len(changed) > len(found) / 2


def test_a_lora_adapter_alone_gives_what_peft_merges_into_the_dequantised_base(kind, models, tmp_path):
    dense = dense_copy(kind, models["base"], tmp_path / "base")
    lora = save_adapter(kind, dense, tmp_path / "lora")
    merge(models["base"], {"lora": lora}, method="mean", alpha=1.0, output_dir=tmp_path / "merged")
    expected = PeftModel.from_pretrained(live(dense, kind, dtype=torch.float32), lora).merge_and_unload().state_dict()
    for name, weight in live(tmp_path / "merged", kind).state_dict().items():
        assert torch.equal(weight, expected[name].to(torch.bfloat16)), name


def test_a_routed_merge_of_quantised_models_is_routed(tmp_path):
    kind = KINDS["fp8"]
    model = kind.architecture.build()
    base, law, code = (
        kind.save(m, tmp_path / name)
        for name, m in {"base": model, "law": perturbed(model, 0.1, 1), "code": perturbed(model, 0.1, 2)}.items()
    )
    merge(
        base,
        {"law": law, "code": code},
        method="esm++",
        rank=4,
        calibration={"law": text_samples(1), "code": text_samples(2)},
        output_dir=tmp_path / "merged",
    )
    routed = RoutedModel.from_pretrained(tmp_path / "merged")
    assert {weight.dtype for name, weight in stored(tmp_path / "merged").items()} == {torch.bfloat16}
    assert routed.tasks == ["law", "code"]
    assert routed(torch.tensor([[4, 5, 6]])).logits.isfinite().all()


def test_tensors_that_a_quantised_base_has_no_place_for_are_named_and_left_out(tmp_path):
    kind = KINDS["fp8"]
    base = kind.save(kind.architecture.build(), tmp_path / "base")
    tensors = {**stored(base), "model.layers.9.q_proj.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}
    save_file(tensors, base / "model.safetensors")
    law = save(perturbed(kind.architecture.build(), 0.1, 2), tmp_path / "law")
    result = merge(base, {"law": law}, method="mean", output_dir=tmp_path / "merged")
    assert any("left out: 'model.layers.9.q_proj.weight'" in warning for warning in result.plan.warnings)
    assert "model.layers.9.q_proj.weight" not in stored(tmp_path / "merged")
