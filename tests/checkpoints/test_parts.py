"""Experts that are made of another model: one task of a routed model, and a fine-tune of one part of the base."""

import copy
import json

import pytest
import torch
import transformers
import yaml
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from hf_esm import HfEsmError, RoutedModel, calibrate, evaluate, load_task_model, merge_models
from hf_esm.checkpoints import open_checkpoint, resolve_source
from support.architectures import ARCHITECTURES
from support.helpers import Architecture, perturbed, save, stored_tensors, text_samples
from support.problems import relative_error
from support.tiny import BERT, GPT2


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


def routed_model(architecture, folder, **options):
    """A base, two fine-tunes and the routed model of both."""
    base = architecture.build()
    save(base, folder / "base")
    experts = {task: save(perturbed(base, 0.2, seed), folder / task) for seed, task in enumerate("ab", 1)}
    calibration = {task: text_samples(seed) for seed, task in enumerate(experts, 1)}
    merge_models(
        folder / "base",
        experts,
        calibration=calibration,
        method="esm++",
        rank=4,
        output_dir=folder / "routed",
        progress=False,
        **options,
    )
    return folder


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    return routed_model(BERT, tmp_path_factory.mktemp("classifiers"))


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    return routed_model(GPT2, tmp_path_factory.mktemp("writers"), refine=False)


@pytest.mark.parametrize("task", ["a", "b"])
@pytest.mark.parametrize("models", ["classifiers", "writers"])
@torch.no_grad()
def test_a_task_of_a_routed_model_is_its_static_model_with_the_factors_of_the_task(models, task, request):
    folder = request.getfixturevalue(models)
    routed = RoutedModel.from_pretrained(folder / "routed")
    base = open_checkpoint(resolve_source(folder / "base", "base"))
    source = resolve_source({"path": folder / "routed", "task": task}, "expert")
    found = open_checkpoint(source, base)
    samples = text_samples(7)
    model = found.load_model()
    with routed.route(task):
        expected = routed.task_model(task)
        assert type(model) is type(expected)
        for sample in samples:
            ids = sample["input_ids"][None]
            assert torch.allclose(model(ids).logits, expected(ids).logits, atol=1e-5)
    static = load_task_model(folder / "routed", task).state_dict()
    for name, live in found.names.items():
        assert torch.equal(model.state_dict()[live], found.tensor(name))
    changed = {name for name, live in found.names.items() if not torch.equal(found.tensor(name), static[live])}
    assert changed and changed <= set(base.linear)
    for name in set(found.names) & set(base.names):
        weight = base.tensor(name)
        if found.shape(name) == weight.shape:
            assert relative_error(found.update(name, weight), found.tensor(name) - weight) < 1e-5, name


def test_a_task_of_a_routed_model_is_merged_calibrated_and_scored_as_its_model(classifiers, tmp_path):
    spec = {"path": str(classifiers / "routed"), "task": "a"}
    base = classifiers / "base"
    opened = open_checkpoint(resolve_source(spec, "expert"), open_checkpoint(resolve_source(base, "base")))
    full = save(opened.load_model(), tmp_path / "full")
    other = str(classifiers / "b")
    for method in ("mean", "esm"):
        calibration = {"x": text_samples(1), "y": text_samples(2)} if method == "esm" else None
        merged, literal = (
            merge_models(
                base, {"x": expert, "y": other}, method=method, calibration=calibration, progress=False
            ).output_dir
            for expert in (spec, full)
        )
        before, literal = stored_tensors(base), stored_tensors(literal)
        for name, tensor in stored_tensors(merged).items():
            assert relative_error(tensor - before[name], literal[name] - before[name]) < 1e-5, (method, name)
    found, expected = (calibrate(expert, text_samples(3), progress=False) for expert in (spec, full))
    for name, entry in expected.entries.items():
        assert relative_error(found.entries[name].mean, entry.mean) < 1e-5
    rows = [{"input_ids": row["input_ids"].tolist(), "label": 0} for row in text_samples(5)]
    assert evaluate(full, {"x": rows}, experts={"x": spec}).expert == evaluate(full, {"x": rows}).model


def test_the_recipe_names_the_task_of_a_routed_model(classifiers, tmp_path):
    spec = {"path": str(classifiers / "routed"), "task": "b", "weight": 2.0}
    merge_models(
        classifiers / "base", {"x": spec}, method="task-arithmetic", output_dir=tmp_path / "out", progress=False
    )
    recipe = yaml.safe_load((tmp_path / "out" / "merge_recipe.yaml").read_text())
    assert recipe["experts"] == {"x": {"path": str(classifiers / "routed"), "task": "b"}}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"path": "routed", "task": "c"}, ["task 'c'", "there is no task 'c'", "a, b"]),
        ({"path": "a", "task": "a"}, ["no routed experts", "Leave `task` out"]),
        ({"path": "routed/routed"}, ["experts of all tasks", "task: a"]),
        ({"path": "a", "tsk": "a"}, ["no key 'tsk'", "'task'"]),
    ],
)
def test_a_task_that_is_not_there_is_refused(spec, says, classifiers):
    with pytest.raises(HfEsmError) as refusal:
        merge_models(
            classifiers / "base",
            {"x": {**spec, "path": str(classifiers / spec["path"])}},
            method="mean",
            dry_run=True,
        )
    assert all(part in str(refusal.value) for part in says), refusal.value


