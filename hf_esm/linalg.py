"""Linear algebra on plain tensors: streamed factors, essential directions, polar factors, truncated SVDs.

Decompositions are computed in float64, whatever the dtype of the input: eigenvalues enter the methods with small
exponents (`λ^0.15`), and a polar factor gives its weakest direction the weight of its strongest, so that rounding
noise would become signal. Each decomposition solves the eigenproblem of the smaller side, or of the column space if
that is far smaller: the update of a LoRA expert costs what its rank does. With a tolerance, results are computed in
float32, and leading directions by randomised iteration.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Optional

import torch
from scipy.linalg import eigh as selected_eigh
from scipy.linalg import svd as iterated_svd
from torch import Tensor


# Rows from which on LAPACK computes the wanted eigenvectors alone, which torch does not offer. Smaller matrices are
# decomposed in parallel, which SciPy's lock forbids.
_LARGE = 2048


# Singular values below this fraction of the largest one count as zero: float32 inputs carry no information there.
RELATIVE_CUTOFF = 1e-6


# The cutoff of squared singular values, and of eigenvalues, that were computed in float32.
_SINGLE_CUTOFF = 1e-5


# Smallest share of its largest eigenvalue above which a Gram matrix in float32 has a root to three digits.
_WELL_CONDITIONED = 1e-4


# Least number of applications of a map until its leading directions are found.
_APPLICATIONS = 4


# Random vectors that estimate the energy of a map outside of its leading directions, to a few percent or better.
_PROBES = 32


# Dimensions of a column space that is searched: it pays for matrices that take long, and costs little.
_NARROWEST, _WIDEST = 64, 256


# Rows of a symmetric product that are computed at a time, as far as its diagonal.
_BLOCK = 128


def triangular_factor(rows: Tensor) -> Tensor:
    """Return `R`, of at most `d` rows, with `RᵀR = rowsᵀ rows`: the triangular factor of a QR of `rows` `[n, d]`.

    Nothing is squared, so no precision is lost. If `rows` has at most `d` rows, it is returned as it is. The factor of
    several blocks of rows is the factor of their stacked factors.
    """
    if rows.shape[0] <= rows.shape[1]:
        return rows
    return torch.linalg.qr(rows, mode="r").R


@dataclass
class EssentialSubspace:
    """The leading principal directions of an output shift `ΔO = X Δᵀ`.

    Attributes:
        directions: `[d_out, k]` float64, orthonormal columns, strongest first; float32 with a tolerance.
        squares: `[k]` of the same dtype, the squared singular values of `ΔO` along the directions; with a tolerance,
            lower bounds of them.
        total: the sum of all squared singular values, the discarded ones included; with a tolerance, an estimate.
    """

    directions: Tensor
    squares: Tensor
    total: float

    @property
    def energy_kept(self) -> float:
        """Share of the output shift's energy that the kept directions carry, in [0, 1]; 1 for a shift of zero."""
        return float(self.squares.sum() / self.total) if self.total > 0 else 1.0


def essential_subspace(
    factor: Tensor, update: Tensor, rank: int, shrinkage: float = 0.0, tolerance: float = 0.0
) -> EssentialSubspace:
    """Decompose one weight's update in its essential subspace (ESD, arXiv 2602.20208).

    The cheapest of several equal ways is taken: by the output shift or by the inputs' second moments, on the side of
    the outputs or of the inputs, exactly or by randomised iteration.

    Args:
        factor: `[m, d_in]`, any matrix with the Gram matrix of the layer's inputs (see `triangular_factor`).
        update: `[d_out, d_in]`, the update of the weight.
        rank: directions to keep; fewer are returned if the numerical rank of the output shift is lower.
        shrinkage: draws the Gram matrix `G` of the inputs towards the identity, `G + shrinkage · mean(diag G) · I`:
            from the directions of the output shift (0) to the singular vectors of the update itself (large).
        tolerance: above 0, if few of many directions are wanted, they are found by randomised iteration, in float32;
            see `_iterated_directions`.
    """
    if (basis := column_space(update, tolerance)) is not None:
        inside = essential_subspace(factor, basis.T @ update.to(basis.dtype), rank, shrinkage)
        directions, squares = inside.directions.to(basis.dtype), inside.squares.to(basis.dtype)
        return EssentialSubspace(basis @ directions, squares, inside.total)
    few = tolerance > 0 and _few(rank, update)
    dtype = working_dtype(tolerance) if few else torch.float64
    factor, update = factor.to(dtype), update.to(dtype)
    ridge = shrinkage * norm(factor).square() / factor.shape[1]
    (rows, columns), tokens = update.shape, factor.shape[0]
    tall = rows > columns
    # Multiplications on the ways to a Gram matrix, by the output shift or by the inputs' second moments, without those
    # that both take; and on the whole way.
    by_shift, by_moments = tokens * rows * (columns + rows / 2), columns**2 * (tokens / 2 + rows)
    if tall:
        whole_way = columns**2 * (tokens + rows + 3 * columns) / 2
    else:
        whole_way = min(by_shift, by_moments) + rows**2 * columns / 2
    if few and (not ridge or whole_way > _APPLICATIONS * 2 * _drawn(rank) * columns * (rows + tokens)):

        def apply(x: Tensor) -> Tensor:
            back = update.T @ x
            return update @ (factor.T @ (factor @ back) + ridge * back)

        return EssentialSubspace(*_iterated_directions(apply, update, rank, tolerance))
    if ridge > 0 and (tall or by_shift > by_moments):
        return _subspace_by_moments(factor, update, rank, ridge, tolerance)
    return _subspace_by_shift(factor, update, rank, ridge, tolerance)


