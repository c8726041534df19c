"""The difference of an expert's weights from those of a merged model, of every kind of expert."""

import pytest
import torch
import transformers
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from hf_esm import merge_models
from hf_esm.checkpoints import open_checkpoint, resolve_source
from support.architectures import ARCHITECTURES
from support.helpers import perturbed, save, train
from support.problems import relative_error
from support.tiny import LLAMA
from support.vocabularies import HEAD, TOKENS, write


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]  # PEFT, of what it saves


def check(expert, trained, merged, own=None) -> None:
    """Every residual is the trained weight less the merged one, in the rows that the expert has."""
    generator = torch.Generator().manual_seed(5)
    for name, live in merged.names.items():
        other = merged.tensor(name) + 0.3 * torch.randn(merged.shape(name), generator=generator)
        found, weight = expert.residual(name, other), trained[live]
        if weight.shape != other.shape:
            assert not found[own:].any() and found.shape == other.shape
            found, other, weight = found[:own], other[:own], weight[:own]
        assert found.dtype == torch.float32
        assert relative_error(found, weight - other) < 1e-5, name


@pytest.mark.parametrize("kind", ["full", "lora", "dora", "saved"])
def test_rows_of_tokens_that_an_expert_lacks_have_no_residual(kind, tmp_path):
    """Though the merged model's rows of them differ from the base's."""
    base = LLAMA.build(vocab_size=TOKENS)
    write(tmp_path, "base", base)
    write(tmp_path, "more", perturbed(base, 0.2, 1), ["<a>", "<b>"], rows=TOKENS + 2)
    if kind == "full":
        trained = perturbed(base, 0.2, 2)
        write(tmp_path, "expert", trained)
    else:
        settings = {"target_modules": ["q_proj", "lm_head"], "use_dora": kind == "dora"}
        saved = {"modules_to_save": ["norm"]} if kind == "saved" else {}
        model = train(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(r=2, **settings, **saved))
        model.save_pretrained(tmp_path / "expert")
        trained = model.merge_and_unload()
    experts = {task: tmp_path / task for task in ("more", "expert")}
    plan = merge_models(tmp_path / "base", experts, method="mean", dry_run=True, progress=False)
    assert plan.base.shape("lm_head.weight")[0] == TOKENS + 2
    check(plan.experts["expert"], trained.state_dict(), plan.base, TOKENS)
    more = AutoModelForCausalLM.from_pretrained(tmp_path / "more").state_dict()
    assert not plan.experts["more"].residual("lm_head.weight", plan.base.tensor("lm_head.weight"))[TOKENS:].any()
    assert torch.equal(plan.base.tensor("lm_head.weight")[TOKENS:], more[HEAD][TOKENS:])


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapter"])
def test_an_expert_of_a_part_goes_back_to_the_base_elsewhere(adapted, tmp_path):
    """The rest of its model is the base's, which other experts have changed in the merged model."""
    whole = ARCHITECTURES["llava"].build()
    save(whole, tmp_path / "base")
    text = transformers.LlamaForCausalLM(whole.config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    if adapted:
        model = train(text, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model.save_pretrained(tmp_path / "text")
        text = model.merge_and_unload()
    else:
        text = perturbed(text, 0.2, 1)
        save(text, tmp_path / "text")
    base = open_checkpoint(resolve_source(tmp_path / "base", "base"))
    expert = open_checkpoint(resolve_source(tmp_path / "text", "text"), base)
    state = {f"model.language_model.{name}": weight for name, weight in text.model.state_dict().items()}
    check(expert, whole.state_dict() | state | {HEAD: text.lm_head.weight.detach()}, base)
