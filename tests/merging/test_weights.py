"""Weights as matrices, and both passes of a merge on weights in memory, against the literal formulas."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from inspect import signature

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_esm import EssentialMerge, HfEsmError
from hf_esm.architecture import LinearMap, from_matrices, layer_type, linear_maps, to_matrices
from hf_esm.calibration.statistics import ActivationStatistics
from hf_esm.checkpoints.base import Checkpoint
from hf_esm.merging.updates import MergedUpdates, WeightReport
from hf_esm.merging.weights import Worker, merge_weights, scale_layers
from hf_esm.planning import MergePlan
from hf_esm.planning.checks import check_values
from hf_esm.planning.heads import HeadPlan
from support import reference
from support.problems import random_problem, relative_error, seeds, streamed


MAPS = {  # shape as stored, the map, and its matrices [d_out, d_in] written out
    "linear": ((5, 3), LinearMap("w", ""), lambda w: [w]),
    "conv1d": ((3, 5), LinearMap("w", "", transposed=True), lambda w: [w.T]),
    "experts": ((4, 5, 3), LinearMap("w", "", slices=4), lambda w: [w[0], w[1], w[2], w[3]]),
    "transposed-experts": ((2, 3, 5), LinearMap("w", "", transposed=True, slices=2), lambda w: [w[0].T, w[1].T]),
    "one-expert": ((1, 5, 3), LinearMap("w", "", slices=1), lambda w: [w[0]]),
    "embedding": ((5, 3), None, lambda w: [w]),
    "convolution": ((4, 5, 3), None, lambda w: [w]),
    "bias": ((5,), None, lambda w: [w]),
    "scalar": ((), None, lambda w: [w]),
}


@pytest.mark.parametrize(("shape", "linear", "written_out"), MAPS.values(), ids=MAPS)
def test_a_parameter_is_its_matrices_and_back(shape, linear, written_out):
    weight = torch.randn(shape)
    matrices = to_matrices(weight, linear)
    assert all(torch.equal(*pair) for pair in zip(matrices, written_out(weight), strict=True))
    again = from_matrices([matrix.contiguous() for matrix in matrices], linear)
    assert torch.equal(again, weight)
    assert again.is_contiguous()


def test_a_live_models_maps_compute_x_times_their_matrix_transposed():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts = 2
            self.up = nn.Parameter(torch.randn(2, 5, 3))

    model = nn.ModuleDict({"a": nn.Linear(3, 5), "b": Conv1D(5, 3), "c": Experts(), "d": nn.Embedding(5, 3)})
    model["e"] = nn.Conv1d(3, 5, 2)
    maps = linear_maps(model)
    assert {name: (linear.module, linear.slices) for name, linear in maps.items()} == {
        "a.weight": ("a", 0),
        "b.weight": ("b", 0),
        "c.up": ("c", 2),
    }
    x = torch.randn(7, 3)
    for name in ("a", "b"):
        (matrix,) = to_matrices(model[name].weight, maps[f"{name}.weight"])
        assert torch.allclose(model[name](x), x @ matrix.T + model[name].bias, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.layer.0.attention.self.query.weight", "encoder.layer.attention.self.query.weight"),
        ("encoder.layer.11.attention.self.query.weight", "encoder.layer.attention.self.query.weight"),
        ("decoder.block.3.layer.1.EncDecAttention.q.weight", "decoder.block.layer.EncDecAttention.q.weight"),
        ("h.2.mlp.experts.10.w1.weight", "h.mlp.experts.w1.weight"),
        ("mlp.fc1.weight", "mlp.fc1.weight"),  # digits inside a name are no index
        ("0.weight", "weight"),
    ],
)
def test_weights_of_one_type_differ_in_their_indices_alone(name, expected):
    assert layer_type(name) == expected


@seeds
@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_layer_scales_compare_the_norms_of_one_type(seed, exponent):
    generator = torch.Generator().manual_seed(seed)
    norms = {
        "up": (torch.rand(4, generator=generator) * 10).tolist(),
        "down": [3.0, 0.0, 1e-3],
        "zero": [0.0, 0.0],
        "alone": [7.0],
        "bias": [1.0, 2.0],  # no matrix: no scale
    }
    reports = {
        f"layer.{i}.{kind}.weight": WeightReport(f"layer.{i}.{kind}.weight", "esm", norm, True)
        for i in range(4)
        for kind, found in norms.items()
        for norm in found[i : i + 1]
    }
    method = EssentialMerge(layer_exponent=exponent)
    scale_layers(reports, {name: method for name in reports if "bias" not in name})
    for kind, found in norms.items():
        expected = reference.layer_scales(found, 0 if kind == "bias" else exponent)
        scales = [reports[f"layer.{i}.{kind}.weight"].layer_scale for i in range(len(found))]
        assert scales == pytest.approx(expected, rel=1e-6)


class Memory(Checkpoint):
    """A checkpoint of plain tensors."""

    def __init__(self, tensors, linear):
        self.tensors, self.linear, self.title, self.skeleton = tensors, linear, "model", torch.nn.Module()
        self.names = {name: name for name in tensors}
        self.trained = set(tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def dtype(self, name):
        return self.tensors[name].dtype

    def tensor(self, name):
        return self.tensors[name]


QKV = [f"layer.{i}.attn.{name}.weight" for i in range(2) for name in "qkv"]
UP = [f"layer.{i}.up.weight" for i in range(2)]  # stored transposed
GATE = "layer.0.gate.weight"  # reads what q, k and v read, but is not one of them
EXPERTS, EMBEDDING, BIAS, LOGIT, COUNT = "layer.0.experts", "embedding.weight", "layer.0.bias", "logit_scale", "steps"
LINEAR = {name: LinearMap(name, name.removesuffix(".weight")) for name in [*QKV, GATE]}
LINEAR |= {name: LinearMap(name, name.removesuffix(".weight"), transposed=True) for name in UP}
LINEAR[EXPERTS] = LinearMap(EXPERTS, "layer.0", slices=2)
TASKS = ["a", "b", "c"]


def small_models(seed, dtype):
    """A base and three experts with every kind of weight, and the inputs of calibrated maps by task and weight."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict.fromkeys([*QKV, GATE], (8, 10)) | dict.fromkeys(UP, (10, 14))
    shapes |= {EXPERTS: (2, 6, 10), EMBEDDING: (20, 10), BIAS: (14,), LOGIT: ()}
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    base[COUNT] = torch.tensor(3)
    experts, inputs = {}, {}
    for task in TASKS:
        noise = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        tuned = {name: (base[name] + noise[name]).to(dtype) for name in shapes}
        experts[task] = Memory(tuned | {COUNT: torch.tensor(4)}, LINEAR)
        shared = [random_problem(seed + len(inputs) + i, (30, 1, 10, 2))[1] for i in range(2)]
        inputs[task] = {name: shared[int(name.split(".")[1])][0] for name in [*QKV, GATE]}
        inputs[task] |= {name: shared[int(name.split(".")[1])][1] for name in UP}
    return Memory(base, LINEAR), experts, inputs


