"""Embeddings: the least-squares merge by token counts against its literal formula, and degenerate counts."""

import pytest
import torch

from hf_esm.methods import METHODS, EssentialMerge, Stack, merge_counted_embedding, merge_embedding
from support.problems import relative_error, seeds


def problem(seed, tasks=3, rows=11, width=5):
    draw = torch.Generator().manual_seed(seed)
    updates = [torch.randn(rows, width, generator=draw) for _ in range(tasks)]
    counts = [torch.randint(0, 6, (rows,), generator=draw) for _ in range(tasks)]
    for count in counts:
        count[3] = 0  # a row that no sample reads
    return updates, counts


def least_squares(updates, counts, weights):
    """The literal fit in float64: one-hot inputs as a matrix, a ridge of the prior, solved by the normal equations."""
    rows = len(updates[0])
    weighted, total = torch.zeros_like(updates[0], dtype=torch.float64), torch.zeros(rows, rows, dtype=torch.float64)
    for update, count, weight in zip(updates, counts, weights, strict=True):
        inputs = torch.repeat_interleave(torch.eye(rows, dtype=torch.float64), count, dim=0)
        gram = inputs.T @ inputs / max(len(inputs), 1) + 0.1 / rows * torch.eye(rows, dtype=torch.float64)
        weighted += weight * gram @ update.double()
        total += abs(weight) * gram
    return torch.linalg.solve(total, weighted)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -1.0, 2.0], [1.0, 0.0, 0.0]])
@seeds
def test_embeddings_by_the_literal_least_squares(seed, weights):
    updates, counts = problem(seed)
    merged = merge_counted_embedding(updates, counts, weights)
    assert relative_error(merged, least_squares(updates, counts, weights)) < 1e-12


def test_rows_that_no_sample_reads_are_averaged():
    updates, counts = problem(0)
    merged = merge_counted_embedding(updates, [torch.zeros_like(count) for count in counts], [1.0] * 3)
    assert torch.allclose(merged, torch.stack(updates).double().mean(0))
    shares = torch.stack([count / count.sum() + 0.1 / len(count) for count in counts])
    unread = merge_counted_embedding(updates, counts, [1.0] * 3)[3]
    assert torch.allclose(unread, torch.stack(updates).double().mean(0)[3]) and len(set(shares[:, 3].tolist())) == 1


def test_weights_of_zero_leave_the_base():
    updates, counts = problem(1)
    assert not merge_counted_embedding(updates, counts, [0.0] * 3).any()


def test_without_counts_embeddings_are_averaged_and_alpha_scales_neither():
    updates, counts = problem(2)
    averaged = merge_embedding(Stack("e.weight", "e.weight", updates, is_embedding=True))
    counted = merge_embedding(Stack("e.weight", "e.weight", updates, is_embedding=True, counts=counts))
    assert averaged.how == "mean" and torch.equal(averaged.update, torch.stack(updates).mean(0))
    assert counted.how == "counts" and counted.update.dtype == torch.float32
    assert not averaged.scaled and not counted.scaled


def test_only_published_settings_keep_a_rule_of_their_own():
    own = {name for name in METHODS if not METHODS[name]().counts_embeddings}
    published = {"esm-roberta", "esm-vit", "esm++-roberta", "esm++-vit"}
    assert own == published | {"adamerging", "concrete-task-arithmetic", "concrete-adamerging"}
    assert not EssentialMerge(published_embeddings=True).counts_embeddings
