"""LoRA adapters merged into one LoRA adapter: the best of its rank, exact where that allows, or refused by name."""

import copy
import json

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from hf_esm import ActivationStatistics, load_recipe, load_task_model, merge_models
from hf_esm.checkpoints import FolderCheckpoint
from hf_esm.checkpoints.layout import ADAPTER_WEIGHTS, RECIPE_FILE, REPORT_FILE
from hf_esm.merging.spans import best_factors
from support.helpers import text_samples
from support.problems import relative_error
from support.tiny import BERT, GPT2, LLAMA, assert_refused, save_tokenizer


RANKS = {"law": 3, "code": 2}
SPANNING = (
    "mean",
    "task-arithmetic",
    "regmean",
    "esm",
    "esm-vit",
    "tsv-m",
    "iso-c",
    "iso-cts",
    "wudi",
    "nuslerp",
    "auto",
)
METHODS = (*SPANNING, "cat", "knots")  # the last two leave directions out
CALIBRATION = {task: text_samples(seed) for seed, task in enumerate(RANKS)}


def write_adapter(base, folder, seed, **settings):
    """A trained LoRA adapter of a model, in a folder."""
    config = {"lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model, generator = get_peft_model(copy.deepcopy(base), LoraConfig(**config)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[LLAMA, GPT2], ids=["llama", "gpt2"])
def models(request, tmp_path_factory):
    """The folder of a base, and of adapters of it with other ranks."""
    folder, base = tmp_path_factory.mktemp("models"), request.param.build()
    base.save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    for seed, (task, rank) in enumerate(RANKS.items()):
        write_adapter(base, folder / task, seed, r=rank, fan_in_fan_out=request.param is GPT2)
    return folder


def merge(models, **options):
    given = {"progress": False, "calibration": CALIBRATION, "refine": False, **options}
    return merge_models(models / "base", {task: models / task for task in RANKS}, **given)


@torch.no_grad()
def logits(model):
    return model.eval()(torch.tensor([[5, 9, 12, 7, 3], [6, 6, 15, 18, 8]])).logits


@pytest.mark.cases(7)
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_without_a_rank_the_adapter_over_the_base_is_the_whole_merged_model(models, method, tmp_path):
    refine = {"steps": 3} if method == "auto" else False
    overrides = [{"match": "o_proj|c_proj", "alpha": 0.4, "weights": {"law": 2.0}}]
    lines = None if method == "mean" else True
    folder = tmp_path / "adapter"
    options = {"method": method, "refine": refine, "overrides": overrides, "lines": lines}
    whole = merge(models, **options)
    adapter = merge(models, **options, output="lora", output_dir=folder)
    expected, base = logits(whole.load_model()), AutoModelForCausalLM.from_pretrained(models / "base")
    assert relative_error(logits(adapter.load_model()), expected) < 5e-5
    assert relative_error(logits(PeftModel.from_pretrained(base, str(folder))), expected) < 5e-5
    assert relative_error(logits(AutoModelForCausalLM.from_pretrained(models / "base")), expected) > 1e-2
    merged = [report for report in adapter.weights if report.how != "unchanged"]
    assert merged and all(report.rank_error == 0 and report.rank <= sum(RANKS.values()) for report in merged)
    assert method not in SPANNING or all(report.rank == sum(RANKS.values()) for report in merged)
    assert not list(folder.glob("model*.safetensors")) and not (folder / "config.json").exists()


@pytest.mark.cases(4)
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_lower_rank_is_the_optimum_of_eckart_and_young(models, rank, calibrated, tmp_path):
    """Of the mean of both updates, in the metric of both experts' inputs, layer by layer."""
    statistics = tmp_path / "statistics"
    merge(models, method="esm", statistics_dir=statistics)
    calibration = statistics if calibrated else None
    result = merge(models, method="mean", output="lora", rank=rank, calibration=calibration, output_dir=tmp_path / "m")
    files = [load_file(models / task / ADAPTER_WEIGHTS) for task in RANKS]
    written = load_file(tmp_path / "m" / ADAPTER_WEIGHTS)
    inputs = [ActivationStatistics.load(statistics / f"{task}.safetensors") for task in RANKS]
    modules = [key.removesuffix("lora_A.weight") for key in written if key.endswith("lora_A.weight")]
    report = {w["name"]: w for w in json.loads((tmp_path / "m" / REPORT_FILE).read_text())["weights"]}
    assert len(modules) >= 8
    for module in modules:
        name = f"{module.removeprefix('base_model.model.')}weight"
        update = sum(
            file[f"{module}lora_B.weight"].double() @ file[f"{module}lora_A.weight"].double() * (4 / r) / 2
            for file, r in zip(files, RANKS.values(), strict=True)
        )
        found = written[f"{module}lora_B.weight"].double() @ written[f"{module}lora_A.weight"].double()
        metric = torch.eye(update.shape[1]).double()
        if calibrated:
            metric = torch.cat(
                [s[next(key for key in s.keys_of if name.endswith(key))].factor for s in inputs]
            ).double()
        values = torch.linalg.svdvals(metric @ update.T)
        optimum = values[rank:].norm() / values.norm()
        assert torch.linalg.matrix_rank(found) == rank
        error = (metric @ (update - found).T).norm() / values.norm()
        assert optimum > 1e-3 or rank == 4
        assert abs(error - optimum) < 1e-5, name
        assert abs(report[name]["rank_error"] - optimum) < 1e-5 and report[name]["rank"] == rank
    assert f"adapter  rank {rank}; relative error" in str(result)


@pytest.mark.parametrize("size, width, rows", [(6, 20, 40), (6, 20, 3), (9, 5, 4), (6, 20, 0)])
def test_best_factors_are_those_of_the_literal_decomposition(size, width, rows):
    generator = torch.Generator().manual_seed(size * width + rows)
    core = torch.randn(size, width, generator=generator).double()
    inputs = [torch.randn(rows, width, generator=generator) for _ in range(2)] if rows else []
    metric = torch.cat(inputs).double() if rows else torch.eye(width).double()
    left, values, _ = torch.linalg.svd(core @ metric.T, full_matrices=False)
    for rank in range(1, size + 2):
        columns, a, error = best_factors(core, rank, inputs)
        assert columns.shape[1] == len(a) == min(rank, size, width)
        expected = left[:, :rank] @ left[:, :rank].T @ core
        assert relative_error((columns @ a) @ metric.T, expected @ metric.T) < 1e-5
        assert abs(error - float(values[rank:].norm() / values.norm())) < 1e-5
    assert relative_error(columns @ a, core) < 1e-6  # exact, also along inputs that no sample has


def test_directions_that_no_input_tells_apart_come_by_their_size():
    core = torch.diag(torch.tensor([1.0, 5.0, 3.0]))
    columns, a, error = best_factors(core, 2, [torch.tensor([[1.0, 0.0, 0.0]])])
    assert relative_error(columns @ a, torch.diag(torch.tensor([1.0, 5.0, 0.0])).double()) < 1e-9
    assert error == 0


@pytest.mark.cases(6)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "auto"])
def test_a_merge_in_factors_reads_no_weight_of_the_base(models, method, tmp_path, monkeypatch):
    statistics = tmp_path / "statistics"
    merge(models, method="regmean", statistics_dir=statistics)
    monkeypatch.setattr(FolderCheckpoint, "tensor", lambda *_: pytest.fail("read a weight of the base"))
    merge(models, method=method, output="lora", rank=2, calibration=statistics)