def _subspace_by_moments(
    factor: Tensor, update: Tensor, rank: int, ridge: Tensor, tolerance: float
) -> EssentialSubspace:
    """By the inputs' second moments, plus `ridge` on their diagonal; a tall update on the side of the inputs."""
    moments = _symmetric(factor.T, factor)
    moments.diagonal().add_(ridge)
    if update.shape[0] <= update.shape[1]:
        gram = _symmetric(update @ _mirrored(moments), update.T)
        squares, directions = _leading_eigenpairs(gram, rank, tolerance)
        return EssentialSubspace(directions, squares, float(gram.trace()))
    root = torch.linalg.cholesky(moments)
    gram = _symmetric(root.T, _mirrored(_symmetric(update.T, update)) @ root)
    squares, vectors = _leading_eigenpairs(gram, rank, tolerance)
    directions = torch.linalg.qr(update @ (root @ vectors)).Q
    return EssentialSubspace(directions, squares, float(gram.trace()))


def _subspace_by_shift(
    factor: Tensor, update: Tensor, rank: int, ridge: Tensor, tolerance: float
) -> EssentialSubspace:
    """By the output shift, plus `ridge` times the update's Gram matrix."""
    tall = update.shape[0] > update.shape[1]
    shift = (triangular_factor(factor) if tall else factor) @ update.T
    wide = shift.shape[0] < shift.shape[1] and ridge == 0
    gram = _symmetric(shift, shift.T) if wide else _symmetric(shift.T, shift)
    if ridge > 0:
        gram += ridge * _symmetric(update, update.T)
    squares, vectors = _leading_eigenpairs(gram, rank, tolerance)
    directions = (shift.T @ vectors) / squares.sqrt() if wide else vectors
    return EssentialSubspace(directions, squares, float(gram.trace()))


