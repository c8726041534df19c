"""Routers in closed form, which find the task of a sample from the pooled inputs of a few modules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg import right_singular_vectors


SHRINKAGES = (0.03, 0.1, 0.3, 0.6, 0.9)


TEMPERATURES = tuple(2 ** (step / 2) for step in range(-2, 15))  # 0.5 to 128


FOLDS = 8


MAX_DIRECTIONS = 256


@dataclass
class Discriminant:
    """Normal distributions of one covariance around the tasks' means, along `K` directions of `D` features.

    Attributes:
        directions: `[K, D]` float64, orthonormal rows: the directions that separate the tasks, and those of the
            largest variance.
        center: `[D]`, mean of the tasks' mean features.
        classes: `[T, K]`, the tasks' means along the directions, relative to the center.
        precision: `[K + 1]`, inverse variance along each direction, and across all directions.
        temperature: temperature of the probabilities, chosen on held-out samples.
        threshold: distance within which 95 % of the held-out samples are.
        shrinkage: share of a multiple of the identity in the covariance, chosen on held-out samples.
        accuracy: share of held-out samples whose nearest task is their own.
    """

    directions: Tensor
    center: Tensor
    classes: Tensor
    precision: Tensor
    temperature: float = 1.0
    threshold: float = float("inf")
    shrinkage: float = 0.0
    accuracy: float = float("nan")

    def distances(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Squared Mahalanobis distances of features `[N, D]`: `[N, T]` to each task along the directions, and `[N]`
        across the directions.
        """
        centered = features.double() - self.center
        along = centered @ self.directions.T
        across = (centered.square().sum(-1) - along.square().sum(-1)).clamp_min(0) * self.precision[-1]
        return (along[:, None] - self.classes).square() @ self.precision[:-1], across

    def length(self, difference: Tensor) -> float:
        """Mahalanobis length of a difference of features `[D]`."""
        along = self.directions @ difference.double()
        across = (difference.double().square().sum() - along.square().sum()).clamp_min(0)
        return float((along.square() @ self.precision[:-1] + across * self.precision[-1]).sqrt())


def fit_discriminant(features: Mapping[str, Tensor], max_directions: int = MAX_DIRECTIONS) -> Discriminant:
    """Fit a router to the features of each task, `[N_t, D]`, or `[N_t, P, D]` of `P` beginnings of each sample.

    All beginnings of a sample are held out together, and count as samples. Where a task has features of whole samples
    alone, such as those from a file of hf_esm 0.1, so do all others: the last of the beginnings is the whole sample.
    Shrinkage, temperature and threshold are chosen by cross-validation: shrinkage and temperature by the
    log-likelihood of the held-out samples' tasks, the threshold so that one held-out sample in twenty is farther.

    Args:
        features: by task.
        max_directions: maximal number `K` of directions, unless there are more tasks.
    """
    samples = _by_sample(features)
    x = torch.cat([rows.flatten(0, 1).double() for rows in samples])
    y = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor([rows[..., 0].numel() for rows in samples]))
    fold = torch.cat([(torch.arange(len(rows)) % FOLDS).repeat_interleave(rows.shape[1]) for rows in samples])
    if min(map(len, samples)) < FOLDS:  # too few samples to hold any out
        return fit_at_shrinkage(x, y, 0.6, max_directions)
    near, far = torch.zeros(len(x), len(samples), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    held_out = {shrinkage: (near.clone(), far.clone()) for shrinkage in SHRINKAGES}
    for k in range(FOLDS):
        out = fold == k
        scatter = _decompose(x[~out], y[~out])
        for shrinkage, (near, far) in held_out.items():
            near[out], far[out] = _shrink(scatter, shrinkage, max_directions).distances(x[out])
    true_task = torch.arange(len(x)), y
    _, shrinkage, temperature = max(
        (float(torch.log_softmax(near / (-2 * t), dim=-1)[true_task].mean()), s, t)
        for s, (near, _) in held_out.items()
        for t in TEMPERATURES
    )
    near, far = held_out[shrinkage]
    router = fit_at_shrinkage(x, y, shrinkage, max_directions)
    router.temperature, router.threshold = temperature, float((near.min(-1).values + far).quantile(0.95))
    router.accuracy = float((near.argmin(-1) == y).double().mean())
    return router


def _by_sample(features: Mapping[str, Tensor]) -> list[Tensor]:
    """The features of each task as `[N_t, P, D]`."""
    whole = any(rows.dim() == 2 for rows in features.values())
    return [rows[:, None] if rows.dim() == 2 else rows[:, -1:] if whole else rows for rows in features.values()]


def fit_at_shrinkage(x: Tensor, y: Tensor, shrinkage: float, max_directions: int) -> Discriminant:
    """Fit a router to features `x [N, D]` of tasks `y [N]`, without cross-validation."""
    return _shrink(_decompose(x, y), shrinkage, max_directions)


class _Scatter(NamedTuple):
    """Features of samples around the means of their tasks.

    Attributes:
        means: `[T, D]`.
        variances: along `rows`, the largest first.
        rows: `[R, D]`, orthonormal: the directions in which samples of one task vary.
    """

    means: Tensor
    variances: Tensor
    rows: Tensor


def _decompose(x: Tensor, y: Tensor) -> _Scatter:
    """Decompose the scatter of features `x [N, D]` by eigenvectors of `[N, N]` or `[D, D]`, whichever is smaller."""
    count = int(y.max()) + 1
    means = torch.stack([x[y == t].mean(0) for t in range(count)])
    centered = x - means[y]
    few = len(x) < x.shape[1]
    squares, vectors = torch.linalg.eigh(centered @ centered.T if few else centered.T @ centered)
    squares, vectors = squares.flip(0), vectors.flip(1)
    kept = squares > 1e-14 * squares[0].clamp_min(0)
    squares, vectors = squares[kept], vectors[:, kept]
    rows = (vectors.T @ centered) / squares.sqrt()[:, None] if few else vectors.T
    return _Scatter(means, squares / max(len(x) - count, 1), rows)


def _shrink(scatter: _Scatter, shrinkage: float, max_directions: int) -> Discriminant:
    """Fit a router to decomposed features."""
    means, variances, rows = scatter
    center = means.mean(0)
    floor = shrinkage * variances.sum() / means.shape[1]
    variances, apart = (1 - shrinkage) * variances, means - center
    # Where samples do not vary, the variance is the least with which float32 can separate the tasks.
    floor = torch.maximum(floor, 1e-6 * apart.square().mean()).clamp_min(torch.finfo(torch.float32).tiny)
    # Along Σ⁻¹ of the means, distances order the tasks as they do along all directions. The rest of the directions are
    # from those of the largest variance.
    along = apart @ rows.T
    solved = (apart - along @ rows) / floor + (along / (variances + floor)) @ rows
    directions = _span(solved / solved.norm(dim=1, keepdim=True).clamp_min(1e-300))
    widest = rows[: max(max_directions - len(directions), 0)]
    directions = torch.cat([directions, _span(widest - (widest @ directions.T) @ directions)])
    covariance = directions @ rows.T
    covariance = (covariance * variances) @ covariance.T
    spread, turn = torch.linalg.eigh(covariance)
    directions = turn.T @ directions
    precision = torch.cat([1 / (spread.clamp_min(0) + floor), (1 / floor)[None]])
    return Discriminant(directions, center, apart @ directions.T, precision, shrinkage=shrinkage)


def _span(rows: Tensor) -> Tensor:
    """Orthonormal rows with the span of `rows`, the direction that they share most first."""
    sizes, directions = right_singular_vectors(rows)
    return directions[sizes > 1e-9]
