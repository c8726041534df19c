"""Factors, essential directions, polar factors and truncated SVDs against the literal float64 formulas."""

import pytest
import torch

from hf_esm import linalg
from hf_esm.linalg import (
    RELATIVE_CUTOFF,
    column_space,
    essential_subspace,
    norm,
    polar_factor,
    right_singular_vectors,
    triangular_factor,
    truncated_svd,
)
from support import reference
from support.problems import ROUTES, random_problem, relative_error, seeds, shapes


@pytest.fixture(autouse=True, params=[(128, 2048), (4, 0)], ids=["small", "large"])
def routes(request, monkeypatch):
    """Symmetric products as a whole, and in blocks of rows as far as the diagonal; all eigenvectors, and some."""
    block, large = request.param
    monkeypatch.setattr("hf_esm.linalg._BLOCK", block)
    monkeypatch.setattr("hf_esm.linalg._LARGE", large)


def with_singular_values(seed: int, rows: int, columns: int, values: list[float]) -> torch.Tensor:
    """A float64 `[rows, columns]` matrix with these singular values, and zeros for the rest."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(size, len(values), dtype=torch.float64, generator=generator) for size in (rows, columns)
    )
    left, right = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


def orthonormal(columns: torch.Tensor) -> bool:
    return torch.allclose(columns.T @ columns, torch.eye(columns.shape[1], dtype=torch.float64), atol=1e-6)


SPECTRA = {
    "full-rank": [5.0, 3.0, 2.5, 1.0, 0.8, 0.5, 0.1],
    "rank-deficient": [4.0, 1.0, 0.2],
    "graded": [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 4e-6],
    "across-the-cutoff": [1.0, 0.5, 3 * RELATIVE_CUTOFF, RELATIVE_CUTOFF / 3, RELATIVE_CUTOFF / 100],
    "large": [3e30, 2e30, 1e30],
    "small": [3e-30, 2e-30, 1e-30],
    "zero": [],
}
matrices = pytest.mark.parametrize(
    ("size", "values"),
    [pytest.param(size, values, id=f"{size[0]}x{size[1]}-{name}")
     for size in [(7, 12), (12, 7), (7, 7)] for name, values in SPECTRA.items()]
    + [pytest.param(size, [2.0], id=f"{size[0]}x{size[1]}") for size in [(1, 1), (1, 9), (9, 1)]],
)  # fmt: skip


def test_the_cutoff_is_the_references():
    assert RELATIVE_CUTOFF == reference.CUTOFF


@seeds
@shapes
def test_triangular_factor_keeps_the_gram_matrix_in_at_most_d_rows(seed, shape):
    _, (x, *_) = random_problem(seed, shape)
    first, second = x.tensor_split(2)
    for factor in (
        triangular_factor(x),
        triangular_factor(torch.cat([triangular_factor(first), triangular_factor(second)])),
    ):
        assert factor.shape[0] <= min(x.shape)
        assert relative_error(factor.double().T @ factor.double(), x.double().T @ x.double()) < 1e-5


@seeds
@shapes
@pytest.mark.parametrize("route", ROUTES)
def test_essential_subspace_is_that_of_the_activations(seed, shape, route):
    deltas, inputs = random_problem(seed, shape)
    rank = shape[1] // shape[3]
    for delta, x in zip(deltas, inputs):
        directions, eigenvalues, coordinates = reference.esd(x, delta, rank)
        found = essential_subspace(route(x).factor, delta, rank)
        assert found.directions.shape == directions.shape
        assert orthonormal(found.directions)
        # The sine of the largest principal angle is the part of the found directions outside the expected ones.
        outside = found.directions - directions @ (directions.T @ found.directions)
        assert torch.linalg.matrix_norm(outside, 2) < 1e-4
        assert relative_error(found.squares / (len(x) - 1), eigenvalues) < 1e-5
        # Each direction belongs to its own eigenvalue.
        shift = x.double() @ delta.double().T
        assert relative_error((shift @ found.directions).square().sum(0), found.squares) < 1e-5
        coordinates_back = found.directions.T @ delta.double()
        assert relative_error(found.directions @ coordinates_back, directions @ coordinates) < 1e-4


@seeds
@pytest.mark.parametrize("shape", [(60, 12, 14, 2), (9, 12, 14, 2), (60, 20, 16, 2), (9, 20, 16, 2), (60, 16, 16, 3)])
@pytest.mark.parametrize("shrinkage", [0.01, 3.0])
def test_essential_subspace_of_shrunk_moments_is_that_of_as_many_more_rows(seed, shape, shrinkage):
    deltas, inputs = random_problem(seed, shape)
    rank = shape[1] // shape[3]
    for delta, x in zip(deltas, inputs):
        more = reference.shrink(x, shrinkage)
        directions, eigenvalues, _ = reference.esd(more, delta, rank)
        for factor in (triangular_factor(x), x):  # few rows and many: they take different ways
            found = essential_subspace(factor, delta, rank, shrinkage)
            assert found.directions.shape == directions.shape
            assert orthonormal(found.directions)
            outside = found.directions - directions @ (directions.T @ found.directions)
            assert torch.linalg.matrix_norm(outside, 2) < 1e-4
            assert relative_error(found.squares / (len(more) - 1), eigenvalues) < 1e-5
            assert found.total == pytest.approx(float((more.double() @ delta.double().T).square().sum()), rel=1e-6)


FALLING = [i**-0.7 for i in range(1, 71)]


@seeds
@pytest.mark.parametrize("size", [(70, 90), (90, 70)])
@pytest.mark.parametrize("tokens", [40, 200])
@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
@pytest.mark.parametrize("applications", [0, 4])
def test_iterated_directions_hold_all_but_the_tolerance(seed, size, tokens, shrinkage, applications, monkeypatch):
    """Of the map as it stands, and where its Gram matrix takes fewer operations than a few applications."""
    monkeypatch.setattr(linalg, "_APPLICATIONS", applications)
    rows, columns = size
    delta = with_singular_values(seed, rows, columns, FALLING).float()
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    exact = essential_subspace(x, delta, 6, shrinkage)
    held = []
    for tolerance in (0.1, 1e-3, 1e-6):
        found = essential_subspace(x, delta, 6, shrinkage, tolerance)
        directions = found.directions.double()
        assert found.directions.dtype == torch.float32 and orthonormal(directions)
        assert found.total == pytest.approx(exact.total, rel=0.5)  # an estimate
        squares = (reference.shrink(x, shrinkage) @ delta.double().T @ directions).square().sum()
        assert squares * (1 - 5 * tolerance - 1e-4) < found.squares.sum() < squares * (1 + 1e-5)
        held.append(float(squares / exact.squares.sum()))
        assert 1 - 2 * tolerance - 1e-5 < held[-1] < 1 + 1e-5
        assert torch.equal(found.directions, essential_subspace(x, delta, 6, shrinkage, tolerance).directions)
    assert held[0] < 1 - 1e-6 and held[2] > 1 - 1e-4
    outside = directions - exact.directions @ (exact.directions.T @ directions)
    assert torch.linalg.matrix_norm(outside, 2) < 0.1


@seeds
def test_the_energy_of_a_tolerant_subspace_is_of_an_unbiased_estimate(seed):
    draw, ratios = torch.Generator().manual_seed(seed), []
    for _ in range(300):
        delta, x = torch.randn(60, 60, generator=draw), torch.randn(80, 60, generator=draw)
        found = essential_subspace(x, delta, 3, tolerance=0.1)
        ratios.append(found.total / essential_subspace(x, delta, 3).total)
        assert 0 < found.energy_kept < 1
    ratios = torch.tensor(ratios)
    assert abs(ratios.mean() - 1) < 0.02  # the squares are those of the step before, and a little low
    assert 0.001 < ratios.std() < 0.1
    exact = torch.randn(60, 4, generator=draw) @ torch.randn(4, 60, generator=draw)
    found = essential_subspace(x, exact, 6, tolerance=0.1)  # all that there is: nothing is left to estimate
    assert found.total == pytest.approx(float((x @ exact.T).square().sum()), rel=1e-4)
    assert found.energy_kept == pytest.approx(1, abs=1e-4)


@seeds
@pytest.mark.parametrize("size", [(70, 90), (90, 70)])
def test_iterated_triplets_are_a_near_best_approximation(seed, size):
    matrix, best = with_singular_values(seed, *size, FALLING).float(), sum(value**2 for value in FALLING[6:])
    for tolerance in (0.1, 1e-3, 1e-6):
        u, s, vh = truncated_svd(matrix, 6, tolerance)
        assert orthonormal(u.double()) and orthonormal(vh.T.double())
        assert torch.all(s[:-1] >= s[1:]) and relative_error(u.T @ matrix @ vh.T, torch.diag(s)) < 1e-5
        left_over = (matrix - (u * s) @ vh).square().sum()
        assert best - 1e-6 < left_over < best + 10 * tolerance * s.square().sum() + 1e-6
    assert left_over < best * (1 + 1e-3)


def test_iterated_directions_are_no_more_than_there_are():
    """Rounding noise in float32 is no direction."""
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.randn(10, 96, generator=generator), torch.randn(128, 96, generator=generator)
    for tolerance in (0.0, 1e-3):
        assert essential_subspace(x, delta, 20, tolerance=tolerance).directions.shape == (128, 10)


def test_iterating_ends_where_there_is_nothing_or_little_and_is_left_where_much_is_wanted():
    x, delta = torch.randn(50, 40), torch.zeros(30, 40)
    assert essential_subspace(x, delta, 5, tolerance=1e-3).directions.shape == (30, 0)
    assert truncated_svd(delta, 5, tolerance=1e-3)[0].shape == (30, 0)
    delta = torch.randn(30, 2) @ torch.randn(2, 40)
    found = essential_subspace(x, delta, 5, tolerance=1e-3)
    assert found.directions.shape == (30, 2) and found.energy_kept == pytest.approx(1)
    delta = torch.randn(30, 40)
    for rank, same in ((8, True), (7, False)):
        exact, found = truncated_svd(delta, rank), truncated_svd(delta, rank, tolerance=1e-3)
        assert torch.equal(exact[1], found[1]) == same


@seeds
@shapes
def test_truncation_costs_exactly_the_discarded_squares(seed, shape):
    deltas, inputs = random_problem(seed, shape)
    for delta, x in zip(deltas, inputs):
        shift = x.double() @ delta.double().T
        squares = torch.linalg.svdvals(shift).square()
        for rank in (1, len(squares) // 2, len(squares), len(squares) + 5):
            found = essential_subspace(x, delta, rank)
            lost = (shift - shift @ found.directions @ found.directions.T).square().sum()
            assert torch.isclose(lost, squares[rank:].sum(), rtol=1e-6, atol=1e-12 * float(squares.sum()))
            assert found.total == pytest.approx(float(squares.sum()), rel=1e-6)
            assert found.energy_kept == pytest.approx(float(squares[:rank].sum() / squares.sum()), rel=1e-6)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize(("input_scale", "update_scale"), [(0.0, 1.0), (1.0, 0.0)], ids=["zero-inputs", "zero-update"])
def test_a_shift_of_zero_has_no_direction_and_loses_nothing(tokens, input_scale, update_scale):
    found = essential_subspace(torch.full((tokens, 6), input_scale), torch.full((9, 6), update_scale), 4)
    assert (found.directions.shape, found.squares.shape, found.total) == ((9, 0), (0,), 0)
    assert found.energy_kept == 1


def test_no_tokens_at_all_are_a_shift_of_zero():
    """A map that ran on nothing, as an expert layer that no token was routed to."""
    found = essential_subspace(torch.zeros(0, 6), torch.ones(9, 6), 4)
    assert (found.directions.shape, found.energy_kept) == ((9, 0), 1)


@seeds
@pytest.mark.parametrize(("tokens", "d_out"), [(5, 12), (30, 12)])
def test_directions_below_the_numerical_rank_are_left_out(seed, tokens, d_out):
    delta = with_singular_values(seed, d_out, 15, [1.0, 0.3, 1e-9])
    x = torch.randn(tokens, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert essential_subspace(x, delta, 4).directions.shape == (d_out, 2)


@seeds
@matrices
def test_polar_factor_is_the_svds_on_the_numerical_range(seed, size, values):
    matrix = with_singular_values(seed, *size, values)
    factor, mean = polar_factor(matrix)
    expected, expected_mean = reference.polar(matrix)
    assert relative_error(factor, expected) < 1e-4
    assert relative_error(mean, expected_mean) < 1e-6
    assert float(mean) == pytest.approx(sum(values) / min(size), rel=1e-6)
    assert relative_error(factor @ factor.T @ factor, factor) < 1e-4
    assert relative_error(polar_factor(matrix.T)[0], expected.T) < 1e-4


@seeds
@pytest.mark.parametrize("smallest", [0.1, 1e-3, 0.0])
def test_a_polar_factor_in_float32_is_nearly_the_same_however_steep_the_matrix(seed, smallest):
    matrix = with_singular_values(seed, 30, 5, [1.0, 0.8, 0.5, 0.3, smallest])
    (factor, mean), (exact, exact_mean) = polar_factor(matrix, tolerance=1e-3), polar_factor(matrix)
    assert factor.dtype == mean.dtype == torch.float32 and exact.dtype == torch.float64
    assert relative_error(factor, exact) < (1e-3 if smallest == 0.1 else 1e-6)
    assert relative_error(mean, exact_mean) < 1e-6


@seeds
@matrices
@pytest.mark.parametrize("rank", [1, 3, 50])
def test_truncated_svd_is_the_best_approximation_of_its_rank(seed, size, values, rank):
    matrix = with_singular_values(seed, *size, values)
    u, s, vh = truncated_svd(matrix, rank)
    expected_u, expected_s, expected_vh = reference.svd(matrix)
    kept = min(rank, reference.numerical_rank(expected_s))
    assert (u.shape, s.shape, vh.shape) == ((size[0], kept), (kept,), (kept, size[1]))
    assert relative_error(s, expected_s[:kept]) < 1e-6
    # Directions near the cutoff are known to fewer digits.
    assert relative_error(u * s @ vh, expected_u[:, :kept] * expected_s[:kept] @ expected_vh[:kept]) < 1e-6
    assert relative_error(u @ vh, expected_u[:, :kept] @ expected_vh[:kept]) < 1e-4
    assert torch.allclose(u.T @ u, torch.eye(kept, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(vh @ vh.T, torch.eye(kept, dtype=torch.float64), atol=1e-4)


@seeds
@pytest.mark.parametrize("size", [(90, 120), (120, 90)])
@pytest.mark.parametrize("values", [[3.0, 1.0, 0.2], [1.0, 1e-2, 1e-3], [1.0]], ids=["plain", "steep", "one"])
@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
def test_updates_of_low_rank_are_decomposed_in_their_column_space(seed, size, values, shrinkage, monkeypatch):
    """Stored in float32, as the product of an adapter's factors is."""
    monkeypatch.setattr("hf_esm.linalg._NARROWEST", 2)
    update = with_singular_values(seed, *size, values).float()
    inputs = torch.randn(70, size[1], generator=torch.Generator().manual_seed(seed))
    basis = column_space(update)
    assert basis.shape == (size[0], len(values)) and orthonormal(basis)
    ours = essential_subspace(inputs, update, 9, shrinkage), truncated_svd(update, 9), polar_factor(update)
    monkeypatch.setattr("hf_esm.linalg._NARROWEST", 10**6)
    assert column_space(update) is None
    whole = essential_subspace(inputs, update, 9, shrinkage), truncated_svd(update, 9), polar_factor(update)
    (ours, triplets, (polar, mean)), (whole, expected, (polar_expected, mean_expected)) = ours, whole
    assert ours.directions.shape == whole.directions.shape == (size[0], len(values))
    assert relative_error(ours.directions @ ours.directions.T, whole.directions @ whole.directions.T) < 1e-4
    assert relative_error(ours.squares, whole.squares) < 1e-5
    assert ours.total == pytest.approx(whole.total, rel=1e-6)
    assert all(len(found[1]) == len(values) for found in (triplets, expected))
    assert relative_error(triplets[0] * triplets[1] @ triplets[2], update) < 1e-6
    assert relative_error(triplets[1], torch.tensor(values)) < 1e-6
    assert relative_error(polar, polar_expected) < 1e-4
    assert relative_error(polar, reference.polar(update)[0]) < 1e-4
    assert float(mean) == pytest.approx(float(mean_expected), rel=1e-6)


