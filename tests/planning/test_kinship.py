"""Experts of another pretraining, and bases without their weights, are told from fine-tunes by a sample of weights."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModel, PreTrainedModel

from hf_esm import HfEsmError, merge_models
from hf_esm.checkpoints import open_checkpoint, resolve_source
from hf_esm.errors import IncompatibleError
from hf_esm.planning.kinship import check_related
from support import reference
from support.architectures import ARCHITECTURES
from support.helpers import floating_weights, perturb, perturbed, save, text_samples, train
from support.tiny import BERT, GPT2, LLAMA, assert_refused, forbid_calibration


@torch.no_grad()
def stranger(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model of another pretraining: the same shapes, and other weights."""
    other = perturbed(model, 0, seed)
    for weight in floating_weights(other).values():
        weight.zero_()
    return perturb(other, 0.2, seed)


def related(base: PreTrainedModel, *experts: PreTrainedModel, shared: str = "") -> list[str]:
    opened = open_checkpoint(resolve_source(base, "base"))
    checkpoints = {str(i): open_checkpoint(resolve_source(e, f"expert {i}"), opened) for i, e in enumerate(experts)}
    names = [name for name in opened.names if shared in name and all(name in e.names for e in checkpoints.values())]
    return check_related(opened, checkpoints, names)


UNRELATED = {name: ARCHITECTURES[name] for name in ("bert", "resnet", "t5", "qwen3-moe", "gpt2", "vit")}


@pytest.mark.parametrize("architecture", UNRELATED.values(), ids=UNRELATED)
def test_models_of_another_pretraining_are_no_fine_tunes(architecture):
    base = architecture.build()
    assert related(base, perturbed(base, 0.02, 1)) == []
    with pytest.raises(IncompatibleError, match=r"expert 1 .* is not a fine-tune of base \(.*\): its matrices"):
        related(base, perturbed(base, 0.02, 1), stranger(base, 2))
    with pytest.raises(IncompatibleError, match=r"expert 0 .* \(2 of 2 experts are not\)"):
        related(stranger(base, 3), base, perturbed(base, 0.02, 1))


def test_the_medians_are_those_of_the_formulas():
    base, seed = LLAMA.build(num_hidden_layers=1), torch.seed() % 1000
    tuned = perturbed(base, 0.15, seed)
    maps = [name for name, weight in floating_weights(base).items() if "_proj" in name]
    assert len(maps) == 7  # fewer than are sampled
    weights = [[floating_weights(model)[name] for name in maps] for model in (base, tuned)]
    _, size = reference.kinship(*weights)
    (warning,) = related(base, tuned, shared="_proj")
    assert f"its updates are {size:.2f} times as large" in warning
    weights[1] = [floating_weights(other := stranger(base, seed))[name] for name in maps]
    cosine, _ = reference.kinship(*weights)
    with pytest.raises(IncompatibleError, match=f"a cosine of {cosine:.2f} with".replace(".", r"\.")):
        related(base, other, shared="_proj")


@torch.no_grad()
def test_a_fine_tune_that_scales_its_weights_is_one_and_zeros_say_nothing():
    base = LLAMA.build()
    scaled, no_number = perturbed(base, 0.01, 1), perturbed(base, 0.01, 2)
    for weight in floating_weights(scaled).values():
        weight.mul_(2.5)
    (warning,) = related(base, scaled)
    assert "1.5" in warning and "Is it a fine-tune of this base?" in warning
    maps = [name for name in floating_weights(base) if "proj" in name]
    assert len(maps) == 14
    for i, name in enumerate(maps[:-1]):  # zero-initialised maps, and damaged ones, which another check names
        damaged = no_number.state_dict()[name]
        base.state_dict()[name].zero_() if i < 3 else damaged.fill_(float("nan") if i < 5 else 1e38)
    assert related(base, no_number) == []
    assert related(base, stranger(base, 1), shared="norm") == []  # nothing to compare


def test_a_stranger_is_refused_before_the_merge_reads_samples_and_by_a_dry_run(tmp_path, monkeypatch):
    forbid_calibration(monkeypatch)
    base = BERT.build()
    for name, model in (("base", base), ("tuned", perturbed(base, 0.02, 1)), ("other", stranger(base, 2))):
        save(model, tmp_path / name)
    experts = {task: tmp_path / task for task in ("tuned", "other")}
    says = ["expert 'other'", "is not a fine-tune of base (", "Pass the checkpoint that it was tuned from"]
    arguments = {"calibration": {task: text_samples(1) for task in experts}, "output_dir": tmp_path / "merged"}
    for more in ({}, {"dry_run": True}, {"method": "mean", "calibration": None}):
        assert_refused(tmp_path, says, {"base": tmp_path / "base", "experts": experts, **arguments, **more})
    save(perturbed(stranger(base, 2), 0.02, 3), tmp_path / "later")
    merge_models(tmp_path / "other", {"later": tmp_path / "later"}, method="mean", progress=False)


