"""LoRA adapters as experts: each merges exactly as the full model that PEFT makes of the adapter."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertModel, PreTrainedModel

from hf_esm import merge_models
from hf_esm.checkpoints.sources import Access, open_checkpoint, resolve_source
from support.helpers import Architecture, perturbed, save, stored_tensors, text_samples, untied
from support.problems import relative_error
from support.tiny import BERT, DECODER, GPT2, LLAMA, assert_refused, forbid_calibration, snapshot


pytestmark = pytest.mark.slow


MIXTRAL = Architecture("MixtralForCausalLM", {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2})

TIED_LLAMA = Architecture("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True})

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
LM_HEAD = ("lm_head",)
ALL = ("mean", "tsv-m", "esm")
CASES = {
    "bert-on-its-body": Case(BERT, CLASSIFY, "BertModel", HEAD, ALL),
    "bert-on-a-classifier": Case(BERT, CLASSIFY, own=HEAD, methods=ALL),
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
        methods=("esm", "tsv-m"),
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
    "dora-embedding": Case(BERT, {**CLASSIFY, "target_modules": ["word_embeddings"], "use_dora": True}, own=HEAD),
    "embedding": Case(BERT, {**CLASSIFY, "target_modules": ["query", "word_embeddings"]}, "BertModel", HEAD),
    "tied-embedding-beside-which-peft-saves-it": Case(
        TIED_LLAMA, {**GENERATE, "target_modules": ["q_proj", "embed_tokens"]}, own=LM_HEAD
    ),
    "tied-embedding": Case(GPT2, {**CONV1D, "target_modules": ["c_attn", "wte"]}, own=LM_HEAD),
    "tied-head": Case(GPT2, {**CONV1D, "target_modules": ["c_attn", "lm_head"]}, own=LM_HEAD),
    "tied-embedding-saved-alone": Case(GPT2, {**CONV1D, "modules_to_save": ["wte"]}, own=LM_HEAD),
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
    # Like bert-base-uncased, a language model may hold a pooler that the class in its config does not have.
    masked = case.base == "BertForMaskedLM"
    base = case.architecture.build("BertForPreTraining" if masked else case.base or None)
    body, own = (getattr(model, model.base_model_prefix, model) for model in (base, trained_on))
    body.load_state_dict(own.state_dict())
    save(base, folder / "base")
    if masked:
        rewrite(folder / "base" / "config.json", architectures=[case.base])
    save(perturbed(trained_on, 0.2, 1), folder / "full")
    train(trained_on, LoraConfig(r=4, lora_alpha=8, **case.config)).save_pretrained(folder / "adapter")
    unloaded = PeftModel.from_pretrained(untied(trained_on), folder / "adapter").merge_and_unload()
    return SimpleNamespace(
        base=folder / "base",
        adapter=folder / "adapter",
        full=folder / "full",
        unloaded=Path(save(unloaded, folder / "unloaded")),
        model=unloaded,
    )


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.cases(8)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT, on tied weights and on configs that it cannot look up
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_adapter_merges_as_the_model_that_peft_makes_of_it(case, tmp_path):
    made = save_case(case, tmp_path)
    base = stored_tensors(made.base)
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
            for expert in (made.adapter, made.unloaded)
        )
        merged, literal = stored_tensors(found.output_dir), stored_tensors(expected.output_dir)
        assert merged.keys() == literal.keys() == base.keys()
        for name, weight in base.items():
            assert relative_error(merged[name] - weight, literal[name] - weight) < 1e-5, (method, name)
        assert any(not torch.equal(merged[name], weight) for name, weight in base.items())
    kept = found.plan.heads.by_task["lora"]
    head = {live for name, live in found.plan.experts["lora"].names.items() if name in kept}
    assert {part for part in HEAD + LM_HEAD if any(part in live for live in head)} == set(case.own)
    task_model, trained = found.load_task_model("lora"), made.model.state_dict()
    assert type(task_model) is type(made.model)
    for live in head:
        assert torch.allclose(task_model.state_dict()[live], trained[live], rtol=1e-6, atol=1e-6), live


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return save_case(CASES["bert-on-its-body"], tmp_path_factory.mktemp("classifier"))


@pytest.fixture
def made(classifier, tmp_path):
    """A copy of the models of one case, which a test may damage."""
    shutil.copytree(classifier.base.parent, tmp_path, dirs_exist_ok=True)
    return SimpleNamespace(base=tmp_path / "base", adapter=tmp_path / "adapter", full=tmp_path / "full")


def settings(**changes: Any) -> Callable:
    return lambda made: rewrite(made.adapter / "adapter_config.json", **changes)


def tensors(change: Callable[[str, torch.Tensor], Any]) -> Callable:
    """Replace every stored tensor; those that become None are left out."""

    def damage(made):
        path = made.adapter / "adapter_model.safetensors"
        changed = {key: change(key, value) for key, value in load_file(path).items()}
        save_file({key: value for key, value in changed.items() if value is not None}, path)

    return damage


def cut(made):
    path = made.adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(made):
    path = made.adapter / "adapter_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def trained(architecture: Architecture, config: PeftConfig, **settings: Any) -> Callable:
    """Put another adapter in the place of the case's."""

    def replace(made):
        shutil.rmtree(made.adapter)
        train(architecture.build(**settings), config).save_pretrained(made.adapter)

    return replace


