"""Methods that keep the span of the updates: coordinates in a basis of it are merged as the updates themselves are."""

from typing import Any

import pytest
import torch

from hf_esm.methods import METHODS, InputStatistics, Stack, resolve_method
from support.problems import relative_error


ANGLES = {"model-stock", "nuslerp"}  # see test_geometric.py: between these updates, whose signs differ, they take 0
KEEPING: list[Any] = [
    name for name, method in METHODS.items() if method().keeps_span and not method().routes and name not in ANGLES
]
PUBLISHED = [{"name": name, "rank": "published"} for name in ("iso-c", "iso-cts")]
SHAPES = {"tall": (40, 12), "wide": (14, 30), "square": (24, 24)}


def test_these_methods_keep_it():
    known = {"mean", "task-arithmetic", "regmean", "esm", "esm-roberta", "tsv-m", "iso-c", "iso-cts"}
    assert known | {"wudi", "cat", "knots"} <= set(KEEPING)
    assert all(METHODS[name]().keeps_span for name in ANGLES)
    others = ("ties", "dare", "dare-ties", "breadcrumbs", "della", "sce", "slerp", "karcher")
    assert not any(METHODS[name]().keeps_span for name in others)


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("tasks", [2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [*KEEPING, *PUBLISHED], ids=str)
def test_the_merge_of_coordinates_is_the_merge_of_updates_in_their_basis(method, shape, tasks, calibrated):
    outputs, width = SHAPES[shape]
    draw = torch.Generator().manual_seed(100 * outputs + tasks)
    basis, _ = torch.linalg.qr(torch.randn(outputs, 2 * tasks, generator=draw).double())
    cores = [torch.zeros(2 * tasks, width) for _ in range(tasks)]
    for task, core in enumerate(cores):  # of rank 3 or 1, as LoRA factors give them; the last of several is zero
        if task < tasks - 1 or tasks == 2:
            first, size = (2 * task, 3) if task % 2 == 0 else (2 * task + 1, 1)
            core[first : first + size] = torch.randn(size, width, generator=draw)
    cores = [core + torch.randn(2 * tasks, 1, generator=draw) * core.sum(0) / 9 for core in cores]
    inputs = [torch.randn(9, width, generator=draw) for _ in range(tasks)]
    statistics = [InputStatistics(x, x.mean(0), len(x)) for x in inputs] if calibrated else [None] * tasks
    weights = [1.0, -0.5, *[2.0] * (tasks - 2)]
    known = {"is_linear": True, "statistics": statistics, "thresholds": [0.1] * tasks, "weights": weights}
    resolved = resolve_method(method)
    if hasattr(resolved, "tolerance"):
        resolved.tolerance = 0.0  # randomised directions differ by as much
    updates = [(basis @ core.double()).float() for core in cores]
    whole = resolved.merge(Stack("a.weight", "a.weight", updates, **known))
    inside = resolved.merge(Stack("a.weight", "a.weight", cores, num_outputs=outputs, **known))
    assert whole.update.any() and whole.how == inside.how
    assert relative_error((basis @ inside.update.double()), whole.update.double()) < 1e-5
