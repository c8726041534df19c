"""Methods that drop entries, and SCE, against the literal float64 formulas; whole updates and single weights."""

from dataclasses import fields

import pytest
import torch

from hf_esm import METHODS, TIES, HfEsmError
from hf_esm.methods.sparse import DARE, DARETIES, DELLA, SCE, Breadcrumbs, magnitude_of_rank, ranked_magnitudes
from hf_esm.methods.stack import Stack, WholeUpdates
from support import reference
from support.problems import relative_error, seeds


SIZES = pytest.mark.parametrize("size", [(5, 7), (60,), (12, 3, 4), (1, 9), (9, 1), ()], ids=str)
TASKS = pytest.mark.parametrize("tasks", [1, 2, 3, 8])
WEIGHTS = (0.5, -1.25, 0.0, 2.0, 1.0, 1.0, 3.0, 1.0)


def updates_of(seed, size, tasks):
    return list(torch.randn(tasks, *size, generator=torch.Generator().manual_seed(seed)))


def stack(updates, weights=(), **known):
    return Stack("layer.0.up.weight", "layer.up.weight", updates, weights=list(weights), **known)


def weighted(updates, weights=WEIGHTS):
    return [weight * update.double() for weight, update in zip(weights, updates)]


@seeds
@SIZES
@TASKS
@pytest.mark.parametrize("density", [0.001, 0.3, 1.0])
def test_ties_of_each_tensor_is_the_formula(seed, size, tasks, density):
    updates = updates_of(seed, size, tasks)
    merged = TIES(density, density_scope="tensor").merge(stack(updates, WEIGHTS[:tasks])).update
    assert relative_error(merged, reference.ties(weighted(updates), density)) < 1e-6
    plain = TIES(density, density_scope="tensor").merge(stack(updates)).update
    assert relative_error(plain, reference.ties(updates, density)) < 1e-6


@seeds
@SIZES
@TASKS
@pytest.mark.parametrize(("density", "gamma"), [(0.1, 0.01), (0.3, 0.2), (0.9, 0.5), (0.5, 0.0), (1.0, 0.3)])
def test_breadcrumbs_are_the_formula(seed, size, tasks, density, gamma):
    updates = updates_of(seed, size, tasks)
    merged = Breadcrumbs(density, gamma).merge(stack(updates, WEIGHTS[:tasks]))
    terms = [weight * reference.breadcrumbs([update], density, gamma) for weight, update in zip(WEIGHTS, updates)]
    error = (merged.update.double() - sum(terms)).norm()
    assert error < 1e-6 * sum(term.norm() for term in terms)  # terms that cancel leave an update as small as rounding
    assert (merged.how, merged.update.dtype) == ("breadcrumbs", torch.float32)


@seeds
@pytest.mark.parametrize(("method", "formula"), [
    (TIES(0.3), lambda updates: reference.ties(updates, 0.3)),
    (Breadcrumbs(0.3, 0.1, "model"), lambda updates: reference.breadcrumbs(updates, 0.3, 0.1)),
], ids=["ties", "breadcrumbs"])  # fmt: skip
def test_whole_updates_are_ranked_as_one_vector(seed, method, formula):
    """Weights of unlike sizes, of which the small ones lose everything; equal to ranking them in one tensor."""
    updates = updates_of(seed, (300,), 3)
    for update in updates:
        update[:100] *= 0.01
    parts = {task: update.split([100, 7, 193]) for task, update in zip("abc", updates)}
    thresholds = method.prepare(WholeUpdates(tuple("abc"), lambda task: iter(parts[task]), iter, lambda: None))
    merged = [
        method.merge(stack(list(part), thresholds=thresholds)).update for part in zip(*parts.values(), strict=True)
    ]
    assert relative_error(torch.cat(merged), formula(updates)) < 1e-6
    assert not merged[0].any() and merged[2].any()
    assert METHODS[method.name](density_scope="tensor").prepare(WholeUpdates(("a",), None, None, None)) == []


