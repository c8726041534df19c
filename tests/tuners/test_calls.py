"""Forward passes that trainers and other callers start in their own ways."""

import copy
import pickle
from types import MethodType, SimpleNamespace

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import DataCollatorWithFlattening, LlamaForCausalLM

from hf_esm.tuners import RoutedExpertsConfig
from hf_esm.tuners.routed.model import recording, route, routing_state
from support.architectures import ARCHITECTURES
from support.routed import TASKS, rebuilt, refused, save_adapter, task_samples


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A Llama of six blocks, whose router decides in the fourth, and a row of each task with an answer in it."""
    architecture = ARCHITECTURES["llama"]
    base = rebuilt(architecture, num_hidden_layers=6)
    folder = tmp_path_factory.mktemp("deep") / "adapter"
    save_adapter(base, architecture, folder, "discriminant", depth=0.6)
    rows = [task_samples(architecture, task, seed=3)[0]["input_ids"].repeat(4)[:10] for task in TASKS]
    ids = torch.stack(rows)
    labels = ids.clone()
    labels[:, :6] = -100
    return SimpleNamespace(base=base, folder=folder, batch={"input_ids": ids, "labels": labels})


class Subclass(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def adapted(deep, model_class: type = LlamaForCausalLM) -> PeftModel:
    base = copy.deepcopy(deep.base)
    base.__class__ = model_class
    return PeftModel.from_pretrained(base, deep.folder).eval()


@torch.no_grad()
def test_forward_by_name_decides_as_a_call_does(deep):
    model = adapted(deep).get_base_model()
    with recording(model) as records:
        expected = model(**deep.batch).logits
    with route(model, "static"):
        static = model.forward(**deep.batch).logits
    assert not torch.allclose(static, expected, atol=1e-2)

    def same(other):
        state = routing_state(other)
        for call in (other, other.forward):
            with recording(other) as again:
                found = call(**deep.batch).logits
            assert torch.equal(found, expected) and not state.local.frames
            assert [record[:2] for record in again] == [record[:2] for record in records]  # decided once

    same(model)
    same(copy.deepcopy(model))
    same(adapted(deep, Subclass).get_base_model())
    same(pickle.loads(pickle.dumps(model)))
    same(add_hook_to_module(copy.deepcopy(model), ModelHook()))
    same(remove_hook_from_module(add_hook_to_module(copy.deepcopy(model), ModelHook())))
    body = adapted(deep).get_base_model().model
    assert torch.equal(body.forward(deep.batch["input_ids"])[0], body(deep.batch["input_ids"])[0])
    assert torch.equal(deep.base.forward(**deep.batch).logits, static)  # of the same class
    unloaded = adapted(deep).unload()
    assert torch.equal(unloaded.forward(**deep.batch).logits, static)


@torch.no_grad()
def test_a_pass_by_name_that_breaks_leaves_nothing_behind(deep):
    model = adapted(deep).get_base_model()
    expected = model(**deep.batch).logits
    for error in (ValueError, KeyboardInterrupt):

        def fail(*inputs, error=error):
            raise error

        handle = model.model.layers[5].register_forward_pre_hook(fail)
        for call in (model, model.forward):
            with pytest.raises(error):
                call(input_ids=deep.batch["input_ids"].flip(1))
        handle.remove()
        assert torch.equal(model.forward(**deep.batch).logits, expected)


PACKED = {
    "position_ids start again": {"position_ids": torch.tensor([[*range(6), *range(4)]])},
    "seq_idx counts them": {"seq_idx": torch.tensor([[0] * 6 + [1] * 4])},
    "cu_seq_lens_q counts 2 of them": {"cu_seq_lens_q": torch.tensor([0, 6, 10])},
}


@pytest.mark.parametrize(("says", "inputs"), PACKED.items(), ids=PACKED)
def test_rows_of_several_samples_are_refused_unless_their_task_is_named(deep, says, inputs):
    model = adapted(deep)
    row = {"input_ids": deep.batch["input_ids"][:1], **inputs}
    refused(f"holds several samples ({says})", model, **row)
    with route(model, TASKS[0]):
        model(**row)


@torch.no_grad()
def test_the_collator_without_padding_is_refused_and_positions_of_padding_are_not(deep):
    model, ids = adapted(deep), deep.batch["input_ids"]
    batch = DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in ids])
    refused("Give each sample a row", model, **batch)
    one = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": ids[0].tolist()}])
    del one["labels"]  # whose first token would be the prompt
    torch.testing.assert_close(model(**one).logits, model(ids[:1]).logits)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as Transformers counts them
    found = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found[1, 3:], model(ids[1:2, 3:]).logits[0], atol=1e-4, rtol=1e-4)


def test_a_pass_that_would_train_nothing_is_refused_with_what_trains(deep):
    model = adapted(deep).train()
    model.enable_input_require_grads()  # with which the backward pass runs, and changes nothing
    refused("call `set_requires_grad('default')` of the PeftModel; to score, call `eval()`", model, **deep.batch)
    model.eval()(**deep.batch)
    with torch.no_grad():
        model.train()(**deep.batch)
    for kind in (PromptTuningConfig, PrefixTuningConfig):
        own = get_peft_model(model.get_base_model(), kind(task_type="CAUSAL_LM", num_virtual_tokens=2))
        own.train()(**deep.batch).loss.backward()
    model = adapted(deep).train()
    model.set_requires_grad("default")
    model(**deep.batch).loss.backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in model.parameters())


def test_experts_on_an_output_map_that_a_fused_loss_passes_over_are_refused(deep):
    base = copy.deepcopy(deep.base)
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.clone())
    config = RoutedExpertsConfig(tasks=TASKS, r=2, router="oracle", target_modules=["q_proj", "lm_head"])
    model = get_peft_model(base, config).eval()
    with route(model, TASKS[0]):
        model(**deep.batch)

        def fused(self, input_ids, labels):
            hidden = self.model(input_ids)[0]
            return torch.nn.functional.cross_entropy((hidden @ self.lm_head.weight.T).mT, labels)

        base.forward = MethodType(fused, base)
        refused("'lm_head' has experts, and this pass did not run them", base, **deep.batch)
        with model.disable_adapter():
            base(**deep.batch)
