"""Fine-tunes of another class than their base: the bodies are merged, and each task keeps its head."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPModel, PreTrainedModel

from hf_esm import HfEsmError, load_task_model, merge_models
from support.architectures import ARCHITECTURES
from support.helpers import RULES, check_weights, expected_updates, inside, merge, perturbed, reloaded, save, with_end
from support.problems import relative_error


pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Family:
    """A base, its experts, and what stays out of the merge.

    Attributes:
        architecture: name in `ARCHITECTURES`.
        base: class of the base.
        experts: class and number of labels of each expert.
        own: modules that each expert keeps.
        untouched: modules of the base that no merge touches.
        samples: inputs, where the architecture's own do not fit.
    """

    architecture: str
    base: str
    experts: list[tuple[str, Optional[int]]]
    own: list[set[str]]
    untouched: set[str]
    samples: Any = None


def two(model_class: str) -> list[tuple[str, Optional[int]]]:
    return [(model_class, 3), (model_class, 4)]


HEAD = {"classifier"}
BERT_TASK, VIT_TASK = "BertForSequenceClassification", "ViTForImageClassification"
POOLED = [{"pooler", "classifier"}] * 2
FAMILIES = {
    "bert": Family("bert", "BertModel", two(BERT_TASK), POOLED, {"pooler"}),
    "bert-same-labels": Family("bert", "BertModel", [(BERT_TASK, 2)] * 2, POOLED, {"pooler"}),
    "bert-mlm": Family("bert", "BertForMaskedLM", two(BERT_TASK), POOLED, {"cls"}),
    "bert-mlm-bodies": Family("bert", "BertForMaskedLM", [("BertModel", None)] * 2, [{"pooler"}] * 2, {"cls"}),
    "bert-mlm-mixed": Family(
        "bert",
        "BertForMaskedLM",
        [("BertForTokenClassification", 4), (BERT_TASK, 3)],
        [{"classifier"}, {"pooler", "classifier"}],
        {"cls"},
    ),
    "bert-unnamed-labels": Family("bert", BERT_TASK, [(BERT_TASK, 2)] * 2, POOLED, {"pooler", "classifier"}),
    "roberta-mlm": Family(
        "roberta", "RobertaForMaskedLM", two("RobertaForSequenceClassification"), [HEAD] * 2, {"lm_head"}
    ),
    "distilbert-mlm": Family(
        "distilbert",
        "DistilBertForMaskedLM",
        two("DistilBertForSequenceClassification"),
        [{"pre_classifier", "classifier"}] * 2,
        {"vocab_transform", "vocab_layer_norm", "vocab_projector"},
    ),
    "deberta-v3-mlm": Family(
        "deberta-v3", "DebertaV2ForMaskedLM", two("DebertaV2ForSequenceClassification"), POOLED, {"cls"}
    ),
    # Its code looks at values, so that no dummy input runs on the meta device.
    "longformer": Family(
        "longformer", "LongformerModel", two("LongformerForSequenceClassification"), [HEAD] * 2, {"pooler"}
    ),
    "mpnet": Family("mpnet", "MPNetModel", two("MPNetForSequenceClassification"), [HEAD] * 2, {"pooler"}),
    "vit": Family("vit", "ViTModel", two(VIT_TASK), [HEAD] * 2, {"pooler"}),
    "swin": Family("swin", "SwinModel", two("SwinForImageClassification"), [HEAD] * 2, set()),
    "resnet": Family("resnet", "ResNetModel", two("ResNetForImageClassification"), [HEAD] * 2, set()),
    "clip": Family(
        "clip-vision",
        "CLIPModel",
        two("CLIPForImageClassification"),
        [HEAD] * 2,
        {"text_model", "visual_projection", "text_projection", "logit_scale"},
    ),
    "wav2vec2": Family(
        "wav2vec2",
        "Wav2Vec2Model",
        [("Wav2Vec2ForSequenceClassification", 3), ("Wav2Vec2ForCTC", None)],
        [{"projector", "classifier"}, {"lm_head"}],
        set(),
    ),
    "llama": Family("llama", "LlamaModel", [("LlamaForCausalLM", None)] * 2, [{"lm_head"}] * 2, set()),
    "llama-classifiers": Family(
        "llama", "LlamaForCausalLM", two("LlamaForSequenceClassification"), [{"score"}] * 2, {"lm_head"}
    ),
    "qwen3-tied": Family("qwen3", "Qwen3Model", [("Qwen3ForCausalLM", None)] * 2, [set()] * 2, set()),
    "gpt2": Family("gpt2", "GPT2LMHeadModel", two("GPT2ForSequenceClassification"), [{"score"}] * 2, set()),
    "t5": Family(
        "t5",
        "T5ForConditionalGeneration",
        two("T5ForSequenceClassification"),
        [{"classification_head"}] * 2,
        set(),
        with_end,
    ),
    "bart": Family(
        "bart",
        "BartModel",
        two("BartForSequenceClassification"),
        [{"classification_head"}] * 2,
        set(),
        with_end,
    ),
}


def on_body_of(base: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
    """The model with the base's weights wherever both have one."""
    weights = {inside(base, name): weight for name, weight in base.state_dict().items()}
    for name, weight in model.state_dict().items():
        if inside(model, name) in weights and weights[inside(model, name)].shape == weight.shape:
            weight.copy_(weights[inside(model, name)])
    return model


