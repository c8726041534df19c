"""Routed models in the hands of a `Trainer`: what it trains is saved and read again, or refused before it begins."""

import copy
import pickle
from types import MethodType, SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, default_data_collator

from hf_esm import HfEsmError, RoutedModel
from support.helpers import save
from support.routed_toys import EXACT, quiet, task_ids, task_texts, tuned
from support.tiny import LLAMA, save_tokenizer


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of Trainer and PEFT, about their own calls

TEXTS = [sample["input_ids"][:4].tolist() for task in "ab" for sample in task_ids(task)]  # of one length


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """ESM++ models of an untied Llama of six blocks, with experts on all its linear maps, and in blocks alone."""
    folder, base = tmp_path_factory.mktemp("llama"), LLAMA.build(num_hidden_layers=6)
    at = save(base, folder / "base")
    save_tokenizer(folder / "base")
    experts = {task: tuned(base, i) for i, task in enumerate("ab")}
    calibration = {task: task_ids(task) for task in "ab"}
    for name, targets in {"all": [], "blocks": ["layers"]}.items():
        method = {**EXACT, "targets": targets, "depth": 0.6}
        options = {"calibration": calibration, "rank": 4, "method": method, "refine": False}
        quiet(at, experts, output_dir=folder / name, **options)
    return SimpleNamespace(all=folder / "all", blocks=folder / "blocks")


def fused(model, input_ids, labels):
    """A forward pass as that of trainers which never compute all logits at once."""
    hidden = model.model(input_ids)[0]
    return torch.nn.functional.cross_entropy((hidden @ model.lm_head.weight.T).mT, labels)


def test_a_model_without_experts_on_the_output_map_trains_under_a_fused_loss(language):
    ids = task_ids("a")[0]["input_ids"][None]
    for folder, trains in ((language.all, False), (language.blocks, True)):
        routed = RoutedModel.from_pretrained(folder)
        model = routed.model.get_base_model()
        routed.model.set_requires_grad("default")
        model.forward = MethodType(fused, model)
        if trains:
            model.train()(input_ids=ids, labels=ids).backward()
            assert model.model.layers[5].mlp.up_proj.routed_experts_A["default"].grad.any()
        else:
            with pytest.raises(HfEsmError, match="merge with experts on other linear maps"):
                model.train()(input_ids=ids, labels=ids)


def arguments(folder, **options) -> TrainingArguments:
    settings = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "learning_rate": 0.05}
    settings |= {"per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    return TrainingArguments(str(folder), **settings, load_best_model_at_end=True, **options)


def weights(model, names="") -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if names in name}


def test_a_trainer_saves_and_resumes_experts_and_head_of_a_task(merged, tmp_path, caplog):
    texts = task_texts("a")

    def trained(resume=None):
        routed = RoutedModel.from_pretrained(merged)
        routed.model.set_requires_grad("default")
        model, tokenizer = routed.task_model("a"), routed.processor
        rows = Dataset.from_dict({**tokenizer(texts), "labels": [i % 2 for i in range(len(texts))]})
        before, collator = weights(model), DataCollatorWithPadding(tokenizer)
        trainer = Trainer(model, arguments(tmp_path), collator, train_dataset=rows, eval_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        after = weights(model)
        assert {"base_layer" in name for name in after if changed(before, after, name)} == {False}
        return routed, trainer, after

    routed, trainer, after = trained()
    assert "missing keys" not in caplog.text
    trainer.save_model(tmp_path / "best")
    stored = load_file(tmp_path / "best" / "model.safetensors")
    assert not [name for name in stored if "base_layer" in name] and "classifier.weight" in stored
    again = RoutedModel.from_pretrained(merged)
    assert not again.task_model("a").load_state_dict(stored, strict=False).unexpected_keys
    whole = RoutedModel.from_pretrained(again.save_pretrained(tmp_path / "whole"))
    resumed = trained(str(tmp_path / "checkpoint-2"))[2]
    for found in (weights(again.task_model("a")), weights(whole.task_model("a")), resumed):
        assert not [name for name in after if changed(after, found, name)]
    with pytest.raises(HfEsmError, match="cannot be saved by itself"):
        routed.task_model("a").save_pretrained(tmp_path / "alone")
    routed.task_model("a").save_pretrained(tmp_path / "other rank", is_main_process=False)
    assert not (tmp_path / "alone").exists() and not (tmp_path / "other rank").exists()


def changed(before, after, name) -> bool:
    return not torch.equal(before[name], after[name])


def test_weights_of_the_body_that_are_trained_are_in_the_checkpoint(merged, tmp_path):
    model = RoutedModel.from_pretrained(merged).task_model("a")
    model.requires_grad_(False)
    model.bert.embeddings.requires_grad_(True)
    model.save_pretrained(tmp_path, is_main_process=True)
    stored = load_file(tmp_path / "model.safetensors")
    assert {"bert.embeddings.word_embeddings.weight", "classifier.weight"} < stored.keys()
    assert any("routed_experts_B" in name for name in stored) and not any("base_layer" in name for name in stored)


def test_a_trainer_saves_and_resumes_the_experts_of_a_language_model(language, tmp_path):
    rows = Dataset.from_list([dict.fromkeys(("input_ids", "labels"), row) for row in TEXTS])

    def trained(resume=None):
        routed = RoutedModel.from_pretrained(language.all)
        routed.model.set_requires_grad("default")
        before = weights(routed.model)
        trainer = Trainer(routed.model, arguments(tmp_path), default_data_collator, rows, rows)
        trainer.train(resume_from_checkpoint=resume)
        after = weights(routed.model)
        assert {"routed_experts" in name for name in after if changed(before, after, name)} == {True}
        return routed, after

    routed, after = trained()
    resumed = trained(str(tmp_path / "checkpoint-2"))[1]
    whole = RoutedModel.from_pretrained(routed.save_pretrained(tmp_path / "whole"))
    adapter = RoutedModel.from_pretrained(language.all).model
    adapter.load_adapter(str(tmp_path / "checkpoint-4"), "default")
    for found in (resumed, weights(whole.model), weights(adapter)):
        assert not [name for name in after if changed(after, found, name)]


def test_a_trainer_is_told_to_take_the_model_inside(routed, tmp_path):
    with pytest.raises(HfEsmError, match="Give a Trainer or an Accelerator its `model`, which is a PeftModel"):
        Trainer(routed, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    assert not hasattr(routed, "state_dict") and copy.copy(routed).tasks == routed.tasks
    assert pickle.loads(pickle.dumps(routed)).tasks == routed.tasks
