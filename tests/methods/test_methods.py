"""Merge methods against the literal float64 formulas, on all kinds of shapes and degenerate inputs."""

from dataclasses import asdict

import pytest
import torch

from hf_esm import DARE, TIES, TSVM, EssentialMerge, HfEsmError, IsoC, IsoCTS, Mean, RegMean, TaskArithmetic
from hf_esm.methods.registry import METHODS, describe_method, resolve_method
from hf_esm.methods.singular_vectors import merge_singular_vectors
from hf_esm.methods.sparse import magnitude_threshold
from hf_esm.methods.stack import Stack
from support import reference
from support.helpers import PUBLISHED
from support.problems import ROUTES, exact, random_problem, relative_error, seeds, shapes, streamed


SETTINGS = {
    "default": {},
    "gamma": {"gamma": 0.7},
    "exponents": {"gamma": 0.15, "task_exponent": 0.5, "dimension_exponent": 1.5, "factor": 2.0},
    "no-match": {"match_norm": False, "task_exponent": 2.0},
    "weak-shrinkage": {"shrinkage": 0.1},
    "no-shrinkage": {"shrinkage": 0.0},
    "few-directions": {"rank_share": 0.3},
    "all-directions": {"rank_share": 1.0},
    "sum": {"sum_subtracted": 0.4, "factor": 0.5},
    "no-sum": {"sum_subtracted": 0.0},
    "published": PUBLISHED,
    "published-no-gamma": PUBLISHED | {"gamma": 0.0},
    "published-task": PUBLISHED | {"task_exponent": 2.0},
    "published-dimension": PUBLISHED | {"dimension_exponent": 2.0},
    "published-odd-exponents": PUBLISHED | {"gamma": 0.0, "task_exponent": 0.5, "dimension_exponent": 1.5},
    "published-all": PUBLISHED | {"task_exponent": 2.0, "dimension_exponent": 2.0, "factor": 2.0},
    "published-shrunk-and-matched": PUBLISHED | {"shrinkage": 0.3, "match_norm": True},
}
settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


# Those that are functions of a layer's stack alone.
UNLEARNED = [name for name in METHODS if not name.startswith("concrete")]


def stack(deltas, statistics=None, name="layer.0.up.weight", is_linear=True):
    return Stack(
        name,
        "layer.up.weight",
        deltas,
        is_linear=is_linear,
        statistics=statistics or [],
        thresholds=[0.0] * len(deltas),
    )


