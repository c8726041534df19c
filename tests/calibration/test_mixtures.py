"""Mixtures whose experts are held by one module: each expert is calibrated on the tokens that are routed to it."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.integrations import use_experts_implementation

from hf_esm import ActivationStatistics, HfEsmError, calibrate, merge_models
from hf_esm.architecture import linear_maps
from hf_esm.calibration.collection import collect_statistics, learn_batches
from hf_esm.calibration.hooks import InputHooks
from hf_esm.calibration.mixtures import mixtures_of
from hf_esm.calibration.placement import factor_bytes
from hf_esm.checkpoints.sources import open_checkpoint, resolve_source
from support.architectures import ARCHITECTURES, DECODER, ROUTED, STACKED
from support.helpers import (
    RULES,
    Architecture,
    check_weights,
    expected_updates,
    merge,
    perturbed,
    reloaded,
    save,
    stored_tensors,
    text_samples,
    token_inputs,
)
from support.problems import relative_error


WIDTH, INNER, EXPERTS = 6, 5, 4


def experts_of(gate, transposed, bias):
    """A module of the experts interface, and what its second matrices read where the first ones gave `x`."""

    @use_experts_implementation(has_gate=gate, is_transposed=transposed, has_bias=bias)
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = EXPERTS, torch.sin
            first, out = "gate_up_proj" if gate else "up_proj", INNER * (2 if gate else 1)
            for name, d_out, d_in in ((first, out, WIDTH), ("down_proj", WIDTH, INNER)):
                shape = (EXPERTS, d_in, d_out) if transposed else (EXPERTS, d_out, d_in)
                setattr(self, name, nn.Parameter(torch.randn(shape)))
                if bias:
                    setattr(self, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, d_out)))

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states

    return Experts(SimpleNamespace(_experts_implementation="eager"))


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_every_expert_reads_the_tokens_that_came_to_it(gate, transposed, bias):
    model = nn.ModuleDict({"mlp": experts_of(gate, transposed, bias)})
    first = "gate_up_proj" if gate else "up_proj"
    names = {f"mlp.{name}": f"layer.{name}" for name, _ in model["mlp"].named_parameters()}
    (mixture,) = mixtures_of(model, linear_maps(model), names).values()
    assert mixture.first == f"layer.{first}"
    tokens, real = torch.randn(9, WIDTH), torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1]).bool()
    chosen = torch.tensor([[0, 3], [3, 0], [1, 2], [0, 3], [3, 4], [0, 4], [3, 0], [2, 1], [0, 3]])  # 4: of elsewhere
    expected = defaultdict(list)
    for token, experts in zip(tokens[real], chosen[real]):
        for expert in experts[experts < EXPERTS].tolist():
            weight = getattr(model["mlp"], first)[expert]
            x = token @ weight if transposed else weight @ token
            x = x + (getattr(model["mlp"], f"{first}_bias")[expert] if bias else 0)
            inner = torch.sin(x[:INNER]) * x[INNER:] if gate else torch.sin(x)
            expected[f"layer.{first}.{expert}"].append(token)
            expected[f"layer.down_proj.{expert}"].append(inner)
    assert set(expected) == {f"layer.{name}.{i}" for name in (first, "down_proj") for i in (0, 3)}
    for args, kwargs in (
        ((tokens, chosen, None), {}),
        ((tokens,), {"top_k_index": chosen, "top_k_weights": None}),
        ((), {"top_k_weights": None, "top_k_index": chosen, "hidden_states": tokens}),
    ):
        assert mixture.open(args, kwargs) is tokens
        found = dict(mixture.reads(tokens, real))
        assert found.keys() == expected.keys()
        assert all(torch.allclose(rows, torch.stack(expected[name]), atol=1e-5) for name, rows in found.items())
    assert len(dict(mixture.reads(tokens))) == 2 * EXPERTS


def test_modules_that_say_nothing_of_their_experts_are_left_alone():
    model = nn.ModuleDict({"mlp": experts_of(True, False, False)})
    names = {f"mlp.{name}": name for name, _ in model["mlp"].named_parameters()}
    assert not mixtures_of(model, linear_maps(model), {})  # of another model than is asked about
    del model["mlp"].has_gate
    assert linear_maps(model).keys() == names.keys() and not mixtures_of(model, linear_maps(model), names)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "qwen3-moe"])
def test_padding_comes_to_no_expert(name):
    """Batches of texts of different lengths give the same statistics as single tokens."""
    architecture = ARCHITECTURES[name]
    model, samples = architecture.build(), architecture.samples(3)
    hooks = InputHooks(model)
    with torch.no_grad():
        groups, reading = learn_batches(hooks, samples, len(samples), {})
    assert len(groups) == 1 and reading.alike
    assert {(mixture, 1) for mixture in hooks.mixtures} <= reading.padded
    found = collect_statistics(model, samples, batch_size=len(samples), progress=False)
    expected = token_inputs(model, samples, architecture)
    apart = {key.removeprefix("model."): x for key, x in expected.items() if ".experts." in key}
    assert len(apart) >= 2 * 4 and apart.keys() <= found.keys()
    for key, x in apart.items():
        assert found[key].count == len(x)
        assert relative_error(found[key].factor.double().T @ found[key].factor.double(), x.T @ x) < 1e-5
        assert relative_error(found[key].mean, x.mean(0)) < 1e-5


MANY = Architecture("MixtralForCausalLM", {**DECODER, **ROUTED, "num_local_experts": 16}, stacked=STACKED)


def test_experts_that_a_task_did_not_reach_go_by_their_updates_alone(tmp_path):
    few = Architecture(MANY.model_class, MANY.settings, lambda seed: text_samples(seed)[:2], MANY.stacked)
    base = few.build()
    experts = [perturbed(base, 0.05, 1 + i) for i in range(2)]
    folders = [save(expert, tmp_path / f"e{i}") for i, expert in enumerate(experts)]
    result = merge(save(base, tmp_path / "base"), folders, few, tmp_path / "merged")
    check_weights(base, reloaded(base, tmp_path / "merged"), expected_updates(base, experts, few, RULES["esm"]))
    how = {report.name: report for report in result.weights if ".experts." in report.name}
    assert {report.how for report in how.values()} == {"esm and tsv-m"}
    assert all(0 < share <= 1 for report in how.values() for share in report.energy_kept.values())
    unread = [warning for warning in result.warnings if "of 64 matrices of mixtures' experts" in warning]
    assert [warning.split(":")[0] for warning in unread] == ["'t0'", "'t1'"]
    reached = [token_inputs(expert, few.samples(i), few) for i, expert in enumerate(experts)]
    lacking = 64 - sum(".experts." in key for key in reached[0])
    assert f"no statistics for {lacking} of 64" in unread[0]
    assert "tsv-m" in str(result)


def test_statistics_of_mixtures_serve_again(tmp_path):
    architecture = ARCHITECTURES["gpt-oss"]
    base = architecture.build()
    folders = [save(perturbed(base, 0.05, 1 + i), tmp_path / f"e{i}") for i in range(2)]
    kept = {"statistics_dir": str(tmp_path / "kept")}
    merge(save(base, tmp_path / "base"), folders, architecture, tmp_path / "first", **kept)
    statistics = ActivationStatistics.load(tmp_path / "kept" / "t0.safetensors")
    assert statistics.width("layers.0.mlp.experts.down_proj.1") == base.config.intermediate_size
    again = {"calibration": str(tmp_path / "kept")}
    merge(tmp_path / "base", folders, architecture, tmp_path / "second", **again)
    first, second = (stored_tensors(tmp_path / name) for name in ("first", "second"))
    assert all(relative_error(second[key], tensor) < 1e-6 for key, tensor in first.items())
    named = dict(zip(("t0", "t1"), folders))
    found = merge_models(tmp_path / "base", named, method="regmean", progress=False, **again).weights
    assert {report.how for report in found if ".experts." in report.name and "proj" in report.name} >= {"regmean"}


def test_mixtures_that_overflow_are_named(tmp_path):
    """In the last layer, after which no linear map reads what came of it."""
    model = ARCHITECTURES["mixtral"].build("MixtralModel")
    with torch.no_grad():
        model.layers[-1].mlp.experts.gate_up_proj.mul_(1e30)
    with pytest.raises(HfEsmError, match=r"'layers.1.mlp.experts.down_proj.\d' reads NaN or infinite values"):
        calibrate(model, text_samples(0), progress=False)


def test_mixtures_that_do_not_fit_are_calibrated_from_the_disk(tmp_path, monkeypatch):
    settings = {**DECODER, **ROUTED, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8}
    base = Architecture("MixtralForCausalLM", settings, stacked=STACKED).build()
    save(base, tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    places = []

    def spy(model, *args, **kwargs):
        places.append(set(getattr(model, "hf_device_map", {}).values()))
        return collect_statistics(model, *args, **kwargs)

    monkeypatch.setattr("hf_esm.calibration.calibrator.collect_statistics", spy)
    whole = calibrate(tmp_path / "model", text_samples(0), progress=False)
    found = calibrate(tmp_path / "model", text_samples(0), progress=False, max_memory=size // 2)
    assert places == [set(), {"cpu", "disk"}]
    assert found.keys() == whole.keys() and sum(".experts." in key for key in found) == 8 * 2 * 4
    assert all(relative_error(found[key].factor, whole[key].factor) < 1e-5 for key in whole)


def test_memory_for_mixtures_is_counted(tmp_path):
    base = ARCHITECTURES["mixtral"].build()
    checkpoint = open_checkpoint(resolve_source(save(base, tmp_path / "model"), "model"))
    config, tokens = base.config, 10
    sample = {"input_ids": torch.zeros(tokens, dtype=torch.long)}
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = hidden * (not config.tie_word_embeddings)
    shared = 4 * tokens * (layers * (hidden + hidden + inner) + head)
    assert factor_bytes(checkpoint, [sample], shared=True) == shared
    apart = 4 * tokens * (layers * (4 * hidden + 4 * hidden + 4 * inner) + head)
    assert factor_bytes(checkpoint, [sample], shared=False) == apart
    many = [sample] * 1000  # no factor has more rows than twice the inputs of its map
    full = 4 * 2 * (layers * (4 * hidden**2 + 4 * hidden**2 + 4 * inner**2) + head * hidden)
    assert factor_bytes(checkpoint, many, shared=False) == full
