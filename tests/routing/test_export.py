"""Experts as LoRA adapters that PEFT alone loads: they give what the routed model gives with the task named."""

import json
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from hf_esm import HfEsmError, RoutedModel, load_task_model, merge_models
from hf_esm.data import collate
from hf_esm.routing import export
from support.embedders import TEXTS, texts_of, write_embedder
from support.helpers import save
from support.processes import run_script
from support.routed_toys import FULL, encoded, quiet, task_ids, task_texts, tuned
from support.tiny import GPT2
from support.toys import LABELS


pytestmark = pytest.mark.slow


@torch.no_grad()
def answer(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return model(**batch)[0]


def batch_of(task: str) -> dict[str, Tensor]:
    """Texts of one length."""
    samples = encoded(task_texts(task, 6))
    return collate([sample for sample in samples if len(sample["input_ids"]) == len(samples[0]["input_ids"])], None)


@pytest.fixture(scope="module")
def adapters(routed, tmp_path_factory):
    return routed.export_lora(tmp_path_factory.mktemp("lora") / "out")


CLASSES = {
    "by its folder": lambda static, adapter, task: AutoPeftModelForSequenceClassification.from_pretrained(
        adapter, num_labels=len(LABELS[task])
    ),
    "by Transformers": lambda static, adapter, task: AutoModelForSequenceClassification.from_pretrained(
        adapter, num_labels=len(LABELS[task])
    ),
    "over the task's model": lambda static, adapter, task: PeftModel.from_pretrained(
        load_task_model(static, task), adapter
    ),
    "merged into it": lambda static, adapter, task: PeftModel.from_pretrained(
        load_task_model(static, task), adapter
    ).merge_and_unload(),
}


@pytest.mark.parametrize("load", CLASSES.values(), ids=CLASSES)
def test_an_expert_is_exported_with_its_head_for_the_class_of_its_task(merged, routed, adapters, load):
    for task, adapter in adapters.items():
        batch = batch_of(task)
        with routed.route(task):
            expected = answer(routed.task_model(task), batch)
        found = answer(load(merged, adapter, task).eval(), batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        with routed.route("static"):
            assert not torch.allclose(answer(routed.task_model(task), batch), expected, atol=1e-2)


def test_an_expert_is_exported_without_its_head_for_the_class_of_the_static_model(merged, routed, tmp_path):
    adapters, batch = routed.export_lora(tmp_path / "lora", heads=False), batch_of("b")
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(merged), adapters["a"], adapter_name="a").eval()
    model.load_adapter(adapters["b"], adapter_name="b")  # beside the other
    model.set_adapter("b")
    with routed.route("b"):
        torch.testing.assert_close(answer(model, batch), answer(routed, batch), rtol=1e-5, atol=1e-5)


ALONE = """
import sys
sys.modules["hf_esm"] = None  # importing it fails
import torch
from peft import AutoPeftModel
for adapter, batch, output in (case.split(":") for case in sys.argv[1:]):
    with torch.no_grad():
        torch.save(AutoPeftModel.from_pretrained(adapter, num_labels=3).eval()(torch.load(batch))[0], output)
"""


def test_exported_experts_of_classifiers_and_language_models_load_without_hf_esm(routed, adapters, tmp_path):
    base = GPT2.build()
    experts = {task: tuned(base, i) for i, task in enumerate("ab")}
    calibration = {task: task_ids(task) for task in "ab"}
    quiet(
        save(base, tmp_path / "base"),
        experts,
        calibration=calibration,
        rank=FULL,
        refine=False,
        output_dir=tmp_path / "gpt2",
    )
    language = RoutedModel.from_pretrained(tmp_path / "gpt2")
    written = language.export_lora(tmp_path / "lora")
    assert written == {task: tmp_path / "lora" / task for task in "ab"}
    cases, expected = [], []
    for adapter, model in ((adapters["b"], routed), (written["b"], language)):
        with model.route("b"):
            ids = batch_of("b")["input_ids"]
            expected.append(answer(model.task_model("b"), {"input_ids": ids}))
        torch.save(ids, tmp_path / "ids")
        cases.append((adapter, tmp_path / "ids", tmp_path / f"{len(cases)}.out"))
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert (config["peft_type"], config["fan_in_fan_out"]) == ("LORA", model is language)
    ran = run_script(ALONE, *(":".join(map(str, paths)) for paths in cases))
    assert ran.returncode == 0, ran.output
    for (*_, output), answered in zip(cases, expected, strict=True):
        torch.testing.assert_close(torch.load(output), answered, rtol=1e-5, atol=1e-5)


def test_an_exported_embedding_model_embeds_as_the_routed_one(tmp_path):
    experts = {task: write_embedder(tmp_path / task, seed=i) for i, task in enumerate("ab", 1)}
    merge_models(
        write_embedder(tmp_path / "base"),
        experts,
        method={"name": "esm++", "router": "oracle"},
        rank=4,
        calibration={task: texts_of(i) for i, task in enumerate(experts)},
        output_dir=tmp_path / "routed",
        progress=False,
    )
    routed = RoutedModel.from_pretrained(tmp_path / "routed")
    adapter = str(routed.export_lora(tmp_path / "lora")["b"])
    loaded = SentenceTransformer(str(tmp_path / "routed"), device="cpu")
    loaded.load_adapter(adapter)
    with routed.route("b"):
        expected = routed.sentence_transformer().encode(TEXTS)
    with routed.route("static"):
        assert abs(routed.sentence_transformer().encode(TEXTS) - expected).max() > 1e-3
    for exported in (loaded, SentenceTransformer(adapter, device="cpu")):
        assert abs(exported.encode(TEXTS) - expected).max() < 1e-5


def test_the_base_of_exported_adapters_can_be_named(merged, routed, adapters, tmp_path):
    named = routed.export_lora(tmp_path / "lora", ["b"], base_model="me/static")
    found = [json.loads((folder / "adapter_config.json").read_text()) for folder in (adapters["b"], named["b"])]
    assert [config["base_model_name_or_path"] for config in found] == [str(merged.absolute()), "me/static"]
    assert AutoTokenizer.from_pretrained(named["b"]).get_vocab() == routed.processor.get_vocab()
    with pytest.raises(HfEsmError, match="exists"):
        routed.export_lora(tmp_path / "lora", ["b"])


def test_a_head_that_is_no_whole_module_is_not_exported(merged, tmp_path, monkeypatch):
    routed = RoutedModel.from_pretrained(merged)
    name = "bert.encoder.layer.2.output.LayerNorm.bias"

    def load_head(path):
        return {"classifier.weight": torch.zeros(2, 16), "classifier.bias": torch.zeros(2), name: torch.zeros(16)}

    monkeypatch.setattr(export, "read_tensors", load_head)
    with pytest.raises(HfEsmError, match=f"'a' has '{name}' in a module of the body"):
        routed.export_lora(tmp_path / "lora")
    assert not list(tmp_path.iterdir())
    assert set(routed.export_lora(tmp_path / "lora", heads=False)) == {"a", "b"}


def test_experts_are_exported_all_or_none(merged, tmp_path, monkeypatch):
    output = tmp_path / "lora"
    output.mkdir()
    routed = RoutedModel.from_pretrained(merged)
    write = export.write_lora_adapter

    def full(folder, *args, **options):
        if folder.name == "b":
            raise OSError(28, "No space left on device")
        return write(folder, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_lora_adapter", full)
        with pytest.raises(OSError, match="No space"):
            routed.export_lora(output)
    assert [path.name for path in tmp_path.rglob("*")] == ["lora"]
    adapters = routed.export_lora(output)
    assert adapters == {task: output / task for task in "ab"}
    assert all((path / "adapter_model.safetensors").is_file() for path in adapters.values())
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_adapters_are_added_to_a_folder_even_the_current_one(routed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for task in "ab":
        routed.export_lora(".", [task])
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    with pytest.raises(HfEsmError, match="b exists"):
        routed.export_lora(".", ["b"])
