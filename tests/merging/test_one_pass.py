"""Merges in one pass: the bytes and reports of two passes, late checks, and what is merged so."""

import copy
import re
import shutil
from dataclasses import asdict

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_esm import HfEsmError, merge_models
from hf_esm.checkpoints.layout import WEIGHTS_FILE
from hf_esm.checkpoints.shards import TensorFile
from support.architectures import ARCHITECTURES
from support.helpers import perturbed, text_samples
from support.tiny import LLAMA, assert_refused


TASKS = ("law", "code")
FROZEN = "model.layers.1.self_attn.v_proj.weight"  # which no expert changes


def written(folder, dtype):
    """A mixture of experts, whose matrices are stored apart, and two fine-tunes of it."""
    model = ARCHITECTURES["mixtral"].build().to(dtype)
    frozen = model.state_dict()[FROZEN].clone()
    model.save_pretrained(folder / "base")
    for seed, task in enumerate(TASKS):
        expert = perturbed(model, 0.05, seed)
        expert.state_dict()[FROZEN].copy_(frozen)
        expert.save_pretrained(folder / task)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {dtype: written(tmp_path_factory.mktemp("models"), dtype) for dtype in (torch.float32, torch.bfloat16)}


def merge(folder, **options):
    return merge_models(folder / "base", {task: folder / task for task in TASKS}, progress=False, **options)


MERGES = {  # the arguments; how many readings of the experts are spared
    "mean": ({"method": "mean"}, 1),
    "task arithmetic": ({"method": "task-arithmetic", "weights": {"law": 0.5}, "alpha": {"mlp": 0.7}}, 1),
    "ties": ({"method": {"name": "ties", "density_scope": "tensor"}, "dtype": "float16"}, 1),
    "ties over the model": ({"method": "ties", "lines": {"first": 0.5, "last": 1.5}}, 0),
    "dare": ({"method": "dare", "max_shard_size": "20KB"}, 1),
    "slerp, of heads tsv-m": ({"method": "slerp", "overrides": [{"kind": "head", "method": "tsv-m"}]}, 1),
}