def test_a_base_whose_weights_were_not_loaded_is_refused(tmp_path):
    base = LLAMA.build()
    torch.manual_seed(7)
    empty = type(base)(base.config)
    experts = {str(seed): save(perturbed(base, 0.02, seed), tmp_path / str(seed)) for seed in (1, 2)}
    with pytest.raises(HfEsmError, match=r"expert '1' .* base \(LlamaForCausalLM\) \(2 of 2 .* weights loaded"):
        merge_models(empty, experts, method="mean", progress=False)


def lora(model: PreTrainedModel, **settings) -> torch.nn.Module:
    return train(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **settings))


def test_adapters_tell_by_the_matrices_that_they_hold_in_full(tmp_path):
    base = LLAMA.build()
    whole = lora(perturbed(base, 0, 0), modules_to_save=["embed_tokens", "lm_head"])
    whole.save_pretrained(tmp_path / "whole")
    lora(perturbed(base, 0, 0)).save_pretrained(tmp_path / "alone")
    for model, fits in ((base, True), (stranger(base, 1), False)):
        save(model, tmp_path / "base")
        opened = open_checkpoint(resolve_source(tmp_path / "base", "base"))
        whole, alone = (open_checkpoint(resolve_source(tmp_path / name, name), opened) for name in ("whole", "alone"))
        assert check_related(opened, {"alone": alone}, opened.names) == []
        if fits:
            assert not [w for w in check_related(opened, {"whole": whole}, opened.names) if "fine-tune" not in w]
        else:
            with pytest.raises(IncompatibleError, match=r"whole .* is not a fine-tune"):
                check_related(opened, {"whole": whole}, opened.names)


def test_an_adapter_over_a_base_that_was_never_trained_is_warned_of(tmp_path):
    base = LLAMA.build()
    torch.manual_seed(7)
    empty = type(base)(base.config)
    lora(perturbed(base, 0, 0)).save_pretrained(tmp_path / "adapter")
    warnings = [
        merge_models(model, {"task": tmp_path / "adapter"}, method="mean", dry_run=True).warnings
        for model in (empty, base)
    ]
    (warning,) = set(warnings[0]) - set(warnings[1])
    assert "base (LlamaForCausalLM): each of its norms" in warning
    assert "Were the weights of the base loaded?" in warning


def test_tokens_in_another_order_make_no_stranger(tmp_path):
    """Embeddings are left out, and so the order of their rows does not matter."""
    base = GPT2.build()
    tuned = perturbed(base, 0.02, 1)
    order = torch.randperm(base.config.vocab_size)
    with torch.no_grad():
        tuned.transformer.wte.weight.copy_(base.transformer.wte.weight[order])
    assert related(base, tuned) == []


@pytest.mark.slow
def test_a_text_expert_of_another_base_is_refused_over_a_multimodal_base(tmp_path):
    """Only the weights of the part are compared; the others are the base's."""
    base = ARCHITECTURES["llava"].build()
    language = base.model.language_model
    save(base, tmp_path / "base")
    for name, model in (("tuned", perturbed(language, 0.02, 1)), ("other", stranger(language, 2))):
        save(model, tmp_path / name)
    merge_models(tmp_path / "base", {"tuned": tmp_path / "tuned"}, method="mean", dry_run=True)
    with pytest.raises(IncompatibleError, match=r"expert 'other' .* is not a fine-tune"):
        merge_models(tmp_path / "base", {"other": tmp_path / "other"}, method="mean", dry_run=True)


@pytest.mark.slow
def test_a_task_of_a_routed_model_of_another_base_is_refused(models, merged, tmp_path):
    save(stranger(AutoModel.from_pretrained(models / "base"), 1), tmp_path / "base")
    expert = {"path": merged, "task": "a"}
    merge_models(models / "base", {"a": expert}, method="mean", dry_run=True)
    with pytest.raises(IncompatibleError, match=r"expert 'a' .* is not a fine-tune"):
        merge_models(tmp_path / "base", {"a": expert}, method="mean", dry_run=True)
