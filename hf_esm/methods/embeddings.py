"""Embeddings: linear maps with one-hot inputs, merged row by row by how often each task reads a row."""

import torch
from torch import Tensor

from .stack import Merged, Stack, mean_update


# Weight of rows that an expert's samples do not read, in units of the mean share of a row.
PRIOR = 0.1


def merge_counted_embedding(updates: list[Tensor], counts: list[Tensor], weights: list[float]) -> Tensor:
    """Return the least-squares merge of an embedding: each row's mean update, weighted by the tasks' token counts.

    An embedding is a linear map whose inputs are one-hot, so that `Xᵀ X` is the diagonal of the counts `c_t`. With the
    shares `s_t = c_t / n_t + 0.1 / V`, row `v` is `Σ_t w_t s_{t,v} Δ_{t,v} / Σ_t |w_t| s_{t,v}`. The prior `0.1 / V`
    decides on rows that no sample reads, for which it gives the mean.

    A matrix that is also the output map (tied weights) is merged by the same rule: row `v` of an output map counts as
    often as its token is written. The least-squares merge of both roles, which gives all rows the second moments of
    the last hidden states, kept 8 points less of the experts' gain (33 instead of 41 %, four small language models).

    Args:
        updates: `T` updates `[V, d]`.
        counts: `T` times how often the expert's samples read each row, `[V]`. Of a task that reads none, only the
            prior counts.
        weights: `T` weights of the tasks.

    Returns the merged update `[V, d]`, float64.
    """
    merged, total = torch.zeros_like(updates[0], dtype=torch.float64), updates[0].new_zeros(1, dtype=torch.float64)
    for update, count, weight in zip(updates, counts, weights, strict=True):
        count = count.to(merged)
        shares = count / count.sum().clamp_min(1) + PRIOR / len(count)
        merged += weight * shares[:, None] * update.double()
        total = total + abs(weight) * shares
    return merged / total[:, None] if total.any() else merged


def merge_embedding(stack: Stack) -> Merged:
    """Merge an embedding by token counts, or, where there are none, by the mean of the updates.

    α does not scale the result: it is a fit with a scale of its own, whatever the linear maps are merged by.
    """
    if not stack.counts:
        return mean_update(stack, scaled=False)
    return Merged(merge_counted_embedding(stack.updates, stack.counts, stack.weights).float(), "counts", scaled=False)
