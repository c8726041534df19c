"""The largest eigenpairs of a symmetric matrix, by the library that computes no more than is wanted."""

import torch
from scipy.linalg import eigh as selected_eigh
from torch import Tensor


# Rows from which on it pays to have LAPACK compute the wanted eigenvectors alone, which torch does not offer. Smaller
# matrices are decomposed side by side, which SciPy's lock forbids.
_LARGE = 2048


def largest_eigenpairs(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues, descending, and their vectors as columns, of a symmetric `[n, n]` matrix, of
    which the lower triangle is read.
    """
    size = len(matrix)
    if matrix.device.type == "cpu" and size >= _LARGE and 4 * count <= size:
        found = selected_eigh(matrix.numpy(), subset_by_index=(size - count, size - 1))
        values, vectors = map(torch.from_numpy, found)
    else:
        values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0)[:count], vectors.flip(1)[:, :count]