@seeds
def test_a_column_space_is_only_what_holds_all(seed, monkeypatch):
    monkeypatch.setattr("hf_esm.linalg._NARROWEST", 2)
    for values in ([1.0] * 12, [1.0, 0.5, 3 * RELATIVE_CUTOFF], []):  # too wide, across the cutoff, nothing
        assert column_space(with_singular_values(seed, 90, 100, values)) is None
    assert column_space(torch.randn(90, 100, generator=torch.Generator().manual_seed(seed))) is None
    little = with_singular_values(seed, 90, 100, [1.0, 0.5, 1e-3])
    assert column_space(little).shape == (90, 3)
    assert column_space(little, tolerance=0.001).shape == (90, 2)
    assert column_space(little, tolerance=0.001).dtype == torch.float32
    assert column_space(little[:, :15]) is None  # not worth looking


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_decomposition_works_in_float64(dtype):
    """Eigenvalues of a float32 Gram matrix would be noise from 1e-4 of the largest singular value on."""
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = matrix.double()
    assert torch.equal(polar_factor(matrix)[0], polar_factor(exact)[0])
    assert torch.equal(truncated_svd(matrix, 3)[1], truncated_svd(exact, 3)[1])
    assert torch.equal(essential_subspace(matrix, matrix, 3).squares, essential_subspace(exact, exact, 3).squares)


@seeds
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (4, 3, 2), (0, 4), (2, 100_000), (3, 1_500_001)])
def test_norms_are_frobenius_norms(seed, shape):
    for scale in (1e-25, 1.0, 1e25):
        tensor = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        assert norm(tensor).dtype == torch.float64
        error = 1e-9 if tensor.numel() < 2**20 else 1e-8
        assert float(norm(tensor)) == pytest.approx(float(tensor.double().square().sum().sqrt()), rel=error, abs=0)


@seeds
@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (1, 5)])
def test_right_singular_vectors_are_found_where_lapacks_default_does_not_converge(seed, shape, monkeypatch):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected, _ = right_singular_vectors(matrix)

    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    values, rows = right_singular_vectors(matrix)
    assert torch.allclose(values, expected) and values.shape == (min(shape),)
    assert torch.allclose(rows.T * values.square() @ rows, matrix.T @ matrix)
    assert orthonormal(rows.T)
