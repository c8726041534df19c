"""`hf-esm components` and `hf-esm fuse`: what they write is what Python writes, and PEFT loads it."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_esm import essential_components, fuse_components
from hf_esm.cli.main import main
from support.routed_toys import equal
from support.toys import texts, write_models, write_rows


RANK = 14  # above the share of a fused adapter


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The toy models, a file of texts, and adapters `x-a` and `x-b` of essential components, `x-lora` of LoRA."""
    folder = write_models(tmp_path_factory.mktemp("models"))
    for seed, task in enumerate("ab"):
        write_rows(folder / f"{task}.jsonl", texts(seed))
        assert run(*command(folder, task, f"x-{task}"), "--format", "essential") == 0
    assert run(*command(folder, "a", "x-lora")) == 0
    return folder


def run(*words):
    return main([str(word) for word in words])


def command(folder, task, output):
    models = folder / "base", folder / task, folder / f"{task}.jsonl"
    return "components", *models, "--rank", RANK, "--output-dir", folder / output, "--num-samples", 6, "--no-progress"


def stored(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_components_are_those_of_python(models, tmp_path):
    for as_lora, name in ((True, "x-lora"), (False, "x-a")):
        options = {"rank": RANK, "as_lora": as_lora, "num_samples": 6, "progress": False}
        calibration = str(models / "a.jsonl")
        essential_components(models / "base", models / "a", calibration, output_dir=tmp_path / name, **options)
        assert equal(stored(models / name), stored(tmp_path / name))
    assert {len(tensor) for name, tensor in stored(models / "x-a").items() if name.endswith("_C")} == {RANK}
    assert (
        PeftModel.from_pretrained(AutoModel.from_pretrained(models / "base"), models / "x-lora")
        .peft_config["default"]
        .peft_type
        == "LORA"
    )


@pytest.mark.parametrize("base", [False, True])
def test_fused_folders_are_the_fused_adapters_of_a_model(models, tmp_path, monkeypatch, base):
    monkeypatch.setattr("hf_esm.checkpoints.stored.FolderCheckpoint.tensor", lambda *_: pytest.fail("read a weight"))
    named = ["--base", models / "base"] if base else []
    assert run("fuse", models / "x-a", models / "x-b", *named, "--output-dir", tmp_path / "fused") == 0
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(models / "base"), models / "x-a", adapter_name="a")
    model.load_adapter(models / "x-b", adapter_name="b")
    fuse_components(model, ["a", "b"], "fused")
    model.load_adapter(tmp_path / "fused", adapter_name="file")
    assert model.peft_config["file"].base_model_name_or_path == str(models / "base")
    outputs, ids = {}, torch.tensor([[5, 9, 7]])
    for name in ("a", "fused", "file"):
        model.set_adapter(name)
        outputs[name] = model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(outputs["file"], outputs["fused"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs["a"], outputs["fused"], atol=1e-2)


def test_what_cannot_be_fused_is_refused(models, tmp_path, capsys):
    other = write_models(tmp_path / "other", vocabulary=70)
    write_rows(other / "a.jsonl", texts(0))
    assert run(*command(other, "a", "x-a"), "--format", "essential") == 0
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    for words, says in (
        ([models / "x-a"], "two adapters or more, each once"),
        ([models / "x-a", models / "x-a"], "two adapters or more, each once"),
        ([models / "x-a", models / "x-lora"], "x-lora) is a LORA adapter; only essential components are fused"),
        ([models / "x-a", models / "b"], "/b) is a full model. Make an adapter of it"),
        ([models / "x-a", other / "x-a"], "Pass --base"),
    ):
        assert run("fuse", *words, "--output-dir", tmp_path / "new") == 2
        assert says in capsys.readouterr().err
    assert run("fuse", models / "x-a", models / "x-b", "--output-dir", models / "x-a") == 2
    assert "exists. Choose another folder" in capsys.readouterr().err
    assert run(*command(models, "a", "x-a")) == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_saved_modules_are_left_out_with_a_warning(models, tmp_path, caplog):
    pooler = AutoModel.from_pretrained(models / "base").pooler
    folder = shutil.copytree(models / "x-a", tmp_path / "a")
    saved = {f"base_model.model.pooler.{name}": weight.clone() for name, weight in pooler.state_dict().items()}
    save_file({**stored(folder), **saved}, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "adapter_config.json").read_text()) | {"modules_to_save": ["pooler"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert run("fuse", folder, models / "x-b", "--output-dir", tmp_path / "fused") == 0
    assert "base_model.model.pooler.dense" in caplog.text and "left out of the fusion" in caplog.text
    assert run("fuse", models / "x-a", models / "x-b", "--output-dir", tmp_path / "expected") == 0
    assert equal(stored(tmp_path / "fused"), stored(tmp_path / "expected"))
    PeftModel.from_pretrained(AutoModel.from_pretrained(models / "base"), tmp_path / "fused")