@pytest.mark.cases(6)
@pytest.mark.parametrize(("options", "spared"), MERGES.values(), ids=MERGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_writes_the_bytes_of_two(models, options, spared, dtype, tmp_path, monkeypatch):
    read, read_tensor = [], TensorFile.read

    def noted(self, key):
        read.append((self.path.parent.name, key))
        return read_tensor(self, key)

    monkeypatch.setattr(TensorFile, "read", noted)
    found = merge(models[dtype], output_dir=tmp_path / "one", **options)
    expert_key = ("code", "model.layers.0.self_attn.o_proj.weight")
    counts = [read.count(expert_key)]
    read.clear()
    expected = merge(models[dtype], output_dir=tmp_path / "two", resume_dir=tmp_path / "work", **options)
    counts.append(read.count(expert_key))
    assert counts[1] - counts[0] == spared
    files = [sorted(path.name for path in (tmp_path / name).glob("*")) for name in ("one", "two")]
    assert files[0] == files[1] and len(files[0]) > 5
    for path in (tmp_path / "one").glob("model*"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert list(map(asdict, found.weights)) == list(map(asdict, expected.weights))
    assert {report.name for report in found.weights if report.how == "unchanged"} == {FROZEN}
    assert (found.alpha, found.plan.unchanged) == (expected.alpha, expected.plan.unchanged)
    assert (found.plan.scratch_bytes, expected.plan.scratch_bytes > 0) == (0, True)
    assert ("checking weights" in found.seconds) is (spared == 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e37])
@pytest.mark.parametrize("culprit", ["base", *TASKS])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(models, culprit, value, tmp_path):
    folder = shutil.copytree(models[torch.bfloat16], tmp_path / "models")
    stored = load_file(folder / culprit / WEIGHTS_FILE)
    stored["model.norm.weight"][3] = value
    save_file(stored, folder / culprit / WEIGHTS_FILE, {"format": "pt"})
    for work in ({}, {"resume_dir": tmp_path / "work"}):  # in two passes, the same is said
        arguments = {"base": folder / "base", "experts": {task: folder / task for task in TASKS}, "method": "mean"}
        says = [culprit, "weight 'model.norm.weight' holds", "Save or download the model again."]
        says += ["numbers up to" if value == 3e37 else "NaN or infinite"]
        assert_refused(tmp_path, says, {**arguments, "output_dir": tmp_path / "merged", **work})


def test_an_expert_that_equals_the_base_is_named_and_nothing_is_left(models, tmp_path):
    folder = models[torch.float32]
    experts = {"law": folder / "law", "code": folder / "base"}
    given = {"base": folder / "base", "experts": experts, "method": "mean", "output_dir": tmp_path / "merged"}
    assert_refused(tmp_path, ["expert 'code'", "equals the base in every merged weight"], given)


def test_a_head_that_is_not_finite_is_named(kit, tmp_path):
    folder = shutil.copytree(kit, tmp_path / "models")
    stored = load_file(folder / "b" / WEIGHTS_FILE)
    stored["classifier.bias"][0] = float("nan")
    save_file(stored, folder / "b" / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(HfEsmError, match=r"expert 'b'.*'classifier.bias' holds NaN"):
        merge_models(folder / "base", {task: folder / task for task in "ab"}, method="mean", progress=False)


SAMPLES = {"calibration": {task: text_samples(seed) for seed, task in enumerate(TASKS)}}
IN_TWO = {
    "alpha is searched": {"method": "task-arithmetic", "alpha": "auto", "score_fn": lambda model: 0.0},
    "one alpha of a kind is searched": {
        "method": "task-arithmetic",
        "alpha": {"mlp": "auto"},
        "score_fn": lambda model: 0.0,
    },
    "two methods": {"method": {"name": "auto", "methods": ["mean", "ties"]}, **SAMPLES},
    "refined": {"method": "mean", "refine": True, **SAMPLES},
    "statistics": {"method": "esm", **SAMPLES},
    "statistics of an override": {"method": "mean", "overrides": [{"kind": "mlp", "method": "regmean"}], **SAMPLES},
    "a mask is learned": {"method": "concrete-task-arithmetic", **SAMPLES},
    "experts are routed": {"method": "tsv-c"},
    "the published scale by depth": {"method": "ties", "lines": True},
    "resumable": {"method": "mean", "resume_dir": "work"},
}


@pytest.mark.parametrize("options", IN_TWO.values(), ids=IN_TWO)
def test_what_needs_the_whole_merged_model_takes_two_passes(models, options):
    plan = merge(models[torch.float32], dry_run=True, **options)
    assert plan.scratch_bytes > 0
    assert re.search(r"disk +\S+ \S+ for the model, \S+ \S+ scratch", str(plan))


def test_a_plan_in_one_pass_has_no_scratch_and_the_time_follows_the_method(models):
    plans = {name: merge(models[torch.float32], method=name, dry_run=True) for name in ("mean", "ties", "tsv-m")}
    assert [plan.scratch_bytes for plan in plans.values()] == [0, 0, 0]
    assert not any("scratch" in str(plan) for plan in plans.values())
    of_kind = merge(
        models[torch.float32], method="mean", overrides=[{"kind": "attention", "method": "tsv-m"}], dry_run=True
    )
    assert plans["mean"].seconds == plans["ties"].seconds < of_kind.seconds < plans["tsv-m"].seconds


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / WEIGHTS_FILE
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.tensor(True), "c": torch.empty(0, 2).bfloat16()}
    save_file(tensors, path)
    file = TensorFile(path, "model")
    for name, tensor in tensors.items():
        found = file.read(name)
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype
    save_file({**tensors, "d": torch.zeros(3)}, path)
    with pytest.raises(HfEsmError, match=r"model: .*was changed while it was being read\. Start again"):
        file.read("a")
    path.unlink()
    with pytest.raises(HfEsmError, match="is missing"):
        file.read("a")


def test_weights_that_are_stored_by_columns_merge_as_others_do(tmp_path):
    """As Transformers dequantises those of GPT-2, and some live models have them; here under an adapter."""
    base = LLAMA.build().to(torch.bfloat16)
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj", "up_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "lora")
    turned = copy.deepcopy(base)
    for parameter in turned.parameters():
        parameter.data = parameter.data.T.contiguous().T if parameter.dim() == 2 else parameter.data
    assert not turned.model.layers[0].mlp.up_proj.weight.is_contiguous()
    merged = []
    for name, model in {"rows": base, "columns": turned}.items():
        merge_models(model, {"a": tmp_path / "lora"}, method="mean", progress=False, output_dir=tmp_path / name)
        merged.append(load_file(tmp_path / name / WEIGHTS_FILE))
    assert all(torch.equal(weight, merged[0][name]) for name, weight in merged[1].items())
    expected = PeftModel.from_pretrained(base.float(), tmp_path / "lora").merge_and_unload().state_dict()
    assert all(torch.equal(weight, expected[name].to(torch.bfloat16)) for name, weight in merged[1].items())
