"""Merge methods against the literal float64 formulas, on all kinds of shapes and degenerate inputs."""

from dataclasses import asdict, replace

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


# Those that are functions of a layer's stack alone, of any number of experts.
UNLEARNED = [
    name
    for name, method in ((name, METHODS[name]()) for name in METHODS)
    if not (method.needs_samples or method.chooses) and method.most_experts is None
]


def stack(deltas, statistics=None, name="layer.0.up.weight", is_linear=True):
    return Stack(
        name,
        "layer.up.weight",
        deltas,
        is_linear=is_linear,
        statistics=statistics or [],
        thresholds=[0.0] * len(deltas),
        read_base=lambda: torch.ones_like(deltas[0]),
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


def low_rank(deltas):
    """LoRA experts: updates of rank 2, 1, 2, 1, …"""
    factors = [(delta[:, : 1 + t % 2], delta[: 1 + t % 2]) for t, delta in enumerate(deltas, 1)]
    return [b @ a for b, a in factors]


MANY_EXPERTS = {  # tokens, d_out, d_in, tasks
    f"{shape}-{tasks}": (*sizes, tasks)
    for tasks in (2, 3, 4, 8)
    for shape, sizes in {
        "tall": (90, 64, 16),
        "wide": (90, 16, 64),
        "square": (90, 24, 24),
        "few": (7, 40, 20),
    }.items()
}


ISO = {  # merge of a stack, the formula
    "iso-c": (IsoC(), reference.iso_c),
    "iso-cts": (IsoCTS(), reference.iso_cts),
    "iso-cts-own": (IsoCTS(0.0), lambda deltas: reference.iso_cts(deltas, 0.0)),
    "iso-cts-half": (IsoCTS(0.5), lambda deltas: reference.iso_cts(deltas, 0.5)),
    "iso-cts-common": (IsoCTS(1.0), lambda deltas: reference.iso_cts(deltas, 1.0)),
    "iso-c-published": (IsoC(rank="published"), lambda deltas: reference.iso_c(deltas, published=True)),
    "iso-cts-published": (IsoCTS(rank="published"), lambda deltas: reference.iso_cts(deltas, published=True)),
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
@iso
@pytest.mark.parametrize("shape", MANY_EXPERTS.values(), ids=MANY_EXPERTS)
def test_isotropic_merging_of_lora_experts_is_the_formula(seed, method, formula, shape):
    updates = low_rank(random_problem(seed, shape)[0])
    assert relative_error(method.merge(stack(updates)).update, formula(updates)) < 1e-4


@seeds
@shapes
@pytest.mark.parametrize("method", [IsoC, IsoCTS])
def test_both_ranks_are_one_where_updates_have_full_rank(seed, shape, method):
    deltas, _ = random_problem(seed, shape)
    found, published = (method(rank=rank).merge(stack(deltas)).update for rank in ("numerical", "published"))
    assert torch.equal(found, published)
    lora = low_rank(deltas)
    if sum(1 + t % 2 for t in range(1, len(deltas) + 1)) < min(shape[1:3]):  # the sum of their ranks
        found, published = (method(rank=rank).merge(stack(lora)).update for rank in ("numerical", "published"))
        assert float(found.norm()) > 1.2 * float(published.norm())


@seeds
@pytest.mark.parametrize("method", [IsoC(), IsoCTS()], ids=lambda method: method.name)
def test_isotropic_merging_keeps_what_lora_experts_learned(seed, method):
    """The gain along an expert's own update, `⟨Δ_M, Δ_t⟩ / ‖Δ_t‖²`: 0.85 or more, by the published form 0.12."""
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(2, 256, 8, generator=generator) for _ in range(4)]
    updates = [b @ a.T for b, a in factors]
    for rank, least, most in (("numerical", 0.82, 1.02), ("published", 0.1, 0.14)):
        merged = replace(method, rank=rank).merge(stack(updates)).update
        gains = [float((merged * update).sum() / update.square().sum()) for update in updates]
        assert least < sum(gains) / 4 < most


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
    masks = [
        torch.rand(deltas[0].shape, generator=method.draws("layer.0.up.weight/0", place)) < 0.25 for place in range(3)
    ]
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
        "scale_fallback": True,
        "base_biases": False,
        "all_columns": False,
        "largest_alpha": 3.0,
    },
}
# Steps 3 and 8 only; both polar factors of the TSV-M fallback keep their scale; α multiplies everything but biases,
# which are the base's.
PRESETS["esm-roberta"] = (
    PRESETS["esm"]
    | PUBLISHED
    | {
        "layer_exponent": 2.0,
        "keep_fallback_scale": True,
        "published_embeddings": True,
        "scale_all": True,
        "base_biases": True,
        "largest_alpha": 5.0,
        "tolerance": 0.0,
    }
)
# Steps 3, 4 and 8, factor 2, q, k and v as one weight; α multiplies calibrated maps alone.
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
        "scale_fallback": False,
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