def planned(base, experts, method=None):
    heads = HeadPlan(shared=list(base.tensors), by_task={}, kept_from_base=[])
    sizes = dict.fromkeys(("output_bytes", "scratch_bytes", "memory_bytes", "calibration_bytes", "learning_bytes"), 0)
    weights = (1.0,) * len(experts)
    return MergePlan(base, experts, method, weights, heads, kinds={}, licences={}, seconds=0.0, **sizes)


def merged_weights(folder, method, base, experts, inputs, alpha, world_size):
    """All weights of a merge by `passes`, and the reports."""
    plan = planned(base, experts, method)
    check_values(plan)
    statistics = dict.fromkeys(experts)
    for task, found in inputs.items():
        keys = {name: f"{name.rpartition('.')[0].rpartition('.')[0]}.q.weight" for name in QKV}
        keys |= {name: name for name in UP} | {GATE: QKV[0]}
        entries = {key: streamed(found[key]) for key in set(keys.values())}
        statistics[task] = ActivationStatistics(entries, keys)
    reports = {}
    for rank in range(world_size):
        reports |= merge_weights(plan, statistics, folder, worker=Worker(rank, world_size))
    scale_layers(reports, dict.fromkeys({*LINEAR, EMBEDDING} & set(reports), method))
    updates = MergedUpdates(base, reports, sorted(folder.glob("*.safetensors")))
    return {name: updates.weight(name, alpha) for name in base.tensors}, reports


@contextmanager
def torch_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


RULES = {"stacked": False, "keep_scale": False, "alpha_on": LINEAR, "exponent": 0.0, "base_biases": False}


def expected_weights(
    settings, base, experts, inputs, alpha, stacked, calibrated, alpha_on, exponent, keep_scale, base_biases
):
    """The same by the formulas."""
    deltas = {
        name: [e.tensors[name].double() - weight.double() for e in experts.values()]
        for name, weight in base.tensors.items()
        if weight.is_floating_point()
    }
    x = {name: [found[name] for found in inputs.values()] for name in [*QKV, *UP, GATE]} if calibrated else {}
    merged = {name: reference.merge_weight(deltas[name], None, keep_scale) for name in (EMBEDDING, BIAS, LOGIT)}
    if base_biases:
        merged[BIAS] = torch.zeros(14, dtype=torch.float64)
    slices = [[delta[i] for delta in deltas[EXPERTS]] for i in range(2)]
    merged[EXPERTS] = torch.stack([reference.tsv_m(found, keep_scale) for found in slices])
    for name in UP:
        turned = [delta.T for delta in deltas[name]]
        merged[name] = reference.merge_weight(turned, x.get(name), keep_scale, **settings).T
    merged[GATE] = reference.merge_weight(deltas[GATE], x.get(GATE), keep_scale, **settings)
    norms = {}
    for names in (QKV[:3], QKV[3:]):
        if stacked and calibrated:
            parts = reference.esm_stacked([list(d) for d in zip(*(deltas[n] for n in names))], x[names[0]], **settings)
            norms |= dict.fromkeys(names, float(torch.cat(parts).norm()))
        else:
            parts = [reference.merge_weight(deltas[name], x.get(name), keep_scale, **settings) for name in names]
        merged |= dict(zip(names, parts))
    norms = {name: float(update.norm()) for name, update in merged.items()} | norms
    scales = dict.fromkeys(merged, 1.0)
    for names in (QKV[0::3], QKV[1::3], QKV[2::3], UP):
        scales |= dict(zip(names, reference.layer_scales([norms[name] for name in names], exponent)))
    alpha_on = {*merged} if alpha_on == "all" else x if alpha_on == "calibrated" else alpha_on
    alphas = {name: alpha if name in alpha_on else 1.0 for name in merged}
    weights = {n: reference.recombine(base.tensors[n], merged[n], alphas[n], scales[n]) for n in merged}
    return weights, norms


