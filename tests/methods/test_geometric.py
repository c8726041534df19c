"""Model Stock, and interpolation along a sphere, against the literal float64 formulas."""

import pytest
import torch

from hf_esm import HfEsmError
from hf_esm.methods.geometric import SLERP, Karcher, ModelStock, NuSLERP
from hf_esm.methods.stack import Stack
from support import reference
from support.problems import relative_error, seeds


SIZES = pytest.mark.parametrize("size", [(5, 7), (60,), (4, 3, 5), (1, 9), (9, 1), ()], ids=str)


def problem_of(seed, size, tasks, scale=0.3):
    """A base, and updates of it that have something in common."""
    generator = torch.Generator().manual_seed(seed)
    base, common = torch.randn(2, *size, generator=generator)
    return base, [scale * (common + (1 + t) * torch.randn(size, generator=generator)) for t in range(tasks)]


def stack(base, updates, weights=()):
    read = None if base is None else lambda: base
    return Stack("layer.0.up.weight", "layer.up.weight", updates, weights=list(weights), read_base=read)


@seeds
@SIZES
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_model_stock_is_the_formula(seed, size, tasks):
    _, updates = problem_of(seed, size, tasks)
    merged = ModelStock().merge(stack(None, updates))
    assert relative_error(merged.update, reference.model_stock(updates)) < 1e-5
    assert (merged.how, merged.update.dtype, merged.scaled) == ("model-stock", torch.float32, True)
    if tasks > 2 and merged.update.any():  # a weight is that of an expert in the mean, and 0 leaves an expert out
        weights = [2.0, 0.0, *[1.0] * (tasks - 2)]
        kept = [updates[0], *updates[2:]]
        share = reference.model_stock(kept).norm() / reference.mean(kept).norm()
        expected = share * reference.weighted_mean(updates, weights)
        assert relative_error(ModelStock().merge(stack(None, updates, weights)).update, expected) < 1e-5


def test_model_stock_is_the_mean_of_equal_and_the_base_of_unrelated_updates():
    update = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    rows = [update * (torch.arange(4)[:, None] == row) for row in range(3)]
    assert relative_error(ModelStock().merge(stack(None, [update, 3 * update])).update, 2 * update) < 1e-6
    for unrelated in (rows, [update, -update], [update, -update, update * 0], [update * 0] * 2):
        assert not ModelStock().merge(stack(None, unrelated)).update.any()
    tiny = [1e-20 * update, 1e-20 * update]
    assert relative_error(ModelStock().merge(stack(None, tiny)).update * 1e20, update) < 1e-6


@seeds
@SIZES
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("scale", [0.001, 1.0], ids=["near", "far"])
def test_slerp_is_the_formula(seed, size, t, scale):
    base, updates = problem_of(seed, size, 2, scale)
    first, second = (base.double() + update.double() for update in updates)
    merged = SLERP(t).merge(stack(base, updates))
    assert relative_error(base + merged.update, reference.slerp(first, second, t, 0.9995)) < 1e-6
    assert (merged.how, merged.update.dtype) == ("slerp", torch.float32)
    if t not in (0, 1):  # weights of the tasks move the point
        moved = SLERP(t).merge(stack(base, updates, (0.5, 2.0))).update
        point = 2 * t / (2 * t + 0.5 * (1 - t))
        assert relative_error(base + moved, reference.slerp(first, second, point, 0.9995)) < 1e-6


@seeds
@SIZES
@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (1.0, 0.0), (-0.5, 2.0)])
def test_nuslerp_is_the_formula(seed, size, weights):
    _, updates = problem_of(seed, size, 2)
    point = weights[1] / sum(weights)
    merged = NuSLERP().merge(stack(None, updates, weights))
    assert relative_error(merged.update, reference.slerp(*updates, point)) < 1e-5
    assert (merged.how, merged.update.dtype) == ("nuslerp", torch.float32)
    by_row, by_column = (NuSLERP(along).merge(stack(None, updates, weights)).update for along in ("rows", "columns"))
    if len(size) == 2:
        rows = [reference.slerp(a, b, point) for a, b in zip(*updates)]
        columns = [reference.slerp(a, b, point) for a, b in zip(*(update.T for update in updates))]
        assert relative_error(by_row, torch.stack(rows)) < 1e-5
        assert relative_error(by_column, torch.stack(columns).T) < 1e-5
    elif len(size) < 2:
        assert relative_error(by_row, merged.update) < 1e-6 and relative_error(by_column, merged.update) < 1e-6