# Weights of many families of Transformers that lead out of an attention, or from a tower to both towers' space.
OUTPUTS = [
    "vision_model.encoder.layers.3.self_attn.out_proj",
    "vit.encoder.layer.3.attention.output.dense",
    "vit.layers.3.attention.o_proj",
    "transformer.layer.3.attention.out_lin",
    "attentions.3.out_lin",
    "layers.3.attn.Wo",
    "encoder.block.3.layer.0.SelfAttention.o",
    "decoder.block.3.layer.1.EncDecAttention.o",
    "encoder.block.3.layer.0.LocalSelfAttention.o",
    "h.3.self_attention.dense",
    "layers.3.self_attn.dense",
    "gpt_neox.layers.3.attention.dense",
    "h.3.attn.c_proj",
    "h.3.crossattention.c_proj",
    "encoder.layer.3.crossattention.output.dense",
    "encoder.layer.3.attention.attn.o",
    "visual.blocks.3.attn.proj",
    "stages.0.blocks.3.window_attn.proj",
    "vision_model.encoder.layers.3.self_attn.projection",
    "encoder.layer.3.attention.projection_layer",
    "encoder.layers.3.self_attn.linear_out",
    "encoder.layers.3.cross_attn_image_to_token.out_proj",
    "encoder.layers.3.self_attn.o_proj.linear",
    "encoder.layers.3.self_attn.output",
    "encoder.layers.3.encoder_attn.output_proj",
    "blocks.3.0.attention.post_proj",
    "visual_projection",
    "text_projection",
]
# Weights that the ViT code calibrates: maps that read queries, keys and values, and both of an MLP.
CALIBRATED = [
    "vision_model.encoder.layers.3.self_attn.q_proj",
    "vision_model.encoder.layers.3.mlp.fc1",
    "vision_model.encoder.layers.3.mlp.fc2",
    "vit.encoder.layer.3.attention.attention.query",
    "vit.encoder.layer.3.intermediate.dense",
    "vit.encoder.layer.3.output.dense",
    "encoder.layer.3.attention.self.value",
    "transformer.layer.3.attention.q_lin",
    "transformer.layer.3.ffn.lin2",
    "layers.3.attn.Wqkv",
    "layers.3.mlp.Wo",
    "encoder.block.3.layer.1.DenseReluDense.wo",
    "h.3.attn.c_attn",
    "h.3.mlp.c_proj",
    "h.3.mlp.dense_4h_to_h",
    "visual.blocks.3.attn.qkv",
    "layers.3.post_attention_layernorm.mlp.fc2",
    "layers.3.mlp.out_proj",
]


@pytest.mark.parametrize(("name", "rule"), [(n, "tsv-m") for n in OUTPUTS] + [(n, "esm") for n in CALIBRATED])
def test_the_vit_preset_calibrates_and_scales_qkv_and_the_mlp_alone(name, rule):
    deltas, inputs = random_problem(0, (40, 18, 15, 3))
    problem = stack(deltas, [exact(x) for x in inputs], f"{name}.weight")
    merged = EssentialMerge.vit().merge(problem)
    assert (merged.how, merged.scaled) == (rule, rule == "esm")
    merged = EssentialMerge.roberta().merge(problem)
    assert (merged.how, merged.scaled) == ("esm", True)


@seeds
@pytest.mark.parametrize("shape", MANY_EXPERTS.values(), ids=MANY_EXPERTS)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["esm-roberta", "esm-vit"])
def test_presets_are_the_published_code_with_any_number_of_experts(seed, shape, lora, name):
    """Whose means run over all ⌊d_out/T⌋ directions of a task, also where most have no energy."""
    deltas, inputs = random_problem(seed, shape)
    if lora:
        deltas = low_rank(deltas)
    exponents = {"task_exponent": 2.0, "dimension_exponent": 2.0, "factor": 2.0} if name == "esm-vit" else {}
    expected = reference.esm_published(deltas, inputs, **exponents)
    found = METHODS[name]().merge(stack(deltas, [exact(x) for x in inputs])).update
    assert relative_error(found, expected) < 1e-4
    assert relative_error(reference.esm(deltas, inputs, **PUBLISHED | exponents), expected) < 1e-8


def test_directions_without_energy_count_only_in_the_presets():
    """On tall maps of two and three experts they take half, and a quarter, of the norm."""
    for tasks, share in ((2, 0.5), (3, 0.75)):
        deltas, inputs = random_problem(tasks, (200, 120, 30, tasks))
        problem = stack(deltas, [exact(x) for x in inputs])
        preset = EssentialMerge.roberta().merge(problem).update
        existing = replace(EssentialMerge.roberta(), all_columns=False).merge(problem).update
        assert float(existing.norm() / preset.norm()) == pytest.approx(share, abs=0.03)
        assert relative_error(existing / existing.norm(), preset / preset.norm()) < 1e-5
    assert not EssentialMerge().all_columns


@pytest.mark.parametrize("size", [(18,), (4, 18)])
def test_the_roberta_preset_leaves_biases_at_the_bases(size):
    deltas = [torch.ones(size), torch.ones(size)]
    for name, how in (("layer.0.dense.bias", "base"), ("layer.0.norm.weight", "tsv-m" if len(size) == 2 else "mean")):
        merged = EssentialMerge.roberta().merge(stack(deltas, name=name, is_linear=False))
        assert (merged.how, bool(merged.update.any())) == (how, how != "base")
    assert EssentialMerge.vit().merge(stack(deltas, name="layer.0.dense.bias", is_linear=False)).update.any()


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
    assert resolve_method({"name": "esm++", "depth": "1e-1"}).depth == 0.1  # no number by default
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
