"""WUDI, CAT and KnOTS against the literal float64 formulas, on all kinds of shapes and degenerate inputs."""

import pytest
import torch

from hf_esm import CAT, TIES, WUDI, HfEsmError, KnOTS
from hf_esm.methods import Stack, WholeUpdates, magnitude_threshold
from hf_esm.methods.knots import joint_coordinates
from support import reference
from support.problems import exact, random_problem, relative_error, seeds, shapes, streamed


WEIGHTS = (0.5, -1.25, 0.0, 2.0, 1.0)  # of the first tasks of a problem


DEGENERATE = {  # what becomes of ordinary updates and inputs
    "one-task": lambda deltas, inputs: (deltas[:1], inputs[:1]),
    "one-update-zero": lambda deltas, inputs: ([deltas[0] * 0, *deltas[1:]], inputs),
    "all-updates-zero": lambda deltas, inputs: ([delta * 0 for delta in deltas], inputs),
    "one-input-zero": lambda deltas, inputs: (deltas, [inputs[0] * 0, *inputs[1:]]),
    "one-input-empty": lambda deltas, inputs: (deltas, [inputs[0][:0], *inputs[1:]]),
    "more-tasks-than-outputs": lambda deltas, inputs: ([delta[:2] for delta in deltas], inputs),
    "one-output": lambda deltas, inputs: ([delta[:1] for delta in deltas], inputs),
    "one-input-feature": lambda deltas, inputs: ([delta[:, :1] for delta in deltas], [x[:, :1] for x in inputs]),
    "low-rank-updates": lambda deltas, inputs: ([delta[:, :2] @ delta[:2] for delta in deltas], inputs),
    "identical-experts": lambda deltas, inputs: ([deltas[0]] * len(deltas), [inputs[0]] * len(deltas)),
    "opposite-updates": lambda deltas, inputs: ([deltas[0], -deltas[0], *deltas[2:]], inputs),
}


def stack(deltas, inputs=(), weights=(), thresholds=()):
    return Stack(
        "layer.0.up.weight",
        "layer.up.weight",
        deltas,
        is_linear=deltas[0].dim() == 2,
        statistics=[exact(x) for x in inputs],
        thresholds=list(thresholds),
        weights=list(weights),
    )


def check(deltas, inputs, weights=None):
    for ridge in (0.0, 0.3):
        expected = reference.wudi(deltas, ridge, weights)
        assert relative_error(WUDI(ridge=ridge).merge(stack(deltas, weights=weights or ())).update, expected) < 1e-4
    times = [w * d for w, d in zip(weights, deltas) if w] if weights else deltas
    read = [x for w, x in zip(weights, inputs) if w] if weights else inputs
    for removed, trade_off in ((1, 0.0), (2, 1.0), (100, 0.5)):
        expected = reference.cat(times, read, removed, trade_off)
        merged = CAT(removed, trade_off).merge(stack(deltas, inputs, weights or ()))
        error = (merged.update.double() - expected).norm() / sum(d.double().norm() for d in deltas).clamp_min(1e-30)
        assert error < 1e-4 and merged.how == "cat"
    vectors = [delta[0] for delta in deltas]
    expected = reference.cat_of_vectors([d[0] for d in times], 2)
    assert relative_error(CAT(2).merge(stack(vectors, weights=weights or ())).update, expected) < 1e-6


@seeds
@shapes
@pytest.mark.parametrize("weighted", [False, True])
def test_wudi_and_cat_are_the_formulas(seed, shape, weighted):
    deltas, inputs = random_problem(seed, shape)
    check(deltas, inputs, list(WEIGHTS[: len(deltas)]) if weighted else None)


@seeds
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_inputs_give_the_formulas(seed, case):
    deltas, inputs = DEGENERATE[case](*random_problem(seed, (9, 20, 16, 3)))
    check(deltas, inputs)
    merged = KnOTS("task-arithmetic").merge(stack(deltas)).update
    assert relative_error(merged, reference.task_arithmetic(deltas)) < 1e-4


@seeds
def test_statistics_of_any_form_give_one_merge_by_cat(seed):
    deltas, inputs = random_problem(seed, (150, 21, 18, 3))
    whole = stack(deltas, inputs)
    parts = stack(deltas)
    parts.statistics = [streamed(x) for x in inputs]
    assert relative_error(CAT().merge(parts).update, CAT().merge(whole).update) < 1e-4