def in_modules(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


@pytest.mark.cases(6)
@pytest.mark.parametrize("name", FAMILIES)
def test_bodies_merge_and_heads_stay(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    architecture = ARCHITECTURES[family.architecture]
    architecture = replace(architecture, samples=family.samples or architecture.samples)
    source = ARCHITECTURES["clip"] if family.base == "CLIPModel" else architecture
    base, experts = source.build(family.base), []
    for i, (model_class, labels) in enumerate(family.experts):
        model = source.build(model_class, **({"num_labels": labels} if labels else {}))
        experts.append(perturbed(on_body_of(base, model), 0.05, 1 + i))
    folders = [save(expert, tmp_path / f"expert-{i}") for i, expert in enumerate(experts)]
    result = merge(save(base, tmp_path / "base"), folders, architecture, tmp_path / "merged")
    assert not [warning for warning in result.warnings if "no statistics" not in warning]

    merged = reloaded(base, tmp_path / "merged")
    updates = expected_updates(base, experts, architecture, RULES["esm"])
    shared = {key: u for key, u in updates.items() if not in_modules(inside(base, key), family.untouched)}
    check_weights(base, merged, shared)

    body = {inside(merged, key): weight for key, weight in merged.state_dict().items()}
    for i, (expert, own) in enumerate(zip(experts, family.own)):
        model = load_task_model(tmp_path / "merged", f"t{i}")
        assert type(model) is type(expert) and model.config.id2label == expert.config.id2label
        assert not model.training
        tied, theirs, kept = model.all_tied_weights_keys, expert.state_dict(), set()
        for key, weight in model.state_dict().items():
            name = inside(model, key)
            if key in tied:
                assert model.get_parameter(key) is model.get_parameter(tied[key]), key
            elif in_modules(name, own):
                kept.add(name.split(".")[0])
                assert torch.equal(weight, theirs[key]), key
            else:
                assert torch.equal(weight, body[name]), key
        assert kept == own


def test_heads_of_one_shape_but_other_labels_stay(tmp_path: Path) -> None:
    architecture, labels = ARCHITECTURES["bert"], [["no", "yes"], ["no", "yes"], ["bad", "good"]]
    base, *experts = [
        perturbed(architecture.build(BERT_TASK, id2label=dict(enumerate(names))), 0.05, i)
        for i, names in enumerate(labels)
    ]
    merge(base, experts, architecture, tmp_path / "merged", "mean")
    heads = [reloaded(base, tmp_path / "merged"), *(load_task_model(tmp_path / "merged", f"t{i}") for i in range(2))]
    for model, source, names in zip(heads, (base, *experts), labels):
        assert list(model.config.id2label.values()) == names
        assert torch.equal(model.classifier.weight, source.classifier.weight)
        assert torch.equal(model.bert.pooler.dense.weight, source.bert.pooler.dense.weight)


def test_a_head_that_is_tied_in_the_experts_alone_is_told() -> None:
    architecture = ARCHITECTURES["gpt2"]
    base = architecture.build("GPT2LMHeadModel", tie_word_embeddings=False)
    for tied in (True, False):
        expert = architecture.build("GPT2LMHeadModel", tie_word_embeddings=tied)
        experts = {f"t{i}": perturbed(expert, 0.05, i) for i in range(2)}
        plan = merge_models(base, experts, method="mean", dry_run=True)
        assert any("'lm_head.weight' is tied to its embeddings" in warning for warning in plan.warnings) == tied


def test_heads_of_the_same_named_labels_are_merged(tmp_path: Path) -> None:
    architecture, labels = ARCHITECTURES["bert"], {0: "bad", 1: "good"}
    base, *experts = [perturbed(architecture.build(BERT_TASK, id2label=labels), 0.05, i) for i in range(3)]
    merged = merge(base, experts, architecture, tmp_path / "merged", "mean").load_model()
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        mean = sum(expert.state_dict()[name] for expert in experts) / 2
        assert relative_error(merged.state_dict()[name], mean) < 1e-6


@pytest.mark.parametrize(
    ("heads", "own"),
    [
        ("auto", {"pooler", "classifier"}),
        ("merge", {"classifier"}),  # which the base has none of
        ("keep", {"pooler", "classifier"}),
        (["classifier", "encoder.layer.1"], {"classifier", "encoder"}),
    ],
    ids=["auto", "merge", "keep", "listed"],  # a set's text differs by worker
)
def test_choice_of_heads(heads: Any, own: set[str], tmp_path: Path) -> None:
    architecture = ARCHITECTURES["bert"]
    base = architecture.build()
    experts = [perturbed(on_body_of(base, architecture.build(BERT_TASK, num_labels=2)), 0.05, i) for i in range(2)]
    merge(base, experts, architecture, tmp_path / "merged", "mean", heads=heads)
    merged = load_task_model(tmp_path / "merged", "t1").state_dict()
    kept = {key for key, weight in experts[1].state_dict().items() if torch.equal(merged[key], weight)}
    assert {key.removeprefix("bert.").split(".")[0] for key in kept} == own
    if "encoder" in own:
        assert {key.split(".")[3] for key in kept if key.startswith("bert.encoder")} == {"1"}


def test_experts_of_a_part_of_the_base(tmp_path: Path) -> None:
    """Fine-tunes of CLIP's image encoder are merged over that part of CLIP."""
    whole = save(ARCHITECTURES["clip"].build(), tmp_path / "clip")
    architecture = ARCHITECTURES["clip-vision"]
    part = CLIPModel.from_pretrained(whole).vision_model
    experts = [perturbed(part, 0.05, 1 + i) for i in range(2)]
    folders = [save(expert, tmp_path / f"expert-{i}") for i, expert in enumerate(experts)]
    with pytest.raises(HfEsmError, match=r"pass that part of the loaded base, `model\.vision_model`"):
        merge(whole, folders, architecture, tmp_path / "merged")
    merge(part, folders, architecture, tmp_path / "merged")
    check_weights(
        part, reloaded(part, tmp_path / "merged"), expected_updates(part, experts, architecture, RULES["esm"])
    )


def test_an_adapter_of_one_encoder_belongs_to_the_part_of_the_class_that_it_names(tmp_path: Path) -> None:
    """CLIP's encoders have modules of the same names."""
    whole = save(ARCHITECTURES["clip"].build(), tmp_path / "clip")
    for part in (CLIPModel.from_pretrained(whole).text_model, CLIPModel.from_pretrained(whole).vision_model):
        adapted = get_peft_model(part, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapted.save_pretrained(tmp_path / "adapter")
        place = "vision_model" if "Vision" in type(part).__name__ else "text_model"
        with pytest.raises(HfEsmError, match=rf"pass that part of the loaded base, `model\.{place}`"):
            merge_models(whole, {"a": tmp_path / "adapter"}, method="mean", output_dir=tmp_path / "out")


@pytest.mark.parametrize(("merged", "wanted"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_task_model_has_the_dtype_of_the_merged_body(merged: str, wanted: torch.dtype, tmp_path: Path) -> None:
    """Whatever its expert's was."""
    base = ARCHITECTURES["bert"].build()
    experts = [tmp_path / str(i) for i in range(2)]
    for i, dtype in enumerate((torch.float32, torch.bfloat16)):
        expert = perturbed(ARCHITECTURES["bert"].build(BERT_TASK, num_labels=3 + i), 0.1, i)
        expert.to(dtype).save_pretrained(experts[i])
    out = merge(base, experts, ARCHITECTURES["bert"], tmp_path / "out", "mean", dtype=merged).output_dir
    for task in ("t0", "t1"):
        assert {p.dtype for p in load_task_model(out, task).parameters()} == {wanted}
    assert load_task_model(out, "t0", dtype=torch.float16).dtype == torch.float16