METHODS = {  # method: what it says of the formulas
    "default": (EssentialMerge(), {}),
    "roberta": (
        EssentialMerge.roberta(),
        {"keep_scale": True, "alpha_on": "all", "exponent": 2.0, "base_biases": True},
    ),
    "vit": (EssentialMerge.vit(), {"stacked": True, "alpha_on": "calibrated", "exponent": 2.0}),
}


@seeds
@pytest.mark.parametrize(("method", "rules"), METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize(("world_size", "threads"), [(1, 1), (3, 1), (1, 3)])
def test_merged_weights_are_the_formulas(seed, method, rules, dtype, calibrated, world_size, threads, tmp_path):
    base, experts, inputs = small_models(seed, dtype)
    rules = RULES | rules
    settings = {
        name: getattr(method, name)
        for name in signature(reference.esm).parameters.keys() - {"deltas", "inputs", "weights"}
    }
    used = inputs if calibrated else {}
    with torch_threads(threads):
        found, reports = merged_weights(tmp_path, method, base, experts, used, 0.7, world_size)
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == torch.get_num_threads() == threads
    expected, norms = expected_weights(settings, base, experts, inputs, 0.7, calibrated=calibrated, **rules)
    for name, weight in expected.items():
        start = base.tensors[name].double()
        assert relative_error(found[name] - start, weight - start) < 1e-4, name
        assert reports[name].norm == pytest.approx(norms[name], rel=1e-4)
    assert set(reports) == set(expected)
    assert found[COUNT] is base.tensors[COUNT]  # integers are the base's own
    updates = [float((e.tensors[BIAS].float() - base.tensors[BIAS].float()).norm()) for e in experts.values()]
    assert list(reports[BIAS].update_norms) == TASKS
    assert list(reports[BIAS].update_norms.values()) == pytest.approx(updates)
    assert list(reports[UP[0]].energy_kept) == (TASKS if calibrated else [])


@seeds
@pytest.mark.parametrize(("method", "rules"), METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_what_no_expert_changes_stays_the_bases_and_is_not_merged(seed, method, rules, world_size, tmp_path):
    base, experts, inputs = small_models(seed, torch.float32)
    frozen = [QKV[0], *QKV[3:], UP[0], EXPERTS, EMBEDDING, BIAS, COUNT]
    for expert in experts.values():
        expert.tensors |= {name: base.tensors[name].clone() for name in frozen}
    experts["a"].tensors[UP[1]] = base.tensors[UP[1]].clone()  # others change it
    rules = RULES | rules
    settings = {
        name: getattr(method, name)
        for name in signature(reference.esm).parameters.keys() - {"deltas", "inputs", "weights"}
    }
    found, reports = merged_weights(tmp_path, method, base, experts, inputs, 0.7, world_size)
    expected, _ = expected_weights(settings, base, experts, inputs, 0.7, calibrated=True, **rules)
    for name, weight in expected.items():
        assert relative_error(found[name], weight) < 1e-5, name
    stacked = {QKV[0]} if rules["stacked"] else set()  # read with k and v of its layer, which some expert changes
    unchanged = {name for name, report in reports.items() if report.how == "unchanged"}
    assert unchanged == {*frozen} - {COUNT} - stacked
    assert all(found[name] is base.tensors[name] for name in unchanged)
    assert all(reports[name].update_norms == dict.fromkeys(TASKS, 0.0) for name in unchanged)
    written = {key for path in tmp_path.glob("*.safetensors") for key in safe_open(path, "pt").keys()}
    assert written == reports.keys() - unchanged


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("culprit", ["base", "expert 'b'"])
def test_a_weight_that_is_not_finite_is_named(culprit, value):
    base, experts, _ = small_models(0, torch.float32)
    models = {"base": base} | {f"expert '{task}'": expert for task, expert in experts.items()}
    for title, model in models.items():
        model.title = title
    plan = planned(base, experts)
    check_values(plan)
    models[culprit].tensors[UP[1]][2, 3] = value
    with pytest.raises(HfEsmError, match=rf"{culprit}.*{UP[1]}"):
        check_values(plan)


def test_an_expert_that_changes_nothing_is_named():
    base, experts, _ = small_models(0, torch.float32)
    experts["c"] = Memory(dict(base.tensors), LINEAR)
    experts["c"].title = "expert 'c'"
    with pytest.raises(HfEsmError, match="expert 'c' equals the base"):
        check_values(planned(base, experts))