@seeds
def test_ranks_are_exact_for_equal_and_tiny_numbers(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3000, generator=generator) * 10.0 ** torch.randint(-42, 30, (3000,), generator=generator)
    values[torch.rand(3000, generator=generator) < 0.3] = 0.0
    values[:400] = values[400]
    ordered = values.abs().sort(descending=True).values
    ranks = [1, 7, 1500, 2100, 3000, 7]
    found = ranked_magnitudes(lambda: values.split(999), lambda size: ranks if size == 3000 else [])
    assert found == [float(ordered[rank - 1]) for rank in ranks]


@seeds
def test_ranks_of_a_large_tensor_are_exact(seed):
    """More entries than are put in order: a sample brackets the magnitude."""
    values = torch.randn(500, 900, generator=torch.Generator().manual_seed(seed))
    mostly_equal = values.bfloat16().float().clamp(-0.5, 0.5)
    for tensor in (values, mostly_equal, values * (values > 2), torch.zeros_like(values)):
        ordered = tensor.abs().flatten().sort(descending=True).values
        for rank in (1, 2, 9_000, 90_000, 449_999, 450_000):
            assert magnitude_of_rank(tensor, rank) == ordered[rank - 1], rank


@seeds
def test_a_large_weight_is_drawn_as_one(seed):
    updates, method = updates_of(seed, (500, 300), 2), DARE(0.4, drop_seed=seed)
    draws = [method.draws("layer.0.up.weight/0", place) for place in range(2)]
    masks = [torch.rand(update.shape, generator=generator) < 0.4 for update, generator in zip(updates, draws)]
    assert relative_error(method.merge(stack(updates)).update, reference.dare(updates, masks, 0.4)) < 1e-6


@seeds
@SIZES
@TASKS
def test_dare_ties_is_the_formula(seed, size, tasks):
    updates, method = updates_of(seed, size, tasks), DARETIES(0.4, drop_seed=seed)
    masks = [
        torch.rand(updates[0].shape, generator=method.draws("layer.0.up.weight/0", place)) < 0.4
        for place in range(tasks)
    ]
    expected = reference.disjoint_mean([u * mask / 0.4 for u, mask in zip(weighted(updates), masks)])
    assert relative_error(method.merge(stack(updates, WEIGHTS[:tasks])).update, expected) < 1e-6
    everything = DARETIES(1.0).merge(stack(updates)).update
    assert relative_error(everything, reference.ties(updates, 1.0)) < 1e-6


@seeds
@SIZES
@TASKS
def test_della_is_the_formula(seed, size, tasks):
    updates, method = updates_of(seed, size, tasks), DELLA(0.5, epsilon=0.8, drop_seed=seed)
    drawn = []
    for place, update in enumerate(updates):
        shares = reference.della_shares(update, 0.5, 0.8)
        uniform = torch.rand(update.shape, generator=method.draws("layer.0.up.weight/0", place))
        drawn.append(WEIGHTS[place] * update.double() * (uniform < shares) / shares)
        assert relative_error(torch.as_tensor(method.shares(update)).expand(update.shape), shares) < 1e-6
    merged = method.merge(stack(updates, WEIGHTS[:tasks]))
    assert relative_error(merged.update, reference.disjoint_mean(drawn)) < 1e-5
    assert (merged.how, merged.update.dtype) == ("della", torch.float32)
    assert relative_error(DELLA(1.0).merge(stack(updates)).update, reference.ties(updates, 1.0)) < 1e-6


@seeds
def test_della_keeps_large_entries_likelier_and_the_expected_update(seed):
    update, total = updates_of(seed, (40, 60), 1)[0], torch.zeros(40, 60)
    kept = torch.zeros(40, 60)
    for drop_seed in range(300):
        drawn = DELLA(0.5, epsilon=0.6, drop_seed=drop_seed).merge(stack([update])).update
        total, kept = total + drawn / 300, kept + (drawn != 0) / 300
    order = update.abs().argsort(dim=1)
    shares = kept.gather(1, order).mean(0)  # by rank
    assert shares[:5].mean() < 0.26 and shares[-5:].mean() > 0.74 and kept.mean() == pytest.approx(0.5, abs=0.01)
    assert float((total * update).sum() / update.square().sum()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("density", "epsilon", "below"), [(0.95, 0.14, "0.1"), (0.05, 0.14, "0.1"), (0.1, 0.2, "0.2")]
)
def test_shares_of_della_that_are_none_are_refused(density, epsilon, below):
    with pytest.raises(HfEsmError, match=f"della: with density {density}.*Set epsilon below {below}"):
        DELLA(density, epsilon=epsilon)
    DELLA(density, epsilon=0.99 * float(below))