def test_every_module_has_one_rank_and_the_recipe_repeats_the_adapter(models, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(models / "base")
    modules = [name for name in ("q_proj", "c_attn") if any(n.endswith(name) for n, _ in base.named_modules())]
    more = write_adapter(base, tmp_path / "more", 5, r=4, target_modules=modules, fan_in_fan_out="c_attn" in modules)
    experts = {"law": models / "law", "more": more}
    given = {"method": "mean", "output": "lora", "dtype": "bfloat16", "progress": False}
    merge_models(models / "base", experts, output_dir=tmp_path / "m", **given)
    written = load_file(tmp_path / "m" / ADAPTER_WEIGHTS)
    assert {len(tensor) for key, tensor in written.items() if "lora_A" in key} == {7}
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    settings = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == 7 and not settings["rank_pattern"]
    recipe = yaml.safe_load((tmp_path / "m" / RECIPE_FILE).read_text())
    assert recipe["output"] == "lora"
    merge_models(**load_recipe(tmp_path / "m" / RECIPE_FILE), output_dir=tmp_path / "again", progress=False)
    again = load_file(tmp_path / "again" / ADAPTER_WEIGHTS)
    assert all(torch.equal(tensor, again[key]) for key, tensor in written.items())


@pytest.mark.slow
def test_heads_of_tasks_come_beside_the_adapter(tmp_path):
    model = BERT.build()
    model.save_pretrained(tmp_path / "whole")
    AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    settings = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    experts = {task: write_adapter(model, tmp_path / task, i, r=2, **settings) for i, task in enumerate(["a", "b"])}
    given = {"method": "mean", "progress": False}
    whole = merge_models(tmp_path / "base", experts, **given)
    merge_models(tmp_path / "base", experts, output="lora", output_dir=tmp_path / "m", **given)
    for task in experts:
        expected = logits(whole.load_task_model(task))
        assert relative_error(logits(load_task_model(tmp_path / "m", task)), expected) < 1e-5


REFUSED = {
    "dora": ({"use_dora": True}, {}, ["DoRA", "'law'"]),
    "bias": ({"bias": "lora_only"}, {}, ["biases", "'law'"]),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, {}, ["embed_tokens", "Leave `output` out"]),
    "saved": ({"modules_to_save": ["norm"]}, {}, ["norm", "'law'"]),
    "rows": ({"trainable_token_indices": [5, 9]}, {}, ["rows of single tokens", "Leave `output` out"]),
    "gates": ({}, {"refine": {"keep_adapter": True}, "calibration": CALIBRATION}, ["keep_adapter", "output"]),
    "ties": ({}, {"method": "ties"}, ["ties", "task-arithmetic", "iso-c"]),
    "slerp": ({}, {"method": "slerp"}, ["what slerp makes", "nuslerp"]),
    "override": ({}, {"overrides": [{"match": "q_proj", "method": "dare"}]}, ["dare", "regmean"]),
    "routed": ({}, {"method": "tsv-c"}, ["tsv-c", "esm"]),
    "unknown": ({}, {"output": "lorra"}, ["output", "lora", "model"]),
    "rank": ({}, {"rank": 0}, ["rank"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_adapter_cannot_hold_is_refused_before_any_work(case, tmp_path):
    settings, options, says = REFUSED[case]
    base = LLAMA.build(attention_bias=True)
    base.save_pretrained(tmp_path / "base")
    experts = {"law": write_adapter(base, tmp_path / "law", 0, **{"bias": "none", "r": 2, **settings})}
    experts["code"] = write_adapter(base, tmp_path / "code", 1, r=2)
    arguments = {"base": tmp_path / "base", "experts": experts, "output_dir": tmp_path / "m", "method": "mean"}
    assert_refused(tmp_path, says, {**arguments, "output": "lora", **options})


def test_a_whole_model_among_the_experts_is_refused(models, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(models / "base")
    with torch.no_grad():
        next(base.parameters()).add_(1)
    base.save_pretrained(tmp_path / "whole")
    arguments = {"base": models / "base", "experts": {"law": models / "law", "whole": tmp_path / "whole"}}
    says = ["'whole'", "not a LoRA adapter"]
    assert_refused(tmp_path, says, {**arguments, "method": "mean", "output": "lora", "output_dir": tmp_path / "m"})


def test_the_plan_states_the_size_of_the_adapter(models, tmp_path):
    options = {"method": "mean", "output": "lora", "rank": 4, "calibration": None, "output_dir": tmp_path / "adapter"}
    plan = merge(models, **options, dry_run=True)
    assert "for the adapter" in str(plan)
    merge(models, **options)
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS).values())
    assert plan.output_bytes == stored
