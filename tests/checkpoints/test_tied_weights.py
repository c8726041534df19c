"""Heads that the config ties to the embeddings, but that are weights of their own: in files, live, by adapters."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_esm import load_task_model, merge_models
from hf_esm.checkpoints import ExpertLoader
from hf_esm.checkpoints.sources import Access, open_checkpoint, resolve_source
from hf_esm.merging.alpha import CandidateModels
from support.architectures import ARCHITECTURES
from support.helpers import Architecture, perturbed, save, stored_tensors, text_samples, train, untied
from support.problems import relative_error
from support.tiny import DECODER, GPT2, LLAMA


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]  # PEFT, on tied weights

HEAD = "lm_head.weight"
TIED_LLAMA = Architecture("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True})
T5, BART = ARCHITECTURES["t5"], ARCHITECTURES["bart"]
FAMILIES = {"llama": TIED_LLAMA, "gpt2": GPT2, "t5": T5, "bart": BART}


def save_apart(model: PreTrainedModel, folder: Path, seed: int, scale: float = 0.2, **changes: Tensor) -> str:
    """A model whose config ties the head, and whose file holds a head that differs from the embeddings."""
    state = model.state_dict()
    embeddings = model.get_input_embeddings().weight.detach()
    noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(seed))
    save(model, folder)
    stored = load_file(folder / "model.safetensors")
    assert HEAD not in stored and HEAD in state and json.loads((folder / "config.json").read_text())
    tensors = stored | {HEAD: embeddings + scale * noise} | changes
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    inputs = text_samples(5)[1]["input_ids"][None]
    decoded = {"decoder_input_ids": inputs} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=inputs, **decoded).logits


def load(folder: str | Path) -> PreTrainedModel:
    config = json.loads((Path(folder) / "config.json").read_text())
    return getattr(transformers, config["architectures"][0]).from_pretrained(folder)


@pytest.mark.parametrize("architecture", FAMILIES.values(), ids=FAMILIES)
def test_a_file_that_holds_both_is_read_and_merged_as_transformers_loads_it(architecture, tmp_path):
    base = architecture.build()
    folder = save_apart(base, tmp_path / "base", 0)
    experts = {t: save_apart(perturbed(base, 0.05, i), tmp_path / t, i) for i, t in enumerate("ab", 1)}
    opened = open_checkpoint(resolve_source(folder, "base"))
    assert torch.equal(opened.tensor(HEAD), load_file(f"{folder}/model.safetensors")[HEAD])
    assert relative_error(logits(opened.load_model()), logits(load(folder))) < 1e-6

    result = merge_models(folder, experts, method="mean", output_dir=tmp_path / "out", progress=False)
    assert not any(result.plan.heads.by_task.values()) and not result.warnings
    states = [load(expert).state_dict() for expert in experts.values()]
    expected = {name: sum(state[name] for state in states) / 2 for name in states[0]}
    merged = load(tmp_path / "out")
    for name, weight in merged.state_dict().items():
        assert torch.allclose(weight, expected[name], rtol=1e-5, atol=1e-6), name
    literal = load(folder)
    literal.load_state_dict(expected)
    assert relative_error(logits(merged), logits(literal)) < 1e-5
    # Programs that believe the config must not tie the head either, where the config can say so.
    says = json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    assert says == (architecture in (T5, BART))


def test_equal_copies_in_a_file_stay_tied(tmp_path):
    base = TIED_LLAMA.build()
    folder = save_apart(base, tmp_path / "base", 0, scale=0)
    opened = open_checkpoint(resolve_source(folder, "base"))
    assert HEAD not in opened.names and opened.skeleton.config.tie_word_embeddings
    experts = {t: save(perturbed(base, 0.1, i), tmp_path / t) for i, t in enumerate("ab")}
    merge_models(folder, experts, method="mean", output_dir=tmp_path / "out", progress=False)
    assert HEAD not in stored_tensors(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_pickled_files_name_tied_weights_twice(tmp_path):
    model = GPT2.build()
    save(model, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    opened = open_checkpoint(resolve_source(tmp_path / "base", "base", Access(allow_pickle=True)))
    assert HEAD in opened.files.headers and HEAD not in opened.names


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("live", [False, True], ids=["files", "live"])
def test_a_head_that_the_base_ties_stays_the_expert_s(family, live, tmp_path):
    base = FAMILIES[family].build()
    save(base, tmp_path / "base")
    apart = save_apart(perturbed(base, 0.1, 1), tmp_path / "a", 1)
    save(perturbed(base, 0.1, 2), tmp_path / "b")
    experts = {"a": load(apart) if live else apart, "b": tmp_path / "b"}
    result = merge_models(tmp_path / "base", experts, method="mean", output_dir=tmp_path / "out", progress=False)
    assert result.plan.heads.by_task == {"a": [HEAD], "b": []}
    assert any("'lm_head.weight' of its own, which is tied" in warning for warning in result.warnings)
    merged, trained = stored_tensors(tmp_path / "out"), stored_tensors(Path(apart))
    task_model = load_task_model(tmp_path / "out", "a")
    embedding = next(name for name in ("model.embed_tokens.weight", "shared.weight") if name in merged)
    assert torch.equal(task_model.get_input_embeddings().weight, merged[embedding])
    assert torch.equal(task_model.lm_head.weight, trained[HEAD])
    other = load_task_model(tmp_path / "out", "b")
    assert other.lm_head.weight is other.get_input_embeddings().weight


def test_a_live_head_that_somebody_untied_is_read_and_never_changed(tmp_path):
    """Also where the attributes of Transformers still say that it is tied, as after `merge_and_unload`."""
    base = TIED_LLAMA.build()
    live = perturbed(base, 0.1, 1)
    live.lm_head.weight = torch.nn.Parameter(torch.randn(live.lm_head.weight.shape))
    before = copy.deepcopy(live.state_dict())
    opened = open_checkpoint(resolve_source(live, "live"))
    assert torch.equal(opened.tensor(HEAD), live.lm_head.weight)
    experts = {"a": live, "b": save(live, tmp_path / "b")}
    result = merge_models(live, experts, method="mean", dry_run=True)
    assert HEAD in result.heads.shared
    rebuilt = opened.load_model_as(type(live), live.config)
    assert relative_error(logits(rebuilt), logits(live)) < 1e-6
    assert all(torch.equal(before[name], tensor) for name, tensor in live.state_dict().items())


def test_the_head_of_a_part_that_the_whole_ties_stays_the_expert_s(tmp_path):
    """A language model with a head of its own, as an expert over a vision-language model with a tied one."""
    whole = ARCHITECTURES["llava"].build(tie_word_embeddings=True)
    assert HEAD in whole.all_tied_weights_keys
    save(whole, tmp_path / "base")
    text = transformers.LlamaForCausalLM(whole.config.text_config)
    text.config.tie_word_embeddings = False
    text.model.load_state_dict(whole.model.language_model.state_dict())
    save(perturbed(text, 0.1, 1), tmp_path / "text")
    save(perturbed(whole, 0.1, 1), tmp_path / "full")
    experts = {"text": tmp_path / "text", "full": tmp_path / "full"}
    result = merge_models(tmp_path / "base", experts, method="mean", output_dir=tmp_path / "out", progress=False)
    assert result.plan.heads.by_task == {"text": [HEAD], "full": []}
    assert torch.equal(
        load_task_model(tmp_path / "out", "text").lm_head.weight, stored_tensors(tmp_path / "text")[HEAD]
    )


ADAPTERS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "both, rescaled": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "rows of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [4, 5], "lm_head": [6]},
    },
    "rows of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [6, 7]}},
}
TIED_ADAPTERS: dict[str, dict[str, Any]] = {
    "ensured": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "both ensured": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "saved, ensured": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [4, 5]},
    "neither": {"target_modules": ["q_proj"]},
}


@pytest.mark.cases(5)
@pytest.mark.parametrize("name", [*ADAPTERS, *TIED_ADAPTERS])
def test_an_adapter_over_a_tied_base_is_the_model_that_was_trained(name, tmp_path):
    """The model with the adapter on it, not that of `merge_and_unload`, which changes both weights at once."""
    base = TIED_LLAMA.build()
    save(base, tmp_path / "base")
    for task in "ab":
        adapted = train(
            copy.deepcopy(base), LoraConfig(r=4, task_type="CAUSAL_LM", **{**ADAPTERS, **TIED_ADAPTERS}[name])
        )
        adapted.save_pretrained(tmp_path / task)
    trained = logits(adapted)
    opened = open_checkpoint(resolve_source(tmp_path / "base", "base"))
    found = open_checkpoint(resolve_source(tmp_path / "a", "a"), opened)
    assert (HEAD in found.names) == (name in ADAPTERS)
    assert relative_error(logits(found.load_model()), trained) < 1e-5

    # The mean of two equal experts is the expert.
    experts = {task: tmp_path / task for task in "ab"}
    merge_models(tmp_path / "base", experts, method="mean", output_dir=tmp_path / "out", progress=False)
    assert relative_error(logits(load_task_model(tmp_path / "out", "a")), trained) < 1e-5
    if name in TIED_ADAPTERS:
        assert relative_error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), trained) < 1e-5
    # The remedy of the reports: untie the base before the adapter is put on it, and merge that.
    merged = PeftModel.from_pretrained(untied(base), tmp_path / "a").merge_and_unload()
    if name not in TIED_ADAPTERS:
        assert relative_error(logits(merged), trained) < 1e-5


def test_an_adapter_over_a_base_whose_file_holds_the_head(tmp_path):
    folder = save_apart(TIED_LLAMA.build(), tmp_path / "base", 0)
    for task, config in {"a": ADAPTERS["head"], "b": TIED_ADAPTERS["neither"]}.items():
        adapted = train(load(folder), LoraConfig(r=4, task_type="CAUSAL_LM", **config))
        adapted.save_pretrained(tmp_path / task)
        opened = open_checkpoint(resolve_source(folder, "base"))
        found = open_checkpoint(resolve_source(tmp_path / task, task), opened)
        assert relative_error(logits(found.load_model()), logits(adapted)) < 1e-5
    live = get_peft_model(load(folder), LoraConfig(r=4, task_type="CAUSAL_LM", **ADAPTERS["head"]))
    inside = open_checkpoint(resolve_source(live, "base"))
    assert torch.equal(inside.tensor(HEAD), stored_tensors(Path(folder))[HEAD])


def test_a_routed_model_keeps_a_head_that_the_base_ties(tmp_path):
    base = LLAMA.build(tie_word_embeddings=True)
    save(base, tmp_path / "base")
    apart = save_apart(perturbed(base, 0.1, 1), tmp_path / "a", 1)
    save(perturbed(base, 0.1, 2), tmp_path / "b")
    merge_models(
        tmp_path / "base",
        {"a": apart, "b": tmp_path / "b"},
        method="esm++",
        rank=16,
        calibration={task: text_samples(i) for i, task in enumerate("ab")},
        output_dir=tmp_path / "out",
        progress=False,
    )
    opened = open_checkpoint(resolve_source(tmp_path / "base", "base"))
    found = open_checkpoint(resolve_source({"path": tmp_path / "out", "task": "a"}, "a"), opened)
    assert torch.equal(found.tensor(HEAD), stored_tensors(Path(apart))[HEAD])
    assert torch.equal(found.load_model().lm_head.weight, stored_tensors(Path(apart))[HEAD])


def test_adapters_that_tie_differently_are_not_put_on_one_loaded_model(tmp_path):
    base = TIED_LLAMA.build()
    save(base, tmp_path / "base")
    opened, found, trained = open_checkpoint(resolve_source(tmp_path / "base", "base")), {}, {}
    for name in ("head", "saved embeddings", "neither"):
        config = LoraConfig(r=4, task_type="CAUSAL_LM", **{**ADAPTERS, **TIED_ADAPTERS}[name])
        adapted = train(copy.deepcopy(base), config)
        adapted.save_pretrained(tmp_path / name)
        found[name], trained[name] = open_checkpoint(resolve_source(tmp_path / name, name), opened), logits(adapted)
    assert not found["head"].shares_base(found["neither"])
    loader = ExpertLoader()
    for name in ("head", "saved embeddings", "neither", "head"):
        assert relative_error(logits(loader.load(found[name])), trained[name]) < 1e-5


def test_models_that_are_scored_have_the_heads_of_their_tasks(tmp_path):
    """Around one shared body, whose embeddings the head of a task does not touch."""
    base = TIED_LLAMA.build()
    save(base, tmp_path / "base")
    apart = save_apart(perturbed(base, 0.1, 1), tmp_path / "a", 1)
    save(perturbed(base, 0.1, 2), tmp_path / "b")
    plan = merge_models(tmp_path / "base", {"a": apart, "b": tmp_path / "b"}, method="mean", dry_run=True)
    models = CandidateModels(plan, torch.device("cpu")).by_task
    for task, head in {"a": stored_tensors(Path(apart))[HEAD], "b": base.lm_head.weight}.items():
        assert torch.equal(models[task].lm_head.weight, head)
        assert torch.equal(models[task].get_input_embeddings().weight, base.get_input_embeddings().weight)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_head_that_the_file_holds_follows_an_added_token(family, tmp_path):
    base = FAMILIES[family].build()
    rows = base.get_input_embeddings().weight.shape[0]
    folder = save_apart(base, tmp_path / "base", 0)
    more = load(folder)
    more.config.tie_word_embeddings = False  # resizing would tie what the config ties
    more.resize_token_embeddings(rows + 2, mean_resizing=False)
    expert = save(perturbed(more, 0.1, 1), tmp_path / "x")
    plan = merge_models(folder, {"x": expert}, method="mean", dry_run=True)
    head = stored_tensors(Path(folder))[HEAD]
    for model in (plan.base.load_model(), plan.base.load_model_as(type(base), plan.base.config)):
        assert torch.equal(model.lm_head.weight[:rows], head)
        assert not torch.equal(model.lm_head.weight[:rows], model.get_input_embeddings().weight[:rows])
    merge_models(folder, {"x": expert}, method="mean", output_dir=tmp_path / "out", progress=False)
    found, own = stored_tensors(tmp_path / "out"), stored_tensors(Path(expert))
    assert found[HEAD].shape == own[HEAD].shape == (rows + 2, head.shape[1])
    assert torch.allclose(found[HEAD], own[HEAD], atol=1e-6)
    assert load(tmp_path / "out").lm_head.weight.shape == own[HEAD].shape
