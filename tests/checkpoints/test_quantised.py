"""Quantised checkpoints: every weight equals the one that Transformers dequantises, read alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_esm import HfEsmError
from hf_esm.checkpoints import open_checkpoint, resolve_source
from hf_esm.checkpoints.stored import TensorFiles
from support.helpers import save
from support.quantised import EVERY_KIND, FP8, INT4, INT8, KINDS, described, rewrite_config
from support.tiny import LLAMA


FILE = "model.safetensors"
ORIGINAL = "Merge the checkpoint that it was quantised from"


def opened(model):
    return open_checkpoint(resolve_source(model, "base"))


def assert_refused(folder, says):
    with pytest.raises(HfEsmError) as caught:
        opened(folder)
    assert all(part in str(caught.value) for part in says), caught.value


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_weight_is_the_one_that_transformers_dequantises(kind, tmp_path):
    folder = kind.save(kind.architecture.build(), tmp_path)
    checkpoint, expected = opened(folder), kind.weights(folder)
    assert checkpoint.quantised == kind.named
    assert not checkpoint.missing and not checkpoint.extra
    assert {checkpoint.names[name] for name in checkpoint.names} <= expected.keys()
    for name, live in checkpoint.names.items():
        weight = checkpoint.tensor(name)
        assert weight.dtype == checkpoint.dtype(name) and weight.shape == checkpoint.shape(name)
        assert torch.equal(weight, expected[live]), live
    model = checkpoint.load_model()
    assert all(torch.equal(weight.to(torch.bfloat16), expected[live]) for live, weight in model.state_dict().items())
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert not hasattr(model.config, "quantization_config")


def test_a_weight_that_transformers_keeps_in_float32_stays_so(tmp_path):
    kind = KINDS["fp8, precise parts"]
    folder = kind.save(kind.architecture.build(), tmp_path)
    checkpoint = opened(folder)
    precise = {name for name in checkpoint.names if "e_score_correction_bias" in name}
    assert precise
    for name in checkpoint.names:
        assert checkpoint.dtype(name) == (torch.float32 if name in precise else torch.bfloat16)
    stored = load_file(folder / FILE)
    assert all(torch.equal(checkpoint.tensor(name), stored[checkpoint.names[name]]) for name in precise)
    assert {
        name for name, weight in checkpoint.load_model().state_dict().items() if weight.dtype == torch.float32
    } == {checkpoint.names[name] for name in precise}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_headers_alone_tell_names_shapes_and_dtypes(kind, tmp_path, monkeypatch):
    folder = kind.save(kind.architecture.build(), tmp_path)
    full = opened(folder)
    files = TensorFiles.open(folder, "base")
    monkeypatch.setattr(TensorFiles, "open", lambda *_: TensorFiles(files.headers, lambda key: pytest.fail(key)))
    checkpoint = opened(folder)
    assert {name: (checkpoint.shape(name), checkpoint.dtype(name)) for name in checkpoint.names} == {
        name: (full.shape(name), full.dtype(name)) for name in full.names
    }
    with pytest.raises(pytest.fail.Exception):
        checkpoint.tensor(next(iter(checkpoint.names)))


@pytest.mark.parametrize("kind", EVERY_KIND[:1] + EVERY_KIND[3:4])
def test_a_model_that_does_not_fit_is_loaded_from_a_dequantised_copy(kind, tmp_path):
    folder = kind.save(kind.architecture.build(), tmp_path)
    checkpoint, expected = opened(folder), kind.weights(folder)
    memory = {"device_map": "auto", "max_memory": {"cpu": 4000}}
    model = checkpoint.load_model(offload_folder=str(tmp_path / "spill"), **memory)
    assert "disk" in model.hf_device_map.values()
    copy = opened(tmp_path / "spill" / "written")
    assert not copy.quantised
    assert all(torch.equal(copy.tensor(name), expected[live]) for name, live in copy.names.items())


@pytest.mark.parametrize("kind", EVERY_KIND[:1])
def test_scales_of_activations_are_left_out_and_other_tensors_are_named(kind, tmp_path):
    folder = kind.save(kind.architecture.build(), tmp_path)
    stored = load_file(folder / FILE)
    scales = {f"model.layers.0.self_attn.{name}": torch.ones(1) for name in ("k_scale", "q_proj.input_scale")}
    stored |= {"model.layers.0.self_attn.q_proj.activation_scale": torch.ones(1), **scales}
    save_file(stored | {"model.layers.9.weight": torch.ones(2)}, folder / FILE)
    checkpoint = opened(folder)
    assert checkpoint.extra == ["model.layers.9.weight"]
    assert checkpoint.extra_tensors() == {}


REFUSED = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, ["(gptq)", ORIGINAL]),
    "awq": ({"quant_method": "awq", "bits": 4}, ["(awq)", ORIGINAL]),
    "hqq": ({"quant_method": "hqq"}, ["(hqq)", ORIGINAL]),
    "torchao": ({"quant_method": "torchao"}, ["(torchao)", ORIGINAL]),
    "nvfp4": ({"quant_method": "nvfp4"}, ["(nvfp4)", ORIGINAL]),
    "unknown": ({"quant_method": "of-tomorrow"}, ["(of-tomorrow)", ORIGINAL]),
    "unnamed": ({"bits": 4}, ["(None)", ORIGINAL]),
    "broken": ({**FP8, "weight_block_size": [8, 8, 8]}, ["config.json", "tuple of two integers", ORIGINAL]),
}


@pytest.mark.parametrize(("settings", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_dequantised_is_refused_by_name(settings, says, tmp_path):
    folder = Path(save(LLAMA.build(), tmp_path / "model"))
    rewrite_config(folder, quantization_config=settings)
    assert_refused(folder, [f"base ({folder})", *says])
    rewrite_config(folder, quantization_config=None)  # the checkpoint that it was quantised from
    assert opened(folder).quantised == ""


COMPRESSED = described("pack-quantized", **INT4)
TWO_WAYS = {**COMPRESSED["config_groups"], "group_1": {"targets": ["re:.*o_proj"], "weights": INT8}}
REFUSED_COMPRESSED = {
    "sparse": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config of format sparse-24-bitmask"),
    "transformed": ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    "reordered": (
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {**INT4, "actorder": "group"}}}},
        "actorder 'group'",
    ),
    "two-ways": ({"config_groups": TWO_WAYS}, "in several ways (group_0, group_1)"),
}


@pytest.mark.extras
@pytest.mark.parametrize(("changes", "says"), REFUSED_COMPRESSED.values(), ids=REFUSED_COMPRESSED)
def test_compressed_tensors_that_transformers_would_misread_are_refused(changes, says, tmp_path):
    pytest.importorskip("compressed_tensors", reason="`make test-extras` installs it")
    folder = Path(save(LLAMA.build(), tmp_path / "model"))
    rewrite_config(folder, quantization_config=COMPRESSED | changes)
    assert_refused(folder, [f"base ({folder}) is quantised (compressed-tensors)", says, ORIGINAL])


@pytest.mark.parametrize("library", ["bitsandbytes", "compressed-tensors"])
def test_a_missing_library_is_named(library, tmp_path, monkeypatch):
    monkeypatch.setattr(f"hf_esm.checkpoints.quantised.is_{library.replace('-', '_')}_available", lambda: False)
    folder = Path(save(LLAMA.build(), tmp_path / "model"))
    rewrite_config(folder, quantization_config={"quant_method": library, "load_in_4bit": True})
    assert_refused(folder, [f"is quantised ({library}), and reading it needs {library}: pip install -U {library}"])


def without_scales(stored):
    return {key: tensor for key, tensor in stored.items() if "scale" not in key}


def renamed_scales(stored):
    return {key.replace("weight_scale_inv", "weight_scale"): tensor for key, tensor in stored.items()}


@pytest.mark.parametrize("kind", ["fp8", "fp8, a mixture"])
@pytest.mark.parametrize("change", [without_scales, renamed_scales])
@pytest.mark.parametrize("settings", [FP8, None])
def test_codes_without_scales_are_refused(settings, change, kind, tmp_path):
    folder = KINDS[kind].save(KINDS[kind].architecture.build(), tmp_path)
    save_file(change(load_file(folder / FILE)), folder / FILE)
    rewrite_config(folder, quantization_config=settings)
    assert_refused(folder, ["weight' is stored as torch.float8_e4m3fn, without scales", "quantised from"])


DAMAGED = {
    "fp8": (lambda key, tensor: tensor[:16] if key.endswith("up_proj.weight") else tensor, "not divisible"),
    "mxfp4": (
        lambda key, tensor: tensor[:1] if key.endswith(("_blocks", "_scales")) else tensor,
        "but config.json describes",
    ),
}


@pytest.mark.parametrize(("kind", "damage", "says"), [(kind, *case) for kind, case in DAMAGED.items()], ids=DAMAGED)
def test_weights_that_do_not_fit_their_scales_or_the_config_are_refused_when_they_are_read(
    kind, damage, says, tmp_path
):
    folder = KINDS[kind].save(KINDS[kind].architecture.build(), tmp_path)
    save_file({key: damage(key, tensor).clone() for key, tensor in load_file(folder / FILE).items()}, folder / FILE)
    checkpoint = opened(folder)
    with pytest.raises(HfEsmError, match="dequantised") as caught:
        for name in checkpoint.names:
            checkpoint.tensor(name)
    assert says in str(caught.value) and "quantised from" in str(caught.value)


@pytest.mark.extras
def test_a_live_quantised_model_is_refused_and_both_remedies_work(tmp_path):
    kind = KINDS["bitsandbytes, 8 bit"]
    folder = kind.save(kind.architecture.build(), tmp_path)
    model = type(kind.architecture.build()).from_pretrained(folder)
    with pytest.raises(HfEsmError, match=r"live model that is quantised \(bitsandbytes\).*folder or id.*dequantize"):
        opened(model)
    read = opened(folder)
    dequantised = opened(model.dequantize())
    assert read.names == dequantised.names
    for name in read.names:
        assert torch.equal(read.tensor(name), dequantised.tensor(name).to(torch.bfloat16))