@seeds
@SIZES
@TASKS
@pytest.mark.parametrize("density", [0.001, 0.3, 1.0])
def test_sce_is_the_formula(seed, size, tasks, density):
    updates = updates_of(seed, size, tasks)
    merged = SCE(density).merge(stack(updates, WEIGHTS[:tasks]))
    assert relative_error(merged.update, reference.sce(weighted(updates), density)) < 1e-5
    assert (merged.how, merged.update.dtype) == ("sce", torch.float32)


DEGENERATE = {  # what becomes of ordinary updates
    "one zero": lambda updates: [updates[0] * 0, *updates[1:]],
    "all zero": lambda updates: [update * 0 for update in updates],
    "identical": lambda updates: [updates[0]] * 3,
    "opposite": lambda updates: [updates[0], -updates[0], updates[1]],
    "tiny": lambda updates: [update * 1e-20 for update in updates],
    "unequal": lambda updates: [update * 10.0 ** (-3 * t) for t, update in enumerate(updates)],
}


@seeds
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_updates_give_the_formulas(seed, case):
    updates = DEGENERATE[case](updates_of(seed, (6, 8), 3))
    problem = stack(updates)
    assert relative_error(TIES(0.5, "tensor").merge(problem).update, reference.ties(updates, 0.5)) < 1e-6
    assert relative_error(SCE(0.5).merge(problem).update, reference.sce(updates, 0.5)) < 1e-5
    if case not in ("all zero", "one zero"):
        expected = reference.breadcrumbs(updates, 0.5, 0.1)
        assert relative_error(Breadcrumbs(0.5, 0.1).merge(problem).update, expected) < 1e-6
    for method in (Breadcrumbs(), DELLA(), DARETIES(), SCE(0.01)):
        merged = method.merge(problem).update
        assert merged.isfinite().all() and bool(merged.any()) == (case != "all zero")


@seeds
@pytest.mark.parametrize("method", [TIES(1.0, "tensor"), Breadcrumbs(1.0), DARETIES(1.0), DELLA(1.0), SCE(1.0), SCE()])
def test_one_expert_of_whom_nothing_is_dropped_is_that_expert(seed, method):
    for size in ((6, 8), (7,), ()):
        (update,) = updates_of(seed, size, 1)
        assert relative_error(method.merge(stack([update])).update, update) < 1e-6


@seeds
def test_entries_of_one_magnitude_are_kept_together(seed):
    """Updates of bfloat16 checkpoints have few magnitudes; which of several equal ones is kept is nobody's choice."""
    updates = [(8 * update).round() / 8 for update in updates_of(seed, (40, 50), 2)]
    for method in (TIES(0.2, "tensor"), Breadcrumbs(0.3, 0.1)):
        merged = method.merge(stack(updates[:1])).update
        kept = set(updates[0][merged != 0].abs().tolist())
        assert kept and kept.isdisjoint(updates[0][(merged == 0) & (updates[0] != 0)].abs().tolist())
        turned = method.merge(stack([updates[0].flip(0)])).update
        assert torch.equal(turned.flip(0), merged)


@pytest.mark.parametrize("name", METHODS)
def test_ranges_to_search_are_values_that_the_settings_take(name):
    made = METHODS[name]
    for setting in fields(made()):
        if "search" in setting.metadata:
            low, high, spread = setting.metadata["search"]
            assert low < high and spread in ("linear", "log") and (low > 0 or spread == "linear")
            current = made()
            for value in (low, high):
                setattr(current, setting.name, value)
                current.__post_init__()
