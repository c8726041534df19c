"""Routed models in the hands of a `Trainer`: what it trains is saved and read again, or refused before it begins."""

from types import MethodType, SimpleNamespace

import pytest
import torch

from hf_esm import HfEsmError, RoutedModel
from support.helpers import save
from support.routed_toys import EXACT, quiet, task_ids, tuned
from support.tiny import LLAMA, save_tokenizer


pytestmark = pytest.mark.slow


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
