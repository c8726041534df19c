"""`RoutedModel.save_pretrained` saves what the user has, or refuses."""

import pytest
import torch
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
