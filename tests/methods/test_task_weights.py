"""Weights of tasks, by every method, against the literal float64 formulas."""

import pytest
import torch

from hf_esm import DARE, METHODS, TIES, TSVM, EssentialMerge, HfEsmError, IsoC, IsoCTS, Mean, RegMean, TaskArithmetic
from hf_esm.methods import ConcreteAdaMerging, LearnedMask, buffer_stack, magnitude_threshold, mean_update
from hf_esm.methods.stack import Stack
from support import reference
from support.helpers import PUBLISHED
from support.problems import exact, random_problem, relative_error, seeds, shapes


WEIGHTS = (0.5, -1.25, 0.0, 2.0, 1.0)  # of the first tasks of a problem


def stack(deltas, weights, inputs=(), thresholds=(), base=None):
    statistics = [exact(x) for x in inputs]
    return Stack(
        "layer.0.up.weight",
        "layer.up.weight",
        deltas,
        is_linear=True,
        routable=True,
        statistics=statistics,
        thresholds=list(thresholds),
        weights=list(weights),
        read_base=lambda: torch.zeros_like(deltas[0]) if base is None else base,
    )


def times(deltas, weights):
    return [w * delta.double() for w, delta in zip(weights, deltas)]


ELEMENTWISE = {
    "mean": (Mean(), reference.weighted_mean),
    "task-arithmetic": (TaskArithmetic(), lambda deltas, weights: sum(times(deltas, weights))),
    "iso-c": (IsoC(), lambda deltas, weights: reference.iso_c(times(deltas, weights))),
    "iso-cts": (IsoCTS(0.5), lambda deltas, weights: reference.iso_cts(times(deltas, weights), 0.5)),
    "tsv-m": (TSVM(tolerance=0), lambda deltas, weights: reference.tsv_m(deltas, weights=weights)),
    "tsv-m-scaled": (
        EssentialMerge(keep_fallback_scale=True, tolerance=0),
        lambda deltas, weights: reference.tsv_m(deltas, True, weights),
    ),
}


