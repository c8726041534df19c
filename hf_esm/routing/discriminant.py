"""Routers in closed form: which task a sample belongs to, from the pooled inputs of a few modules."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


SHRINKAGES = (0.03, 0.1, 0.3, 0.6, 0.9)


TEMPERATURES = tuple(2 ** (step / 2) for step in range(-2, 15))  # 0.5 to 128


FOLDS = 8


MAX_DIRECTIONS = 256


@dataclass
class Discriminant:
    """Normal distributions of one covariance around every task's mean, kept along `K` directions of `D` features.

    Attributes:
        directions: `[K, D]` float64, orthonormal rows: those that tell the tasks apart, and the widest ones.
        center: `[D]`, the mean feature.
        classes: `[T, K]`, the tasks' means along the directions, from the center.
        precision: `[K + 1]`, one over the variance along each direction, and beside all of them.
        temperature: of the probabilities; chosen on held-out samples.
        threshold: distance that 95 % of the held-out samples stay within.
        shrinkage: of the covariance towards a multiple of the identity; chosen on held-out samples.
        accuracy: share of held-out samples that found their task.
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
        """Squared Mahalanobis distances: `[N, T]` to each task along the directions, and `[N]` beside them."""
        centered = features.double() - self.center
        along = centered @ self.directions.T
        beside = (centered.square().sum(-1) - along.square().sum(-1)).clamp_min(0) * self.precision[-1]
        return (along[:, None] - self.classes).square() @ self.precision[:-1], beside


def fit_discriminant(features: Mapping[str, Tensor], max_directions: int = MAX_DIRECTIONS) -> Discriminant:
    """A router from each task's features `[N_t, D]`.

    Shrinkage, temperature and threshold are chosen by cross-validation: shrinkage and temperature by the
    log-likelihood of the held-out samples' tasks, the threshold so that one held-out sample in twenty is farther.
    """
    x = torch.cat([rows.double() for rows in features.values()])
    y = torch.repeat_interleave(torch.arange(len(features)), torch.tensor([len(rows) for rows in features.values()]))
    fold = torch.cat([torch.arange(len(rows)) % FOLDS for rows in features.values()])
    if min(len(rows) for rows in features.values()) < FOLDS:  # too few samples to hold any out
        return _fit(x, y, 0.6, max_directions)
    held_out = {}
    for shrinkage in SHRINKAGES:
        near, far = torch.zeros(len(x), len(features), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
        for k in range(FOLDS):
            near[fold == k], far[fold == k] = _fit(x[fold != k], y[fold != k], shrinkage, max_directions).distances(
                x[fold == k]
            )
        held_out[shrinkage] = near, far
    own = torch.arange(len(x)), y
    _, shrinkage, temperature = max(
        (float(torch.log_softmax(near / (-2 * t), dim=-1)[own].mean()), s, t)
        for s, (near, _) in held_out.items()
        for t in TEMPERATURES
    )
    near, far = held_out[shrinkage]
    found = _fit(x, y, shrinkage, max_directions)
    found.temperature, found.threshold = temperature, float((near.min(-1).values + far).quantile(0.95))
    found.accuracy = float((near.argmin(-1) == y).double().mean())
    return found


def _fit(x: Tensor, y: Tensor, shrinkage: float, max_directions: int) -> Discriminant:
    """In the space of the samples, whose number is small, rather than that of the features."""
    count = int(y.max()) + 1
    means = torch.stack([x[y == t].mean(0) for t in range(count)])
    center = means.mean(0)
    freedom = max(len(x) - count, 1)
    _, values, rows = torch.linalg.svd(x - means[y], full_matrices=False)
    variances = (1 - shrinkage) * values.square() / freedom
    floor = shrinkage * values.square().sum() / freedom / x.shape[1]
    apart = means - center
    # Samples that do not vary leave the tasks as far apart as float32 can tell, and no farther.
    floor = torch.maximum(floor, 1e-6 * apart.square().mean()).clamp_min(torch.finfo(torch.float32).tiny)
    # Σ⁻¹ of the means, and the widest directions: with both, distances along them order the tasks as all would.
    seen = apart @ rows.T
    solved = (apart - seen @ rows) / floor + (seen / (variances + floor)) @ rows
    directions = _span(solved / solved.norm(dim=1, keepdim=True).clamp_min(1e-300))
    rest = rows - (rows @ directions.T) @ directions
    widest = _span(rest * (values / values[0].clamp_min(1e-300))[:, None])
    directions = torch.cat([directions, widest[: max(max_directions - len(directions), 0)]])
    covariance = directions @ rows.T
    covariance = (covariance * variances) @ covariance.T
    spread, turn = torch.linalg.eigh(covariance)
    directions = turn.T @ directions
    precision = torch.cat([1 / (spread.clamp_min(0) + floor), (1 / floor)[None]])
    return Discriminant(directions, center, apart @ directions.T, precision, shrinkage=shrinkage)


def _span(rows: Tensor) -> Tensor:
    """Orthonormal rows that span the same, the direction of most rows first."""
    _, sizes, found = torch.linalg.svd(rows, full_matrices=False)
    return found[sizes > 1e-9]