@seeds
@shapes
@settings
def test_esm_is_the_formula(seed, shape, settings):
    deltas, inputs = random_problem(seed, shape)
    expected = reference.esm(deltas, inputs, **settings)
    for route in ROUTES:
        merged = EssentialMerge(tolerance=0, **settings).merge(stack(deltas, [route(x) for x in inputs]))
        assert relative_error(merged.update, expected) < 1e-4, route.__name__
        assert (merged.how, merged.update.dtype) == ("esm", torch.float32)
    made = EssentialMerge(tolerance=0, **settings)
    side = min(deltas[0].shape) if made.keep_singular_values else shape[1]
    rank = max(int(side * made.rank_share) // shape[3], 1)
    for kept, delta, x in zip(merged.info["energy_kept"], deltas, inputs, strict=True):
        squares = torch.linalg.svdvals(reference.shrink(x, made.shrinkage) @ delta.double().T).square()
        assert kept == pytest.approx(float(squares[:rank].sum() / squares.sum()), rel=1e-5)


@seeds
@shapes
@pytest.mark.parametrize("keep_scale", [False, True])
def test_tsv_m_is_the_formula(seed, shape, keep_scale):
    deltas, _ = random_problem(seed, shape)
    expected = reference.tsv_m(deltas, keep_scale)
    assert relative_error(merge_singular_vectors(deltas, keep_scale), expected) < 1e-4
    merged = (EssentialMerge(keep_fallback_scale=True, tolerance=0) if keep_scale else TSVM(tolerance=0)).merge(
        stack(deltas)
    )
    assert relative_error(merged.update, expected) < 1e-4
    assert (merged.how, merged.update.dtype) == ("tsv-m", torch.float32)


ISO = {  # merge of a stack, the formula
    "iso-c": (IsoC(), reference.iso_c),
    "iso-cts": (IsoCTS(), reference.iso_cts),
    "iso-cts-own": (IsoCTS(0.0), lambda deltas: reference.iso_cts(deltas, 0.0)),
    "iso-cts-half": (IsoCTS(0.5), lambda deltas: reference.iso_cts(deltas, 0.5)),
    "iso-cts-common": (IsoCTS(1.0), lambda deltas: reference.iso_cts(deltas, 1.0)),
}
iso = pytest.mark.parametrize(("method", "formula"), ISO.values(), ids=ISO)


@seeds
@shapes
@iso
def test_isotropic_merging_is_the_formula(seed, shape, method, formula):
    deltas, _ = random_problem(seed, shape)
    merged = method.merge(stack(deltas))
    assert relative_error(merged.update, formula(deltas)) < 1e-4
    assert (merged.how, merged.update.dtype) == (method.name, torch.float32)
    assert method.merge(stack([delta[0] for delta in deltas])).how == "mean"


@seeds
@shapes
@pytest.mark.parametrize(("off_diagonal", "ridge"), [(0.9, 0.0), (1.0, 0.0), (0.0, 0.0), (1.0, 0.3)])
def test_regmean_is_the_formula(seed, shape, off_diagonal, ridge):
    deltas, inputs = random_problem(seed, shape)
    expected = reference.regmean(deltas, inputs, off_diagonal, ridge)
    for route in ROUTES:
        merged = RegMean(off_diagonal, ridge).merge(stack(deltas, [route(x) for x in inputs]))
        assert relative_error(merged.update, expected) < 1e-4, route.__name__
    assert RegMean().merge(stack(deltas, [exact(inputs[0]), None])).how == "mean"


@seeds
def test_regmean_gives_every_expert_its_outputs_where_inputs_do_not_meet(seed):
    deltas, inputs = random_problem(seed, (40, 18, 15, 3))
    places = torch.arange(15) % 3
    inputs = [x * (places == task) for task, x in enumerate(inputs)]
    merged = RegMean(1.0).merge(stack(deltas, [exact(x) for x in inputs])).update
    for delta, x in zip(deltas, inputs):
        assert relative_error(x @ merged.T, x @ delta.T) < 1e-4


@seeds
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("size", [(5, 7), (600,), (20, 3, 4)])
def test_ties_is_the_formula(seed, density, size):
    deltas = list(torch.randn(4, *size, generator=torch.Generator().manual_seed(seed)))
    problem = stack(deltas)
    problem.thresholds = [magnitude_threshold(lambda d=delta: d.split(2), density) for delta in deltas]
    merged = TIES(density).merge(problem)
    assert relative_error(merged.update, reference.ties(deltas, density)) < 1e-6
    assert (merged.how, merged.update.dtype) == ("ties", torch.float32)


@seeds
def test_a_threshold_is_exact_for_ties_zeros_and_tiny_numbers(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(5000, generator=generator) * 10.0 ** torch.randint(-42, 30, (5000,), generator=generator)
    values[torch.rand(5000, generator=generator) < 0.3] = 0.0
    values[:700] = values[700]
    for density in (0.0001, 0.1, 0.3, 0.69, 0.9, 1.0):
        last = values.abs().sort(descending=True).values[max(int(density * 5000), 1) - 1]
        assert magnitude_threshold(lambda: values.split(999), density) == float(last)


@seeds
def test_dare_keeps_the_expected_sum_and_is_the_same_everywhere(seed):
    deltas = list(torch.randn(3, 200, 100, generator=torch.Generator().manual_seed(seed)))
    method = DARE(0.25, drop_seed=seed)
    merged = method.merge(stack(deltas)).update
    masks = [method.mask("layer.0.up.weight/0", place, deltas[0].shape) for place in range(3)]
    assert relative_error(merged, reference.dare(deltas, masks, 0.25)) < 1e-6
    assert all(0.23 < float(mask.float().mean()) < 0.27 for mask in masks)
    assert not torch.equal(masks[0], masks[1])
    torch.manual_seed(seed + 1)  # nobody else's seed matters, every weight has its own, and so has every setting
    assert torch.equal(method.merge(stack(deltas)).update, merged)
    assert not torch.equal(method.merge(stack(deltas, name="layer.1.up.weight")).update, merged)
    assert not torch.equal(DARE(0.25, drop_seed=seed + 1).merge(stack(deltas)).update, merged)
    assert relative_error(DARE(1.0).merge(stack(deltas)).update, sum(deltas)) < 1e-6


@seeds
@pytest.mark.parametrize("size", [(5, 7), (6,), (2, 3, 4), (2, 3, 2, 2), ()])
def test_sum_and_mean_are_taken_of_parameters_of_any_shape(seed, size):
    deltas = list(
        1.5 + torch.rand(4, *size, generator=torch.Generator().manual_seed(seed))
    )  # a sum that is no rounding
    assert relative_error(Mean().merge(stack(deltas)).update, reference.mean(deltas)) < 1e-6
    assert relative_error(TaskArithmetic().merge(stack(deltas)).update, reference.task_arithmetic(deltas)) < 1e-6
    if len(size) != 2:
        for method in (EssentialMerge(tolerance=0), TSVM(tolerance=0)):
            merged = method.merge(stack(deltas))
            assert relative_error(merged.update, reference.merge_weight(deltas)) < 1e-6
            assert merged.how == "mean"


def low_rank(deltas):
    """LoRA experts: updates of rank 2, 1, 2, 1, …"""
    factors = [(delta[:, : 1 + t % 2], delta[: 1 + t % 2]) for t, delta in enumerate(deltas, 1)]
    return [b @ a for b, a in factors]


DEGENERATE = {  # what becomes of ordinary updates and inputs
    "single-token": lambda deltas, inputs: (deltas, [x[:1] for x in inputs]),
    "two-tokens-of-one-task": lambda deltas, inputs: (deltas, [inputs[0][:2], *inputs[1:]]),
    "repeated-token": lambda deltas, inputs: (deltas, [x[:1].repeat(40, 1) for x in inputs]),
    "one-update-zero": lambda deltas, inputs: ([deltas[0] * 0, *deltas[1:]], inputs),
    "one-update-left": lambda deltas, inputs: ([deltas[0], *(delta * 0 for delta in deltas[1:])], inputs),
    "all-updates-zero": lambda deltas, inputs: ([delta * 0 for delta in deltas], inputs),
    "one-input-zero": lambda deltas, inputs: (deltas, [inputs[0] * 0, *inputs[1:]]),
    "all-inputs-zero": lambda deltas, inputs: (deltas, [x * 0 for x in inputs]),
    "one-input-empty": lambda deltas, inputs: (deltas, [inputs[0][:0], *inputs[1:]]),
    "more-tasks-than-outputs": lambda deltas, inputs: ([delta[:2] for delta in deltas], inputs),
    "one-output": lambda deltas, inputs: ([delta[:1] for delta in deltas], inputs),
    "one-input-feature": lambda deltas, inputs: ([delta[:, :1] for delta in deltas], [x[:, :1] for x in inputs]),
    "low-rank-updates": lambda deltas, inputs: (low_rank(deltas), inputs),
    "low-rank-inputs": lambda deltas, inputs: (deltas, [x[:, :2] @ x[:2] for x in inputs]),
    "identical-experts": lambda deltas, inputs: ([deltas[0]] * len(deltas), [inputs[0]] * len(deltas)),
    "identical-updates": lambda deltas, inputs: ([deltas[0]] * len(deltas), inputs),
    "opposite-updates": lambda deltas, inputs: ([deltas[0], -deltas[0], *deltas[2:]], [inputs[0]] * len(deltas)),
    "unread-features": lambda deltas, inputs: (deltas, [x * (torch.arange(x.shape[1]) % 2) for x in inputs]),
    "tiny-updates": lambda deltas, inputs: ([delta * 1e-20 for delta in deltas], inputs),
    "large-inputs": lambda deltas, inputs: (deltas, [x * 1e15 for x in inputs]),
    "unequal-updates": lambda deltas, inputs: ([delta * 10.0 ** (-t) for t, delta in enumerate(deltas)], inputs),
}


@seeds
@pytest.mark.parametrize("shape", [(9, 20, 16, 3), (60, 8, 12, 4)], ids=["few-tokens", "many-tokens"])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_inputs_give_the_formula_on_the_numerical_range(seed, shape, case):
    deltas, inputs = DEGENERATE[case](*random_problem(seed, shape))
    for settings in ({}, PUBLISHED, SETTINGS["exponents"], SETTINGS["published-all"]):
        expected = reference.esm(deltas, inputs, **settings)
        assert expected.isfinite().all()
        for route in (exact, streamed):
            merged = EssentialMerge(tolerance=0, **settings).merge(stack(deltas, [route(x) for x in inputs]))
            assert relative_error(merged.update, expected) < 1e-4, (settings, route.__name__)
            assert all(0 <= kept <= 1 + 1e-9 for kept in merged.info["energy_kept"])
    for keep_scale in (False, True):
        expected = reference.tsv_m(deltas, keep_scale)
        assert relative_error(merge_singular_vectors(deltas, keep_scale), expected) < 1e-4
    for method, formula in ISO.values():
        assert relative_error(method.merge(stack(deltas)).update, formula(deltas)) < 1e-4, method
    expected = reference.regmean(deltas, inputs)
    assert relative_error(RegMean().merge(stack(deltas, [exact(x) for x in inputs])).update, expected) < 1e-4


@seeds
@settings
def test_a_merge_does_not_depend_on_units_or_on_the_order_of_tasks(seed, settings):
    deltas, inputs = random_problem(seed, (40, 18, 15, 3))
    merge = EssentialMerge(tolerance=0, **settings).merge_calibrated
    statistics = [exact(x) for x in inputs]
    merged, _ = merge(deltas, statistics)
    assert relative_error(merge([delta * 2**-30 for delta in deltas], statistics)[0] * 2**30, merged) < 1e-6
    assert relative_error(merge(deltas, [exact(x * 2.0**t) for t, x in enumerate(inputs)])[0], merged) < 1e-6
    assert relative_error(merge(deltas[::-1], statistics[::-1])[0], merged) < 1e-6


@pytest.mark.parametrize("method", [METHODS[name]() for name in UNLEARNED], ids=UNLEARNED)
def test_merging_leaves_its_inputs_alone(method):
    deltas, inputs = random_problem(0, (40, 18, 15, 3))
    statistics = [exact(x) for x in inputs]
    copies = [tensor.clone() for tensor in deltas + inputs]
    method.merge(stack(deltas, statistics))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(deltas + inputs, copies))


# Which rule merges which weight, and whether α multiplies it.
KINDS = {  # is_linear, dimensions, statistics for all tasks: rule
    "linear": (True, 2, "all", "esm"),
    "linear-uncalibrated": (True, 2, "none", "tsv-m"),
    "linear-calibrated-for-some-tasks": (True, 2, "some", "tsv-m"),
    "embedding": (False, 2, "none", "tsv-m"),
    "bias": (False, 1, "none", "mean"),
    "convolution": (False, 3, "none", "mean"),
}


@pytest.mark.parametrize("scale_all", [False, True])
@pytest.mark.parametrize(("is_linear", "dims", "calibrated", "rule"), KINDS.values(), ids=KINDS)
def test_esm_merges_each_kind_of_weight_by_its_rule(is_linear, dims, calibrated, rule, scale_all):
    deltas, inputs = random_problem(0, (40, 18, 15, 3))
    statistics = {
        "all": [exact(x) for x in inputs],
        "some": [exact(inputs[0]), None, exact(inputs[2])],
        "none": [None] * 3,
    }[calibrated]
    if dims != 2:
        deltas = [delta[0] if dims == 1 else delta[:, :, None] for delta in deltas]
    # The factor belongs to calibrated maps alone.
    merged = EssentialMerge(factor=2.0, scale_all=scale_all, tolerance=0).merge(
        stack(deltas, statistics, is_linear=is_linear)
    )
    expected = reference.merge_weight(deltas, inputs if calibrated == "all" else None, factor=2.0)
    assert relative_error(merged.update, expected) < 1e-4
    assert (merged.how, merged.scaled) == (rule, scale_all or is_linear)


@pytest.mark.parametrize("method", [Mean(), TaskArithmetic(), TSVM(tolerance=0)], ids=lambda method: method.name)
@pytest.mark.parametrize("size", [(18, 15), (18,)])
def test_alpha_multiplies_every_update_of_the_simple_methods(method, size):
    assert method.merge(stack([torch.ones(size), torch.ones(size)], is_linear=False)).scaled


PRESETS = {
    "esm": {
        "gamma": 0.0,
        "task_exponent": 0.0,
        "dimension_exponent": 0.0,
        "layer_exponent": 0.0,
        "shrinkage": 3.0,
        "keep_singular_values": True,
        "match_norm": True,
        "factor": 1.2,
        "rank_share": 0.75,
        "sum_subtracted": 0.13,
        "stack_shared_inputs": False,
        "keep_fallback_scale": False,
        "tolerance": 0.001,
        "published_embeddings": False,
        "scale_all": False,
    },
}
# Steps 3 and 8 only; both polar factors of the TSV-M fallback keep their scale; α multiplies everything.
PRESETS["esm-roberta"] = (
    PRESETS["esm"]
    | PUBLISHED
    | {
        "layer_exponent": 2.0,
        "keep_fallback_scale": True,
        "published_embeddings": True,
        "scale_all": True,
        "tolerance": 0.0,
    }
)
# Steps 3, 4 and 8, factor 2, q, k and v as one weight; α multiplies everything.
PRESETS["esm-vit"] = (
    PRESETS["esm"]
    | PUBLISHED
    | {
        "task_exponent": 2.0,
        "dimension_exponent": 2.0,
        "layer_exponent": 2.0,
        "factor": 2.0,
        "stack_shared_inputs": True,
        "published_embeddings": True,
        "scale_all": True,
        "tolerance": 0.0,
    }
)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_published_settings(name):
    found = asdict(METHODS[name]())
    del found["uncalibrated"]  # see the next test
    assert found == PRESETS[name]
    presets = {"esm": EssentialMerge(), "esm-roberta": EssentialMerge.roberta(), "esm-vit": EssentialMerge.vit()}
    assert METHODS[name]() == presets[name]


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("vision_model.encoder.layers.3.self_attn.out_proj.weight", "tsv-m"),
        ("vit.encoder.layer.3.attention.output.dense.weight", "tsv-m"),
        ("vit.layers.3.attention.o_proj.weight", "tsv-m"),
        ("vision_model.encoder.layers.3.self_attn.q_proj.weight", "esm"),
        ("vision_model.encoder.layers.3.mlp.fc1.weight", "esm"),
        ("vision_model.encoder.layers.3.mlp.fc2.weight", "esm"),
        ("vit.encoder.layer.3.attention.attention.query.weight", "esm"),
        ("vit.encoder.layer.3.intermediate.dense.weight", "esm"),
        ("vit.encoder.layer.3.output.dense.weight", "esm"),
    ],
)
def test_the_vit_preset_calibrates_qkv_and_the_mlp_alone(name, rule):
    deltas, inputs = random_problem(0, (40, 18, 15, 3))
    problem = stack(deltas, [exact(x) for x in inputs], name)
    assert EssentialMerge.vit().merge(problem).how == rule
    assert EssentialMerge.roberta().merge(problem).how == "esm"


