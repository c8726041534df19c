"""Adapters of one base take turns on one loaded model, each as if it were loaded by itself."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig

from hf_esm.checkpoints import ExpertLoader, open_checkpoint, resolve_source
from support.helpers import train
from support.tiny import LLAMA


ADAPTERS = {
    "lora": LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["v_proj"], task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "whole": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj"], task_type="CAUSAL_LM"),
    "classifier": LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """The base and its adapters as checkpoints, in the order of `ADAPTERS`."""
    folder, base = tmp_path_factory.mktemp("models"), LLAMA.build()
    base.save_pretrained(folder / "base")
    opened = open_checkpoint(resolve_source(folder / "base", "base"))
    checkpoints = []
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        inner = (
            LLAMA.build("LlamaForSequenceClassification", num_labels=3)
            if name == "classifier"
            else copy.deepcopy(base)
        )
        train(inner, config, seed).save_pretrained(folder / name)
        checkpoints.append(open_checkpoint(resolve_source(folder / name, name), opened))
    return checkpoints


@pytest.fixture
def loads(adapters, monkeypatch):
    """A list that grows by one with each model of the base that is loaded."""
    loaded, load = [], type(adapters[0].base).load_model_as
    monkeypatch.setattr(
        type(adapters[0].base), "load_model_as", lambda *args, **kwargs: loaded.append(1) or load(*args, **kwargs)
    )
    return loaded


def test_adapters_of_every_type_on_one_model_have_the_weights_that_each_has_alone(adapters, loads):
    loader, alone = ExpertLoader(), [adapter.load_model().state_dict() for adapter in adapters[:4]]
    loads.clear()
    for adapter, expected in zip(adapters[:4] * 2, alone * 2, strict=True):
        state = loader.load(adapter).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert len(loads) == 1


def test_an_adapter_of_another_class_gets_a_model_of_its_own(adapters, loads):
    loader = ExpertLoader()
    causal, classifier = loader.load(adapters[0]), loader.load(adapters[4])
    assert len(loads) == 2 and type(causal) is not type(classifier)
    assert torch.equal(classifier.state_dict()["score.weight"], adapters[4].tensor("score.weight"))