def polar_factor(matrix: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return `U Vᵀ` of the SVD `U S Vᵀ` of `matrix` `[p, q]` on its numerical range, and the mean singular value.

    Directions whose singular value is numerically zero are left out of the factor (an SVD would fill them with
    arbitrary directions), while the mean runs over all `min(p, q)` values, zeros included. Both are float64; with a
    `tolerance` they are float32, and computed in float32 if no singular value is below a hundredth of the largest.
    """
    if tolerance == 0 and (basis := column_space(matrix)) is not None:
        inside, mean = polar_factor(basis.T @ matrix.double())
        return basis @ inside, mean * basis.shape[1] / min(matrix.shape)
    wide, dtype = matrix.shape[0] <= matrix.shape[1], working_dtype(tolerance)
    for tried in (dtype, torch.float64):
        held = matrix.to(tried)
        squares, vectors = torch.linalg.eigh(_symmetric(held, held.T) if wide else _symmetric(held.T, held))
        if squares[0] > _WELL_CONDITIONED * squares[-1] or tried == torch.float64:
            break
    mean = squares.clamp_min(0).sqrt().mean()
    nonzero = significant(squares)
    vectors = vectors[:, nonzero]
    root = (vectors / squares[nonzero].sqrt()) @ vectors.T
    return (root @ held if wide else held @ root).to(dtype), mean.to(dtype)


def truncated_svd(matrix: Tensor, rank: int, tolerance: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading `rank` singular triplets `U [p, k], S [k], Vh [k, q]` of `matrix`, in float64.

    `k` is smaller than `rank` if the numerical rank is. With a `tolerance`, if few of many triplets are wanted, they
    are those of `matrix` on directions that are found by randomised iteration, in float32; see `_iterated_directions`.
    """
    if (basis := column_space(matrix, tolerance)) is not None:
        left, values, right = (part.to(basis.dtype) for part in truncated_svd(basis.T @ matrix.to(basis.dtype), rank))
        return basis @ left, values, right
    if tolerance > 0 and _few(rank, matrix):
        if matrix.shape[0] > matrix.shape[1]:
            right, values, left = truncated_svd(matrix.T, rank, tolerance)
            return left.T, values, right.T
        held = matrix.float()
        left = _iterated_directions(lambda x: held @ (held.T @ x), held, rank, tolerance)[0]
        turn, values, right = (part.float() for part in truncated_svd(left.T @ held, rank))
        return left @ turn, values, right
    matrix = matrix.double()
    if matrix.shape[0] <= matrix.shape[1]:
        squares, left = _leading_eigenpairs(_symmetric(matrix, matrix.T), rank)
        values = squares.sqrt()
        return left, values, (left.T @ matrix) / values[:, None]
    squares, right = _leading_eigenpairs(_symmetric(matrix.T, matrix), rank)
    values = squares.sqrt()
    return (matrix @ right) / values, values, right.T


def right_singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return all singular values `[k]` of a matrix `[p, q]`, descending, and its right singular vectors `[k, q]`.

    `k` is the smaller side: unlike `truncated_svd`, nothing that is numerically zero is dropped.
    """
    try:
        _, values, rows = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # LAPACK's default does not converge on some matrices; QR iteration takes longer
        _, values, rows = iterated_svd(matrix.cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
        values, rows = (torch.from_numpy(part).to(matrix.device) for part in (values, rows))
    return values, rows


def column_space(matrix: Tensor, tolerance: float = 0.0) -> Optional[Tensor]:
    """Return an orthonormal basis `[p, k]` of the column space of `matrix` `[p, q]`, or None if it is not small.

    The basis is float64; with a `tolerance`, float32, and all but less than that share of the matrix's energy lies in
    it. `k` is at most an eighth of the smaller side. The basis is made of the leading directions of random mixtures of
    the columns (arXiv 0909.4061).
    """
    most = min(min(matrix.shape) // 8, _WIDEST)
    if most < _NARROWEST:
        return None
    matrix, cutoff = matrix.to(working_dtype(tolerance)), max(0.1 * tolerance**0.5, RELATIVE_CUTOFF)
    mixtures = torch.randn(matrix.shape[1], most + 8, generator=torch.Generator().manual_seed(0))
    mixed, triangle = torch.linalg.qr(matrix @ mixtures.to(matrix))
    squares, turn = torch.linalg.eigh(triangle @ triangle.T)
    strong = squares > squares[-1] * (10 * cutoff) ** 2
    if not 0 < strong.sum() <= most:
        return None
    # A step of iteration, against noise in the mixtures.
    rows = torch.linalg.qr(matrix.T @ (mixed @ turn[:, strong])).Q
    basis = torch.linalg.qr(matrix @ rows).Q
    return basis if norm(matrix - basis @ (basis.T @ matrix)) <= cutoff * norm(matrix) else None


def _symmetric(left: Tensor, right: Tensor) -> Tensor:
    """Return the lower triangle of a symmetric product, all that an eigenproblem reads; the rest is undefined."""
    size = left.shape[0]
    product = left.new_zeros(size, size)
    for start in range(0, size, _BLOCK):
        end = start + _BLOCK
        torch.mm(left[start:end], right[:, :end], out=product[start:end, :end])
    return product


def _mirrored(lower: Tensor) -> Tensor:
    """Return a symmetric matrix from its lower triangle."""
    return lower.tril() + lower.tril(-1).T


def _leading_eigenpairs(gram: Tensor, rank: int, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the `rank` largest eigenvalues of a Gram matrix (its lower triangle), descending, and their vectors.

    Numerically zero eigenvalues are dropped. With a `tolerance`, few of many are found by randomised iteration.
    """
    if tolerance > 0 and _few(rank, gram):
        vectors, values, _ = _iterated_directions(_mirrored(gram).matmul, gram, rank, tolerance)
        return values, vectors
    values, vectors = largest_eigenpairs(gram, rank)
    nonzero = significant(values)
    return values[nonzero], vectors[:, nonzero]


def working_dtype(tolerance: float) -> torch.dtype:
    """Return the dtype of decompositions: float64, or float32 with a tolerance."""
    return torch.float32 if tolerance > 0 else torch.float64


def norm(tensor: Tensor) -> Tensor:
    """Return the Frobenius norm, float64; of large float32 tensors to 1e-8."""
    flat = tensor.reshape(-1)
    if flat.dtype == torch.float32 and len(flat) >= 2**20:
        rows = len(flat) // 1024  # in float32, which is many times faster, short rows are summed without loss
        parts = torch.linalg.vector_norm(flat[: 1024 * rows].view(rows, 1024), dim=1), flat[1024 * rows :]
        whole = torch.cat(parts).double().norm()
        if 1e-10 < whole < 1e18:  # float32 holds the squares
            return whole
    return torch.stack([torch.linalg.vector_norm(piece, dtype=torch.float64) for (piece,) in pieces(flat)]).norm()


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors of one number of entries alike, into flat pieces that a processor's cache holds.

    Steps on pieces make no copy of a whole tensor, as every conversion of a dtype does. A piece of a contiguous tensor
    is a view, which can be written to.
    """
    return zip(*(tensor.reshape(-1).split(2**17) for tensor in tensors), strict=True)


@torch.no_grad()
def piecewise(function: Callable[..., Tensor], *tensors: Tensor, out: Optional[Tensor] = None) -> Tensor:
    """Return what a function of entries makes of tensors of one shape, float32, computed piece by piece.

    Args:
        function: of flat pieces of the tensors, called from the first piece to the last.
        out: a tensor of that shape, which is filled and returned instead of a new one if it is contiguous.
    """
    if out is None or not out.is_contiguous():  # of another tensor, pieces are copies
        out = torch.empty(tensors[0].shape, dtype=torch.float32, device=tensors[0].device)
    for entries, *parts in pieces(out, *tensors):
        entries.copy_(function(*parts))
    return out


def _few(rank: int, matrix: Tensor) -> bool:
    """Whether iterating for `rank` directions takes less than decomposing."""
    return 4 * rank <= min(matrix.shape)


def _drawn(rank: int) -> int:
    """Return the number of random columns to iterate with for `rank` directions."""
    return rank + max(rank // 8, 16)


def _iterated_directions(
    apply: Callable[[Tensor], Tensor], matrix: Tensor, rank: int, tolerance: float
) -> tuple[Tensor, Tensor, float]:
    """Return the leading eigenvectors and eigenvalues of a map, descending, float32, and the sum of all eigenvalues.

    Randomised subspace iteration (arXiv 0909.4061). It ends with the step that adds about `tolerance` (at least 1e-5)
    of the directions' energy, or less: half of that shows in the singular values of the map's image, so that no
    product is spent on finding out. The eigenvalues are those of the step before. The start is the same each time, on
    every device. Nearly all of the leading energy is found; among many directions of nearly equal strength, which ones
    are returned is not determined. The sum of the other eigenvalues is estimated from random probes (arXiv
    2010.09649).

    Args:
        apply: the map, positive semidefinite, from `[d_out, k]` to `[d_out, k]`.
        matrix: `[d_out, d_in]`, float32; gives the size, the dtype and the device of the start.
        rank: number of eigenvectors.
    """
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[0], _drawn(rank), generator=draw)
    following = torch.linalg.qr(apply(start.to(matrix))).Q
    while True:
        image = apply(following)
        values, turn = torch.linalg.eigh(following.T @ image)
        following, triangle = torch.linalg.qr(image)
        held = values[-rank:].sum()
        if not 2 * (torch.linalg.svdvals(triangle)[:rank].sum() - held) > max(tolerance, _SINGLE_CUTOFF) * held:
            break
    values, turn = values.flip(0)[:rank], turn.flip(1)[:, :rank]
    nonzero = significant(values)
    values, directions = values[nonzero], torch.linalg.qr(image @ turn[:, nonzero]).Q
    probes = torch.randn(matrix.shape[0], _PROBES, generator=draw).to(matrix)
    probes -= directions @ (directions.T @ probes)
    return directions, values, float(values.sum() + (probes * apply(probes)).sum() / _PROBES)


def significant(squares: Tensor) -> Tensor:
    """Return which squared singular values, or eigenvalues of a Gram matrix, are not numerically zero."""
    if not len(squares):
        return squares > 0
    cutoff = _SINGLE_CUTOFF if squares.dtype == torch.float32 else RELATIVE_CUTOFF**2
    return squares > squares.max().clamp_min(0) * cutoff


def largest_eigenpairs(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest eigenvalues of a symmetric `[n, n]` matrix, descending, and their vectors as columns.

    Only the lower triangle is read.
    """
    size = len(matrix)
    if matrix.device.type == "cpu" and size >= _LARGE and 4 * count <= size:
        pairs = selected_eigh(matrix.numpy(), subset_by_index=(size - count, size - 1))
        values, vectors = map(torch.from_numpy, pairs)
    else:
        values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0)[:count], vectors.flip(1)[:, :count]