@pytest.mark.parametrize("name", UNLEARNED)
def test_a_described_method_is_resolved_to_the_same_merge(name):
    made = METHODS[name]()
    again = resolve_method(describe_method(made))
    assert type(again) is type(made)
    assert describe_method(again) == describe_method(made)
    deltas, inputs = random_problem(0, (40, 18, 15, 3))
    problem = stack(deltas, [exact(x) for x in inputs], "layer.0.attention.output.dense.weight")
    assert torch.equal(again.merge(problem).update, made.merge(problem).update)


def test_numbers_that_yaml_takes_for_text_are_numbers():
    assert resolve_method({"name": "esm", "tolerance": "1e-3"}).tolerance == 1e-3
    for wrong in ("a little", "nan"):
        with pytest.raises(HfEsmError, match="tolerance must be"):
            resolve_method({"name": "esm", "tolerance": wrong})


def test_methods_and_settings_that_do_not_exist_are_named():
    for method, wrong in [("esn", "esn"), ({"name": "esm", "gama": 0.2}, "gama"), ({"gamma": 0.2}, "need a name")]:
        with pytest.raises(HfEsmError, match=wrong):
            resolve_method(method)
    assert resolve_method({"name": "esm-vit", "gamma": 0.0}) == EssentialMerge(
        **{**asdict(EssentialMerge.vit()), "gamma": 0.0}
    )


@seeds
@pytest.mark.parametrize("method", [EssentialMerge, TSVM])
def test_a_tolerance_leads_nearly_to_the_same_merge(seed, method):
    """Where directions differ in strength; it is refused where it is no share."""
    generator = torch.Generator().manual_seed(seed)
    _, inputs = random_problem(seed, (150, 60, 50, 6))
    strengths = torch.logspace(0, -2, 50)
    deltas = [torch.randn(60, 50, generator=generator) * strengths for _ in inputs]
    problem = stack(deltas, [exact(x) for x in inputs])
    expected = method(tolerance=0).merge(problem).update
    close = relative_error(method(tolerance=1e-6).merge(problem).update, expected)
    far = relative_error(method(tolerance=0.3).merge(problem).update, expected)
    assert 0 < close < 1e-2 and close < far < 0.5
    for wrong in (-0.1, 1.0):
        with pytest.raises(HfEsmError, match="tolerance must be a finite number, at least 0 and below 1"):
            method(tolerance=wrong)