@seeds
@shapes
def test_adam_of_wudi_is_the_published_loop(seed, shape):
    deltas, _ = random_problem(seed, shape)
    expected = reference.wudi_published(deltas, 20, 1e-3)
    merged = WUDI(solver="adam", steps=20, learning_rate=1e-3).merge(stack(deltas)).update
    assert relative_error(merged, expected) < 1e-4
    zero = [deltas[0] * 0] * 2
    assert not WUDI(solver="adam", steps=3).merge(stack(zero)).update.any()


def test_the_exact_solution_of_wudi_is_below_the_published_loss():
    deltas, _ = random_problem(5, (9, 20, 16, 3))

    def loss(merged):
        return sum((((merged - d.double()) @ d.double().T).square() / d.double().square().sum()).sum() for d in deltas)

    found = [WUDI(solver=solver, ridge=0).merge(stack(deltas)).update.double() for solver in ("exact", "adam")]
    assert loss(found[0]) < loss(found[1]) < loss(sum(deltas).double())


@seeds
def test_cat_takes_no_conflict_of_tasks_that_read_apart(seed):
    """Of experts whose updates change what no other task reads, nothing is taken away."""
    deltas, inputs = random_problem(seed, (40, 18, 16, 2))
    halves = [torch.arange(16) < 8, torch.arange(16) >= 8]
    deltas = [delta * half for delta, half in zip(deltas, halves)]
    inputs = [x * half for x, half in zip(inputs, halves)]
    assert relative_error(CAT().merge(stack(deltas, inputs)).update, sum(deltas)) < 1e-6


def ties(density):
    return lambda parts: reference.ties(parts, density)


@seeds
@shapes
@pytest.mark.parametrize("low_rank", [False, True])
def test_knots_is_the_other_method_in_the_joint_basis(seed, shape, low_rank):
    deltas, _ = random_problem(seed, shape)
    deltas = [delta[:, :2] @ delta[:2] for delta in deltas] if low_rank else deltas
    whole = WholeUpdates(
        tuple(map(str, range(len(deltas)))), lambda task: iter(()), lambda: iter([stack(deltas)]), lambda: None
    )
    method = KnOTS({"name": "ties", "density": 0.3})
    thresholds = method.prepare(whole)
    merged = method.merge(stack(deltas, thresholds=thresholds))
    basis, parts = joint_coordinates(deltas)
    assert thresholds == [magnitude_threshold(lambda part=part: [part.float()], 0.3) for part in parts]
    assert merged.how == "knots with ties" and relative_error(basis @ parts[0], deltas[0]) < 1e-5
    inside = TIES(0.3).merge(stack([part.float() for part in parts], thresholds=thresholds)).update
    assert relative_error(merged.update, basis @ inside.double()) < 1e-5
    expected = reference.knots(deltas, lambda parts: sum(parts) / 3)
    third = KnOTS("task-arithmetic").merge(stack(deltas, weights=[1 / 3] * len(deltas)))
    assert relative_error(third.update, expected) < 1e-5


@seeds
def test_knots_with_ties_is_the_formula(seed):
    deltas, _ = random_problem(seed, (9, 20, 16, 3))
    method = KnOTS("ties")
    whole = WholeUpdates(("a", "b", "c"), lambda task: iter(()), lambda: iter([stack(deltas)]), lambda: None)
    merged = method.merge(stack(deltas, thresholds=method.prepare(whole))).update
    assert relative_error(merged, reference.knots(deltas, ties(0.2))) < 1e-4


def test_knots_takes_the_defaults_of_the_other_method_and_refuses_what_merges_no_weight_alone():
    assert [KnOTS(name).default_alpha for name in ("ties", "dare")] == [1.0, 0.3]
    with pytest.raises(HfEsmError, match=r"'mean': the weights 1, -1 sum to 0"):
        KnOTS("mean").check_weights([1.0, -1.0])
    with pytest.raises(HfEsmError, match="'karcher' reads the base's weight, which is not in the basis"):
        KnOTS("karcher").merge(stack(random_problem(0, (9, 20, 16, 3))[0]))
    assert KnOTS("regmean").needs_statistics and not KnOTS("mean").tunable
    for name in ("esm++", "concrete-adamerging", "knots", "auto"):
        with pytest.raises(HfEsmError, match=r"does not merge one weight alone\. Name 'ties' or another"):
            KnOTS(name)
