"""Routed models whose weights are offloaded or quantised: they answer as others do, are saved and exported."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel
from transformers import AutoModel, BitsAndBytesConfig

from hf_esm import HfEsmError, RoutedModel
from support.problems import relative_error
from support.routed_toys import encoded, logits, task_texts


pytestmark = pytest.mark.slow

TEXTS = [text for task in "ab" for text in task_texts(task, 7, 4)]
PLACES = {"embeddings": "cpu", "encoder": "disk", "pooler": "cpu"}


def dispatched(model, folder):
    return dispatch_model(
        model, {f"base_model.model.{name}": place for name, place in PLACES.items()}, "cpu", offload_dir=folder
    )


WAYS = {
    "to the CPU": lambda model, folder: cpu_offload(model, "cpu"),
    "to the CPU, with buffers": lambda model, folder: cpu_offload(model, "cpu", offload_buffers=True),
    "to a disk": lambda model, folder: disk_offload(model, folder, "cpu"),
    "in part": dispatched,
}
MAPS = {"device_map, in part": PLACES, "device_map": {"": "disk"}}


@pytest.fixture(scope="module", params=[*WAYS, *MAPS])
def offloaded(request, merged, tmp_path_factory):
    folder = tmp_path_factory.mktemp("offloaded")
    if request.param in MAPS:
        return RoutedModel.from_pretrained(merged, device_map=MAPS[request.param], offload_folder=folder)
    model = RoutedModel.from_pretrained(merged)
    WAYS[request.param](model.model, folder)
    return model


def is_offloaded(routed):
    return any(weight.is_meta for weight in routed.model.get_base_model().encoder.parameters())


def test_an_offloaded_model_answers_as_others_do(offloaded, routed):
    assert offloaded.predict(TEXTS) == routed.predict(TEXTS)
    assert offloaded.explain(TEXTS) == routed.explain(TEXTS)
    samples = encoded(TEXTS[:4])
    for task in ("a", "static"):
        with offloaded.route(task), routed.route(task):
            assert torch.equal(logits(offloaded.task_model("a"), samples), logits(routed.task_model("a"), samples))
    assert offloaded.device == torch.device("cpu")
    assert is_offloaded(offloaded)


def test_an_offloaded_model_is_saved_and_exported(offloaded, routed, tmp_path):
    again = RoutedModel.from_pretrained(offloaded.save_pretrained(tmp_path / "copy"))
    assert again.predict(TEXTS) == routed.predict(TEXTS)
    assert set(offloaded.export_lora(tmp_path / "lora")) == {"a", "b"}
    assert is_offloaded(offloaded)


def test_experts_and_heads_that_were_trained_are_saved_after_they_are_offloaded(merged, tmp_path):
    trained, layer = RoutedModel.from_pretrained(merged), "encoder.layer.1.output.dense"
    with torch.no_grad():
        trained.model.get_base_model().get_submodule(layer).routed_experts_B["default"].mul_(1.5)
        trained.task_model("a").classifier.bias.add_(1)
    expected = trained.predict(TEXTS, tasks="a")
    cpu_offload(trained.model, "cpu")
    cpu_offload(trained.task_model("a").classifier, "cpu")
    again = RoutedModel.from_pretrained(trained.save_pretrained(tmp_path / "copy"))
    assert again.predict(TEXTS, tasks="a") == expected != RoutedModel.from_pretrained(merged).predict(TEXTS, tasks="a")


def test_a_static_model_that_was_changed_before_it_is_offloaded_is_not_saved(merged, tmp_path):
    changed = RoutedModel.from_pretrained(merged)
    with torch.no_grad():
        changed.model.get_base_model().get_submodule("encoder.layer.1.output.dense").base_layer.weight.mul_(1.5)
    cpu_offload(changed.model, "cpu")
    with pytest.raises(
        HfEsmError, match=r"'encoder\.layer\.1\.output\.dense\.weight' of the static model was changed"
    ):
        changed.save_pretrained(tmp_path / "copy")


def test_an_adapter_is_compared_with_the_offloaded_model_under_it(merged, models, routed):
    batch = {"input_ids": encoded(TEXTS[:1])[0]["input_ids"][None]}
    with pytest.raises(HfEsmError, match="of another model than this BertModel: their weights differ"):
        PeftModel.from_pretrained(cpu_offload(AutoModel.from_pretrained(models / "base"), "cpu"), merged / "routed")
    static = cpu_offload(AutoModel.from_pretrained(merged), "cpu")
    model = PeftModel.from_pretrained(static, merged / "routed").eval()
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], routed(**batch)[0])


BITS = {
    "8 bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "4 bit": lambda: BitsAndBytesConfig(load_in_4bit=True),
    "4 bit, in bfloat16": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
}


@pytest.mark.extras
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("settings", BITS.values(), ids=BITS)
@torch.no_grad()
def test_a_quantised_model_answers_as_the_quantised_static_model_with_the_expert(
    merged, routed, settings, tmp_path, monkeypatch
):
    pytest.importorskip("bitsandbytes", reason="`make test-extras` installs it")
    # Some processors pack rows of 64 entries, which these small weights do not have.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    quantised = RoutedModel.from_pretrained(merged, quantization_config=settings())
    batch = {"input_ids": encoded(TEXTS[:1])[0]["input_ids"][None]}
    static = AutoModel.from_pretrained(merged, quantization_config=settings()).eval()
    with quantised.route("static"):
        assert torch.equal(quantised(**batch)[0], static(**batch)[0])
    adapter = routed.export_lora(tmp_path / "lora", ["a"], heads=False)["a"]
    expected = PeftModel.from_pretrained(static, adapter).eval()(**batch)[0]
    with quantised.route("a"), routed.route("a"):
        found, exact = quantised(**batch)[0], routed(**batch)[0]
    assert relative_error(found, expected) < 1e-2 and 1e-3 < relative_error(found, exact) < 0.7
    assert [e.task for e in quantised.explain(TEXTS)] == [e.task for e in routed.explain(TEXTS)]
    again = RoutedModel.from_pretrained(quantised.save_pretrained(tmp_path / "copy"))
    assert again.predict(TEXTS) == routed.predict(TEXTS)