TEXT = {
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4, "max_position_embeddings": 64},
}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA = Architecture(
    "Gemma3ForConditionalGeneration",
    {
        "text_config": TEXT,
        "vision_config": VISION | {"image_size": 16, "patch_size": 8},
        "mm_tokens_per_image": 4,
        "image_token_index": 63,
    },
)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A vision-language base, a fine-tune of it, and one of its language model alone."""
    folder, whole = tmp_path_factory.mktemp("gemma"), GEMMA.build()
    text = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT))
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.tie_weights()
    save(whole, folder / "base")
    save(perturbed(whole, 0.1, 1), folder / "whole")
    save(perturbed(text, 0.1, 2), folder / "text")
    return folder


@pytest.mark.parametrize("method", ["mean", "esm"])
def test_a_text_expert_is_merged_into_the_language_part_of_a_vision_language_base(method, gemma, tmp_path):
    whole = transformers.Gemma3ForConditionalGeneration.from_pretrained(gemma / "base")
    text = transformers.Gemma3ForCausalLM.from_pretrained(gemma / "text")
    literal = copy.deepcopy(whole)
    literal.model.language_model.load_state_dict(text.model.state_dict())
    literal = save(literal, tmp_path / "literal")
    calibration = {"whole": text_samples(1), "text": text_samples(2)} if method == "esm" else None
    outputs = []
    for expert in (gemma / "text", literal):
        result = merge_models(
            gemma / "base",
            {"whole": gemma / "whole", "text": expert},
            method=method,
            calibration=calibration,
            progress=False,
            output_dir=tmp_path / f"out{len(outputs)}",
        )
        outputs.append(stored_tensors(result.output_dir))
    before = stored_tensors(gemma / "base")
    assert outputs[0].keys() == outputs[1].keys() == before.keys()
    for name, tensor in outputs[0].items():
        assert relative_error(tensor - before[name], outputs[1][name] - before[name]) < 1e-5, name
    assert type(transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out0")) is type(whole)


@torch.no_grad()
@pytest.mark.parametrize("config", [LoraConfig(r=4, target_modules=["q_proj"]), IA3Config()], ids=["lora", "ia3"])
def test_an_adapter_of_the_language_model_alone_is_merged_into_that_part(config, gemma, tmp_path):
    config.task_type = "CAUSAL_LM"
    if config.target_modules is None:
        config.target_modules, config.feedforward_modules = {"k_proj", "down_proj"}, {"down_proj"}
    whole = transformers.Gemma3ForConditionalGeneration.from_pretrained(gemma / "base")
    text = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT))
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.tie_weights()
    adapted = get_peft_model(text, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    before = stored_tensors(gemma / "base")
    whole.model.language_model.load_state_dict(adapted.merge_and_unload().model.state_dict())
    literal = save(whole, tmp_path / "literal")
    merge_models(
        gemma / "base", {"x": tmp_path / "adapter"}, method="mean", output_dir=tmp_path / "out", progress=False
    )
    expected = stored_tensors(literal)
    for name, tensor in stored_tensors(tmp_path / "out").items():
        assert relative_error(tensor, expected[name]) < 1e-6, name
    assert any(not torch.equal(before[name], expected[name]) for name in before)
    opened = open_checkpoint(
        resolve_source(tmp_path / "adapter", "x"), open_checkpoint(resolve_source(gemma / "base", "base"))
    )
    for name, tensor in opened.load_model().state_dict().items():
        assert relative_error(tensor, whole.state_dict()[name]) < 1e-6, name


def test_a_part_with_a_head_that_the_base_lacks_is_merged_over_that_part(gemma, tmp_path):
    config = transformers.Gemma3TextConfig(**TEXT, num_labels=3)
    tuned = transformers.Gemma3TextForSequenceClassification(config)
    model = transformers.Gemma3ForConditionalGeneration.from_pretrained(gemma / "base")
    tuned.model.load_state_dict(model.model.language_model.state_dict())
    head = save(tuned, tmp_path / "head")
    with pytest.raises(HfEsmError, match=r"a part of the base: pass .*`model.model.language_model`"):
        merge_models(gemma / "base", {"x": head}, method="mean", dry_run=True)
    plan = merge_models(model.model.language_model, {"x": head}, method="mean", dry_run=True)
    assert plan.heads.by_task == {"x": ["score.weight"]}


def test_a_part_of_another_model_is_refused(gemma, tmp_path):
    other = save(AutoModelForSequenceClassification.from_config(BERT.build().config), tmp_path / "other")
    with pytest.raises(HfEsmError, match="is a bert model, but the base is a gemma3"):
        merge_models(gemma / "base", {"x": other}, method="mean", dry_run=True)
    with pytest.raises(HfEsmError, match="is a gemma3 model, but the base is a gemma3_text"):
        merge_models(gemma / "text", {"x": gemma / "whole"}, method="mean", dry_run=True)


@torch.no_grad()
def test_an_adapter_with_the_names_of_older_vision_language_models_is_read(tmp_path):
    """PEFT translates these names; all of its updates count, and none is left out as of another tower."""
    base = save(ARCHITECTURES["llava"].build(), tmp_path / "base")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "old")
    path, config = tmp_path / "old" / "adapter_model.safetensors", tmp_path / "old" / "adapter_config.json"
    tensors = load_file(path)
    renamed = {
        key.replace("model.model.language_model.", "model.language_model.model."): t for key, t in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, path, {"format": "pt"})
    settings = {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ".*vision_tower.*"}
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    found = open_checkpoint(resolve_source(tmp_path / "old", "x"), open_checkpoint(resolve_source(base, "base")))
    expected = adapted.merge_and_unload().state_dict()
    assert sum(map(found.changes, found.names)) == 4
    for name, live in found.names.items():
        assert relative_error(found.tensor(name), expected[live]) < 1e-6, name
