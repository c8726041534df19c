"""LoRA adapters as experts: each must merge exactly as the full model that PEFT itself makes of it."""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from helpers import VOCABULARY, Architecture, perturbed, save, text_samples
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from problems import relative_error
from safetensors.torch import load_file, save_file
from tiny import BERT, assert_refused, forbid_calibration, snapshot
from transformers import BertModel, PreTrainedModel

from hf_esm import merge_models
from hf_esm.checkpoints import open_checkpoint, resolve_source


DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
GPT2 = Architecture(
    "GPT2LMHeadModel", {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
)
LLAMA = Architecture("LlamaForCausalLM", DECODER)
MIXTRAL = Architecture("MixtralForCausalLM", {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2})

CLASSIFY = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
GENERATE = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
CONV1D = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}


@dataclass(frozen=True)
class Case:
    """An adapter and the base that it is merged over.

    Attributes:
        architecture: of the class that the adapter is trained on.
        config: arguments of `LoraConfig`.
        base: class of the base; by default the same.
        own: parts of the names of weights that must stay the adapter's own.
        methods: what to merge by.
    """

    architecture: Architecture
    config: dict[str, Any]
    base: str = ""
    own: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("esm",)
    settings: dict[str, Any] = field(default_factory=dict)


HEAD = ("classifier", "pooler")
ALL = ("mean", "tsv-m", "esm")
CASES = {
    "bert-on-its-body": Case(BERT, CLASSIFY, "BertModel", HEAD, ALL),
    "bert-on-a-classifier": Case(BERT, CLASSIFY, methods=ALL),
    "bert-on-a-classifier-of-other-labels": Case(BERT, CLASSIFY, own=HEAD, settings={"num_labels": 5}),
    "bert-on-a-language-model": Case(BERT, CLASSIFY, "BertForMaskedLM", HEAD),
    "bare-body-on-a-classifier": Case(
        Architecture("BertModel", BERT.settings),
        {**CLASSIFY, "task_type": "FEATURE_EXTRACTION"},
        "BertForSequenceClassification",
    ),
    "no-task-type": Case(BERT, {**CLASSIFY, "task_type": None, "modules_to_save": ["classifier"]}, "BertModel", HEAD),
    "gpt2": Case(GPT2, CONV1D, methods=ALL),
    "gpt2-on-its-body": Case(GPT2, CONV1D, "GPT2Model"),
    "llama": Case(LLAMA, GENERATE, methods=ALL),
    "mixtral": Case(MIXTRAL, {**GENERATE, "target_modules": ["q_proj", "v_proj"]}),
    "expert-parameters": Case(
        MIXTRAL,
        {
            "task_type": "CAUSAL_LM",
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
        methods=("tsv-m",),
    ),
    "patterns": Case(
        BERT,
        {
            **CLASSIFY,
            "target_modules": ["query", "value", "dense"],
            "exclude_modules": ["bert.pooler.dense"],
            "rank_pattern": {"query": 2, r"attention\.output\.dense": 6},
            "alpha_pattern": {"query": 3, "value": 20},
        },
        "BertModel",
        HEAD,
    ),
    "rank-stabilised": Case(BERT, {**CLASSIFY, "use_rslora": True, "rank_pattern": {"query": 2}}, "BertModel", HEAD),
    "bias-all": Case(BERT, {**CLASSIFY, "bias": "all"}, "BertModel", HEAD),
    "bias-lora-only": Case(BERT, {**CLASSIFY, "bias": "lora_only"}, "BertModel", HEAD),
    "bias-of-the-update": Case(BERT, {**CLASSIFY, "lora_bias": True}, "BertModel", HEAD),
    "dora": Case(BERT, {**CLASSIFY, "use_dora": True}, "BertModel", HEAD),
    "dora-conv1d": Case(GPT2, {**CONV1D, "use_dora": True}),
    "dora-embedding": Case(BERT, {**CLASSIFY, "target_modules": ["word_embeddings"], "use_dora": True}),
    "embedding": Case(BERT, {**CLASSIFY, "target_modules": ["query", "word_embeddings"]}, "BertModel", HEAD),
    "tied-embedding": Case(GPT2, {**CONV1D, "target_modules": ["c_attn", "wte"]}),
    "embedding-and-head": Case(LLAMA, {**GENERATE, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "saved-modules": Case(LLAMA, {**GENERATE, "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "other-initialisation": Case(BERT, {**CLASSIFY, "init_lora_weights": "orthogonal"}, "BertModel", HEAD),
}


@torch.no_grad()
def train(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """A PEFT model with noise, of the size of the weights, on everything that PEFT would train."""
    torch.manual_seed(3)
    model = get_peft_model(copy.deepcopy(model), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def save_case(case: Case, folder: Path) -> SimpleNamespace:
    """A base, a full expert, an adapter, and what PEFT makes of the adapter, each in its own folder."""
    trained_on = case.architecture.build(**case.settings)
    if case.base == "BertForMaskedLM":
        # As bert-base-uncased is stored: a pooler that the class in its config does not have.
        base = Architecture("BertForPreTraining", BERT.settings).build()
        base.bert.load_state_dict(trained_on.bert.state_dict())
        base.config.architectures = [case.base]
        save(base, folder / "base")
        rewrite(folder / "base" / "config.json", architectures=[case.base])
    else:
        base = case.architecture.build(case.base or None)
        body, own = getattr(base, base.base_model_prefix, base), getattr(trained_on, base.base_model_prefix, trained_on)
        body.load_state_dict(own.state_dict())
        save(base, folder / "base")
    save(perturbed(trained_on, 0.2, 1), folder / "full")
    train(trained_on, LoraConfig(r=4, lora_alpha=8, **case.config)).save_pretrained(folder / "adapter")
    unloaded = PeftModel.from_pretrained(copy.deepcopy(trained_on), folder / "adapter").merge_and_unload()
    save(unloaded, folder / "unloaded")
    return SimpleNamespace(base=folder / "base", adapter=folder / "adapter", full=folder / "full", unloaded=unloaded)


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT, on tied weights and on configs that it cannot look up
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_adapter_merges_as_the_model_that_peft_makes_of_it(case, tmp_path):
    made = save_case(case, tmp_path)
    base = weights(made.base)
    for method in case.methods:
        calibration = {"lora": text_samples(1), "full": text_samples(2)} if method == "esm" else None
        found, expected = (
            merge_models(
                made.base,
                {"lora": expert, "full": made.full},
                calibration=calibration,
                method=method,
                progress=False,
            )
            for expert in (made.adapter, tmp_path / "unloaded")
        )
        merged, literal = weights(found.output_dir), weights(expected.output_dir)
        assert merged.keys() == literal.keys() == base.keys()
        for name, weight in base.items():
            assert relative_error(merged[name] - weight, literal[name] - weight) < 1e-5, (method, name)
        assert any(not torch.equal(merged[name], weight) for name, weight in base.items())
    head = {live for name, live in found.plan.experts["lora"].names.items() if name in found.plan.heads.own["lora"]}
    assert {part for part in HEAD if any(part in live for live in head)} == set(case.own)
    task_model, trained = found.load_task_model("lora"), made.unloaded.state_dict()
    assert type(task_model) is type(made.unloaded)
    assert all(torch.equal(task_model.state_dict()[live], trained[live]) for live in head)