def on_base(architecture: Architecture, model_class: str, config: dict[str, Any]) -> Callable:
    """Put another base in the place of the case's, with an adapter and an expert on it."""

    def replace(made):
        for folder in (made.base, made.full):
            shutil.rmtree(folder)
        save(architecture.build(model_class), made.base)
        save(perturbed(architecture.build(), 0.1, 1), made.full)
        trained(architecture, LoraConfig(**config))(made)

    return replace


QUANTISED = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
AGAIN = "again"
UNLOAD = "merge_and_unload()"
OTHER_BASE = "trained on another base"
REFUSED = {
    "pissa": (settings(init_lora_weights="pissa_niter_4"), ["'pissa_niter_4'", "path_initial_model_for_weight_conv"]),
    "olora": (settings(init_lora_weights="olora"), ["'olora'", "path_initial_model_for_weight_conversion"]),
    "unknown-type": (settings(peft_type="ESSENTIAL"), ["adapter_config.json", "ESSENTIAL", "upgrade peft"]),
    "broken-config": (lambda made: (made.adapter / "adapter_config.json").write_text("{"), ["adapter_config.json"]),
    "empty": (
        tensors(lambda key, value: value[:0] if "query" in key else value),
        ["2 of the 6 tensors", "query.lora_A", "ZeRO-3", AGAIN],
    ),
    "cut-short": (cut, ["cannot be read", AGAIN]),
    "no-file": (lambda made: (made.adapter / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors"]),
    "pickled": (pickled, ["adapter_model.bin", "allow_pickle=True"]),
    "half-an-update": (tensors(lambda key, value: None if "lora_B" in key else value), ["lora_B", AGAIN]),
    "no-head": (tensors(lambda key, value: None if "classifier" in key else value), ["classifier", AGAIN]),
    "not-finite": (tensors(lambda key, value: value / 0 if "query" in key else value), ["query.weight", "NaN", AGAIN]),
    "no-update": (tensors(lambda key, value: value * ("lora_B" not in key)), ["equals the base", "Leave it out"]),
    "other-width": (
        trained(BERT, LoraConfig(**CLASSIFY), hidden_size=32),
        ["lora_A", "[8, 32] in its file", "[8, 16] on the base", OTHER_BASE],
    ),
    "other-depth": (trained(BERT, LoraConfig(**CLASSIFY), num_hidden_layers=2), ["layer.1", OTHER_BASE]),
    "other-architecture": (trained(GPT2, LoraConfig(**CONV1D)), ["c_attn", OTHER_BASE]),
    "no-such-task": (settings(task_type="SEQ_2_SEQ_LM"), ["no place", "query.lora_A", OTHER_BASE]),
    "head-nowhere": (on_base(LLAMA, "LlamaModel", GENERATE), ["lm_head.weight", "the adapter was trained on"]),
    "quantised-base": (
        lambda made: rewrite(made.base / "config.json", **QUANTISED),
        ["base (", "(gptq)", "quantised from"],
    ),
    "quantised-expert": (
        lambda made: rewrite(made.full / "config.json", **QUANTISED),
        ["'full'", "(gptq)", "quantised from"],
    ),
    "as-base": (lambda made: {"base": made.adapter}, ["base (", "the base must be a full model"]),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("damage", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_sound_lora_update_of_the_base_is_refused(damage, says, made, tmp_path, monkeypatch):
    forbid_calibration(monkeypatch)
    changes = damage(made) or {}
    experts = {"lora": made.adapter, "full": made.full}
    calibration = {task: text_samples(1) for task in experts}
    arguments = {
        "base": made.base,
        "experts": experts,
        "calibration": calibration,
        "output_dir": str(tmp_path / "out"),
    }
    named = [] if says[0] in ("base (", "'full'") else [f"expert 'lora' ({made.adapter})"]
    assert_refused(tmp_path, [*named, *says], {**arguments, **(changes if isinstance(changes, dict) else {})})


def test_a_pickled_adapter_is_read_where_that_is_allowed(made):
    stored = load_file(made.adapter / "adapter_model.safetensors")
    pickled(made)
    base = open_checkpoint(resolve_source(made.base, "base"))
    found = open_checkpoint(resolve_source(made.adapter, "lora", Access(allow_pickle=True)), base)
    assert torch.equal(found.tensor("classifier.bias"), stored["base_model.model.classifier.bias"])


def test_adapters_name_no_labels_so_that_their_heads_are_their_own(made, tmp_path):
    """Though the base does, which they were all trained over."""
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    base = BERT.build("BertForSequenceClassification", num_labels=2, **names)
    save(base, tmp_path / "base")
    experts = {}
    for task in "ab":
        train(base, LoraConfig(**CLASSIFY)).save_pretrained(tmp_path / task)
        experts[task] = tmp_path / task
    plan = merge_models(tmp_path / "base", experts, method="mean", dry_run=True)
    assert all(
        {name.partition(".")[0] for name in own} == {"pooler", "classifier"} for own in plan.heads.by_task.values()
    )
    assert not any(
        merge_models(tmp_path / "base", experts, method="mean", heads="merge", dry_run=True).heads.by_task.values()
    )


def test_adapters_that_leave_the_head_alone_leave_it_to_all(tmp_path):
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    base = BERT.build("BertForSequenceClassification", num_labels=2, **names)
    save(base, tmp_path / "base")
    settings = {"target_modules": ["query"], "task_type": None, "modules_to_save": None}
    train(base, LoraConfig(**CLASSIFY | settings)).save_pretrained(tmp_path / "lora")
    experts = {"lora": tmp_path / "lora", "full": save(perturbed(base, 0.1, 1), tmp_path / "full")}
    assert not any(merge_models(tmp_path / "base", experts, method="mean", dry_run=True).heads.by_task.values())


def test_an_adapter_is_an_update_in_float32_and_writes_no_copy_of_the_model(classifier, tmp_path, monkeypatch):
    """Also over a base in bfloat16, which is far less precise than the update."""
    live = BertModel.from_pretrained(classifier.base, dtype=torch.bfloat16)
    save(live, tmp_path / "base")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = snapshot(tmp_path), snapshot(classifier.base.parent)
    stored = load_file(classifier.adapter / "adapter_model.safetensors")
    for base in (live, tmp_path / "base"):
        opened = open_checkpoint(resolve_source(base, "base"))
        found = open_checkpoint(resolve_source(classifier.adapter, "lora"), opened)
        assert all(parameter.is_meta for parameter in found.skeleton.parameters())
        for name in opened.names:
            update = found.update(name, opened.tensor(name))
            path = f"base_model.model.bert.{name.removesuffix('.weight')}"
            if f"{path}.lora_A.weight" in stored:
                expected = 2 * stored[f"{path}.lora_B.weight"] @ stored[f"{path}.lora_A.weight"]
                assert update.dtype == torch.float32
                assert relative_error(update, expected) < 1e-6, name
            else:
                assert not update.any(), name
        assert found.load_model().dtype == torch.bfloat16
    assert (snapshot(tmp_path), snapshot(classifier.base.parent)) == before


def test_what_no_adapter_touches_is_planned_and_left_as_it_is(classifier, tmp_path):
    experts = {"a": classifier.adapter, "b": shutil.copytree(classifier.adapter, tmp_path / "b")}
    stored = load_file(tmp_path / "b" / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in stored.items()}, tmp_path / "b" / "adapter_model.safetensors")
    plan = merge_models(classifier.base, experts, method="tsv-m", resume_dir=tmp_path / "work", dry_run=True)
    adapted = {name for name in plan.heads.shared if "query.weight" in name or "value.weight" in name}
    assert plan.unchanged == set(plan.heads.shared) - adapted
    assert plan.kinds == {"linear maps": len(adapted)}
    assert plan.scratch_bytes == sum(4 * math.prod(plan.base.shape(name)) for name in adapted)
    assert plan.learning_bytes == 0
    samples = {task: [{"input_ids": [5, 6, 7]}] for task in experts}
    method = "concrete-task-arithmetic"
    learns = merge_models(classifier.base, experts, method=method, calibration=samples, dry_run=True)
    whole = sum(4 * math.prod(plan.base.shape(name)) for name in plan.heads.shared)
    assert learns.learning_bytes == whole + (learns.method.bodies_to_learn(2) - 1) * plan.scratch_bytes
    mixed, full = ({name: classifier.full, "full": classifier.full} for name in "ab")
    mixed["a"] = classifier.adapter
    decomposing = []
    for merged in (mixed, full):
        plans = [merge_models(classifier.base, merged, method=name, dry_run=True) for name in ("tsv-m", "mean")]
        assert not plans[0].unchanged  # what a whole model changes shows in its values alone
        decomposing.append(plans[0].seconds - plans[1].seconds)
    assert 0 < decomposing[0] == pytest.approx(0.55 * decomposing[1])  # an adapter takes a tenth

    result = merge_models(classifier.base, experts, method="tsv-m", output_dir=tmp_path / "merged")
    assert {report.name for report in result.weights if report.how == "unchanged"} == plan.unchanged
    assert f"{len(adapted)} by tsv-m" in str(result) and f"{len(plan.unchanged)} unchanged" in str(result)
    before, after = stored_tensors(classifier.base), stored_tensors(tmp_path / "merged")
    assert {name for name in before if not torch.equal(before[name], after[name])} == adapted


def test_a_base_of_another_name_than_the_adapter_was_trained_on_is_mentioned(made):
    rewrite(made.adapter / "adapter_config.json", base_model_name_or_path="me/another-bert")
    plan = merge_models(made.base, {"lora": made.adapter, "full": made.full}, method="mean", dry_run=True)
    assert any("'lora'" in warning and "me/another-bert" in warning for warning in plan.warnings)
    assert "LoRA adapter" in str(plan)
