"""`RoutedModel.save_pretrained` saves what the user has, or refuses."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from hf_esm import HfEsmError, RoutedModel
from support.helpers import save
from support.routed_toys import encoded, logits, quiet, task_ids, task_texts, tuned
from support.tiny import GPT2, save_tokenizer, snapshot


pytestmark = pytest.mark.slow


def test_a_changed_tokenizer_is_saved(merged, tmp_path):
    routed = RoutedModel.from_pretrained(merged)
    routed.processor.chat_template = "{{ messages[0].content }} [SEP]"
    again = RoutedModel.from_pretrained(routed.save_pretrained(tmp_path / "copy"))
    assert again.processor.chat_template == routed.processor.chat_template
    assert RoutedModel.from_pretrained(merged).processor.chat_template is None


def test_tokens_without_embeddings_are_refused(merged, tmp_path):
    routed = RoutedModel.from_pretrained(merged)
    rows = routed.model.get_input_embeddings().num_embeddings
    routed.processor.add_tokens([f"new{i}" for i in range(rows + 1 - len(routed.processor))])
    with pytest.raises(HfEsmError, match=f"{rows + 1} tokens, and the model has embeddings of {rows}"):
        routed.save_pretrained(tmp_path / "copy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["embedding", "under an expert", "resized"])
def test_a_changed_static_model_is_refused_and_trained_experts_of_one_loaded_again_are_saved(merged, change, tmp_path):
    routed = RoutedModel.from_pretrained(merged)
    static = routed.model.get_base_model()
    with torch.no_grad():
        if change == "embedding":
            static.embeddings.word_embeddings.weight[7] += 0.1
        elif change == "resized":
            static.resize_token_embeddings(70)
        else:
            static.encoder.layer[1].attention.self.value.base_layer.weight.mul_(1.01)
    before = snapshot(tmp_path)
    with pytest.raises(HfEsmError, match="of the static model was changed since it was loaded"):
        routed.save_pretrained(tmp_path / "copy")
    assert snapshot(tmp_path) == before
    routed, samples = RoutedModel.from_pretrained(merged), encoded(task_texts("a", 3))
    value = routed.model.get_base_model().encoder.layer[1].attention.self.value
    with torch.no_grad():
        value.routed_experts_B["default"].mul_(1.5)
        routed.task_model("a").classifier.bias.add_(1.0)
    again = RoutedModel.from_pretrained(routed.save_pretrained(tmp_path / "copy"))
    assert torch.equal(logits(again.task_model("a"), samples), logits(routed.task_model("a"), samples))


def test_settings_of_generation_are_saved_and_a_half_precision_model_is_the_stored_one(tmp_path):
    base = GPT2.build()
    base_folder = save(base, tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    experts = {task: tuned(base, i) for i, task in enumerate("ab")}
    calibration = {task: task_ids(task) for task in "ab"}
    quiet(base_folder, experts, calibration=calibration, rank=4, refine=False, output_dir=tmp_path / "merged")
    routed = RoutedModel.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    routed.model.get_base_model().generation_config.update(do_sample=True, temperature=0.25)
    copy = routed.save_pretrained(tmp_path / "copy")
    assert GenerationConfig.from_pretrained(copy).temperature == 0.25
    assert RoutedModel.from_pretrained(copy).model.get_base_model().generation_config.temperature == 0.25


def on_the_body(routed):
    return get_peft_model(routed.model.get_base_model(), LoraConfig(target_modules=["query", "dense"]))


def on_a_task(routed):
    return get_peft_model(routed.task_model("a"), LoraConfig(task_type="SEQ_CLS", target_modules=["value"]))


def on_a_head(routed):
    return get_peft_model(routed.task_model("a"), LoraConfig(target_modules=["classifier"]))


def on_the_adapter(routed):
    return get_peft_model(routed.model, LoraConfig(target_modules=["query"]))


def beside_it(routed):
    routed.model.load_adapter(str(routed.folder / "routed"), "mine")
    return routed.model


def by_transformers(routed):
    routed.model.get_base_model().add_adapter(LoraConfig(target_modules=["query"]), "mine")
    return routed.model.get_base_model()


@pytest.mark.parametrize("add", [on_the_body, on_a_task, on_a_head, on_the_adapter, beside_it, by_transformers])
@pytest.mark.filterwarnings("ignore")  # PEFT's, about adapters on adapters
def test_an_adapter_of_the_users_is_not_lost(merged, add, tmp_path):
    routed, samples = RoutedModel.from_pretrained(merged), encoded(task_texts("a", 3))
    holder = add(routed)
    with torch.no_grad():
        routed.task_model("a").bert.encoder.layer[1].attention.self.key.routed_experts_B["default"].mul_(1.5)
    for call in (lambda: routed.save_pretrained(tmp_path / "copy"), lambda: routed.push_to_hub("me/routed")):
        with pytest.raises(HfEsmError, match="which RoutedModel does not save") as caught:
            call()
    assert not list(tmp_path.iterdir())
    name = re.search(r"`delete_adapter\('(.*)'\)`", str(caught.value)).group(1)
    holder.save_pretrained(tmp_path / "mine")
    assert list((tmp_path / "mine").rglob("adapter_model.safetensors"))
    holder.delete_adapter(name)
    again = RoutedModel.from_pretrained(routed.save_pretrained(tmp_path / "copy"))
    found, before = (logits(one.task_model("a"), samples) for one in (again, RoutedModel.from_pretrained(merged)))
    assert torch.equal(found, logits(routed.task_model("a"), samples)) and not torch.equal(found, before)


def test_experts_that_another_adapter_took_along_are_missed(merged, tmp_path):
    routed = RoutedModel.from_pretrained(merged)
    holder = on_the_body(routed)
    with pytest.raises(HfEsmError, match="cannot be merged into one weight"):
        holder.merge_and_unload()
    holder.delete_adapter("default")
    with pytest.raises(HfEsmError, match="is gone from the model in memory"):
        routed.save_pretrained(tmp_path / "copy")
    routed = RoutedModel.from_pretrained(merged)
    on_the_body(routed).unload()
    with pytest.raises(HfEsmError, match="was deleted or unloaded from this RoutedModel"):
        routed.save_pretrained(tmp_path / "copy")


GONE = {
    "call": lambda routed: routed(torch.tensor([[2, 7, 3]])),
    "generate": lambda routed: routed.generate(torch.tensor([[2, 7, 3]])),
    "predict": lambda routed: routed.predict(["so so"]),
    "explain": lambda routed: routed.explain(["so so"]),
    "route": lambda routed: routed.route("a"),
    "task_model": lambda routed: routed.task_model("a"),
    "eval": lambda routed: routed.eval(),
    "export_lora": lambda routed: routed.export_lora("never"),
    "save_pretrained": lambda routed: routed.save_pretrained("never"),
}


@pytest.mark.parametrize("leave", ["delete_adapter", "unload"])
def test_a_model_whose_adapter_is_gone_says_so(merged, leave):
    routed = RoutedModel.from_pretrained(merged)
    getattr(routed.model, leave)(*["default"][: leave == "delete_adapter"])
    for call in GONE.values():
        with pytest.raises(HfEsmError, match="was deleted or unloaded from this RoutedModel"):
            call(routed)
    assert "experts of a, b" in repr(routed)
    GONE["call"](RoutedModel.from_pretrained(str(routed.folder)))


@pytest.mark.parametrize("change", ["weights", "tokenizer"])
def test_what_was_changed_is_not_left_out_of_a_push(merged, change):
    routed = RoutedModel.from_pretrained(merged)
    if change == "weights":
        routed.model.get_input_embeddings().weight.data[7] += 0.1
        says = "of the static model was changed"
    else:
        routed.processor.chat_template = "{{ messages[0].content }}"
        says = "was changed since it was loaded"
    with pytest.raises(HfEsmError, match=says):
        routed.push_to_hub("me/routed")