@seeds
@shapes
@pytest.mark.parametrize(("method", "formula"), ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_methods_of_updates_alone_are_the_formulas(seed, shape, method, formula):
    deltas, _ = random_problem(seed, shape)
    weights = WEIGHTS[: len(deltas)]
    assert relative_error(method.merge(stack(deltas, weights)).update, formula(deltas, weights)) < 1e-4


@seeds
@shapes
@pytest.mark.parametrize(
    "settings",
    [{}, PUBLISHED, {"match_norm": False, "gamma": 0.3}, {"sum_subtracted": 3.0}, {"task_exponent": 2.0}],
)
def test_esm_is_the_formula(seed, shape, settings):
    deltas, inputs = random_problem(seed, shape)
    weights = WEIGHTS[: len(deltas)]
    expected = reference.esm(deltas, inputs, **settings, weights=weights)
    merged = EssentialMerge(tolerance=0, **settings).merge(stack(deltas, weights, inputs))
    assert merged.how == "esm" and relative_error(merged.update, expected) < 1e-4


@seeds
def test_esm_leaves_out_tasks_that_change_nothing(seed):
    deltas, inputs = random_problem(seed, (40, 18, 15, 4))
    deltas[1] = torch.zeros_like(deltas[1])
    weights = (0.5, 7.0, -1.0, 2.0)
    for settings in ({}, PUBLISHED):
        merged = EssentialMerge(tolerance=0, **settings).merge(stack(deltas, weights, inputs)).update
        assert relative_error(merged, reference.esm(deltas, inputs, **settings, weights=weights)) < 1e-4


@seeds
@shapes
@pytest.mark.parametrize(("off_diagonal", "ridge"), [(0.9, 0.0), (1.0, 0.3)])
def test_regmean_is_the_formula(seed, shape, off_diagonal, ridge):
    deltas, inputs = random_problem(seed, shape)
    weights = WEIGHTS[: len(deltas)]
    expected = reference.regmean(deltas, inputs, off_diagonal, ridge, weights)
    merged = RegMean(off_diagonal, ridge).merge(stack(deltas, weights, inputs))
    assert merged.how == "regmean" and relative_error(merged.update, expected) < 1e-4


@seeds
def test_ties_is_the_formula(seed):
    deltas, _ = random_problem(seed, (9, 20, 16, 4))
    thresholds = [magnitude_threshold(lambda d=delta: [d], 0.3) for delta in deltas]
    merged = TIES(0.3).merge(stack(deltas, WEIGHTS[:4], thresholds=thresholds)).update
    assert relative_error(merged, reference.ties(times(deltas, WEIGHTS), 0.3)) < 1e-6


@seeds
def test_dare_is_the_formula(seed):
    deltas, _ = random_problem(seed, (9, 20, 16, 4))
    method = DARE(0.4)
    masks = [
        torch.rand(deltas[0].shape, generator=method.draws("layer.0.up.weight/0", place)) < 0.4 for place in range(4)
    ]
    merged = method.merge(stack(deltas, WEIGHTS[:4])).update
    assert relative_error(merged, reference.dare(times(deltas, WEIGHTS), masks, 0.4)) < 1e-6


@seeds
def test_concrete_is_the_formula(seed):
    deltas, _ = random_problem(seed, (9, 20, 16, 3))
    method = ConcreteAdaMerging()
    mask, coefficients = torch.rand(20, 16), torch.tensor([0.2, 0.5, 0.3])
    method.learned = LearnedMask({"layer.0.up.weight": [mask]}, {"layer.0.up.weight": coefficients})
    merged = method.merge(stack(deltas, WEIGHTS[:3])).update
    expected = sum(c * delta for c, delta in zip(coefficients.double(), times(deltas, WEIGHTS))) * mask.double()
    assert relative_error(merged, expected) < 1e-5


@seeds
@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name]().chooses])
def test_weights_of_one_are_no_weights(seed, name):
    method = METHODS[name]()
    tasks = method.most_experts or 3
    deltas, inputs = random_problem(seed, (40, 18, 15, tasks))
    mask, ones = torch.randn(18, 15), torch.ones(tasks)
    method.learned = LearnedMask({"layer.0.up.weight": [mask]}, {"layer.0.up.weight": ones})
    thresholds = [0.01, 0.02, 0.03][:tasks]
    for matrices, known in ((deltas, inputs), ([delta[0] for delta in deltas], ())):
        if not known:
            method.learned = LearnedMask({}, {})
        merged = [method.merge(stack(matrices, w, known, thresholds)).update for w in ([], [1] * tasks, [1.0] * tasks)]
        assert all(torch.equal(other, merged[0]) for other in merged)
        method.check_weights([1.0] * tasks)


@seeds
def test_what_is_averaged_has_a_weighted_mean(seed):
    deltas = list(torch.randn(3, 7, generator=torch.Generator().manual_seed(seed)))
    for weights in ((1.0, -1.0, 0.0), (0.1, 0.2, -0.3), (0.5, 2.0, -0.25)):
        expected = reference.weighted_mean(deltas, [round(w, 9) for w in weights])
        expected = sum(times(deltas, weights)) / 3 if abs(sum(weights)) < 1e-9 else expected
        for method in (EssentialMerge(tolerance=0), RegMean(), IsoC(), TSVM(tolerance=0)):
            assert relative_error(method.merge(stack(deltas, weights)).update, expected) < 1e-6
    buffer = mean_update(buffer_stack(stack(deltas, (0.5, -3.0, 1.5))), scaled=False).update
    assert relative_error(buffer, (0.5 * deltas[0] + 1.5 * deltas[2]) / 2) < 1e-6


def test_a_mean_of_weights_that_cancel_is_refused():
    with pytest.raises(HfEsmError, match=r"'mean': the weights 0\.1, 0\.2, -0\.3 sum to 0"):
        Mean().check_weights([0.1, 0.2, -0.3])
    Mean().check_weights([0.1, 0.2, -0.2])