def test_the_point_of_a_right_angle_has_the_lengths_of_the_updates():
    first, second = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert NuSLERP().merge(stack(None, [first, second])).update.norm() == pytest.approx(3)
    for along in ("whole", "rows", "columns"):
        method = NuSLERP(along)
        half = method.merge(stack(None, [first, first * 0])).update  # an update of zero is at a right angle
        assert relative_error(half, 0.5**0.5 * first) < 1e-6
        assert not method.merge(stack(None, [first, -first])).update.any()  # a straight line through 0
        assert torch.equal(method.merge(stack(None, [first, first])).update, first)
        assert not method.merge(stack(None, [first * 0, first * 0])).update.any()


@seeds
@SIZES
@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_karcher_is_the_mean_on_the_sphere(seed, size, tasks):
    base, updates = problem_of(seed, size, tasks, 0.2)
    experts = [base.double() + update.double() for update in updates]
    merged = Karcher(max_iter=200, tol=1e-9).merge(stack(base, updates))
    if len(size):
        assert relative_error(base + merged.update, reference.karcher(experts, [1 / tasks] * tasks)) < 1e-5
        weights = [3.0, *[1.0] * (tasks - 1)]
        shares = [weight / sum(weights) for weight in weights]
        found = Karcher(max_iter=200, tol=1e-9).merge(stack(base, updates, weights)).update
        assert relative_error(base + found, reference.karcher(experts, shares)) < 1e-5
    default = Karcher().merge(stack(base, updates)).update
    assert relative_error(base + default, base + merged.update) < 1e-4 or not len(size)
    assert (merged.how, merged.update.dtype) == ("karcher", torch.float32)


def test_directions_that_have_no_mean_are_merged_all_the_same():
    base = torch.tensor([[3.0, 0.0, 0.0]])
    for updates in ([base * 0, -2 * base], [-base, base], [-base, -base], [base, -base, -2 * base]):
        merged = base + Karcher().merge(stack(base, updates)).update
        lengths = sum(float((base + update).norm()) for update in updates) / len(updates)
        assert merged.isfinite().all() and float(merged.norm()) == pytest.approx(lengths, abs=1e-6)
    assert not (base * 0 + Karcher().merge(stack(base * 0, [base * 0, base * 0])).update).any()


@seeds
@pytest.mark.parametrize("method", [ModelStock(), SLERP(), SLERP(0.9), NuSLERP(), NuSLERP("rows"), Karcher()], ids=str)
def test_one_expert_is_that_expert(seed, method):
    for size in ((5, 7), (6,), ()):
        base, updates = problem_of(seed, size, 1)
        assert relative_error(method.merge(stack(base, updates)).update, updates[0]) < 1e-6


@seeds
@pytest.mark.parametrize("method", [ModelStock(), NuSLERP(), NuSLERP("columns")], ids=str)
def test_the_merge_of_coordinates_is_the_merge_of_updates_in_their_basis(seed, method):
    """So that LoRA adapters are merged into one; of rows, and of weights with their base, this does not hold."""
    assert method.keeps_span and not any(other.keeps_span for other in (NuSLERP("rows"), SLERP(), Karcher()))
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(20, 6, generator=generator).double())
    _, cores = problem_of(seed, (6, 9), 2)
    whole = method.merge(stack(None, [(basis @ core.double()).float() for core in cores], (1.0, 0.5)))
    inside = method.merge(stack(None, cores, (1.0, 0.5)))
    assert whole.update.any() and relative_error(basis @ inside.update.double(), whole.update) < 1e-5
    rows = [
        NuSLERP("rows").merge(stack(None, each)).update
        for each in (cores, [(basis @ c.double()).float() for c in cores])
    ]
    assert relative_error(basis @ rows[0].double(), rows[1]) > 1e-3


def test_what_no_point_lies_between_is_refused():
    base, updates = problem_of(0, (3, 4), 3)
    for method in (SLERP(), NuSLERP()):
        with pytest.raises(
            HfEsmError, match=f"'{method.name}' merges 2 experts, not 3. Leave experts out, or use 'kar"
        ):
            method.merge(stack(base, updates))
        method.check_weights([1.0])
    for method, weights in ((SLERP(), [1.0, -1.0]), (NuSLERP(), [2.0, -2.0]), (Karcher(), [1.0, 1.0, -2.0])):
        with pytest.raises(HfEsmError, match=f"'{method.name}': the weights .* sum to 0.*Change `weights`"):
            method.check_weights(weights)
    with pytest.raises(HfEsmError, match="sum to 0"):
        SLERP(1.0).check_weights([1.0, 0.0])
    SLERP(0.5).check_weights([2.0, -1.0])
