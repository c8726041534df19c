"""Fresh random problems for the tests of the mathematics: updates, inputs, and their statistics by several routes."""

import os
import random

import pytest
import torch
from torch import Tensor

from hf_esm.calibration.recorder import FactorAccumulator
from hf_esm.calibration.statistics import ActivationStatistics
from hf_esm.linalg import triangular_factor
from hf_esm.methods.stack import InputStatistics


# Drawn in `tests/conftest.py`, once a run. A test's id shows its seed, and HF_ESM_TEST_SEED=<seed> repeats it.
SEEDS = [int(seed) for seed in os.environ["HF_ESM_TEST_SEED"].split(",")]
seeds = pytest.mark.parametrize("seed", SEEDS, ids="seed{}".format)

SHAPES = {  # tokens, d_out, d_in, tasks
    "fewer-tokens-than-outputs": (9, 20, 16, 3),
    "fewer-tokens-than-directions": (4, 24, 17, 2),
    "wide": (50, 12, 30, 4),
    "tall": (70, 31, 11, 5),
    "square": (24, 24, 24, 3),
    "more-tokens-than-everything": (150, 21, 18, 2),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """`‖found − expected‖ / ‖expected‖` in the Frobenius norm; infinite where `found` is not finite."""
    found, expected = found.detach().double(), expected.double()
    if found.shape != expected.shape or not found.isfinite().all():
        return float("inf")
    error, size = float((found - expected).norm()), float(expected.norm())
    return error / size if size else error


def random_problem(seed: int, shape: tuple[int, int, int, int]) -> tuple[list[Tensor], list[Tensor]]:
    """Per task an update `[d_out, d_in]` and inputs `[n, d_in]` with a mean, unequal features, a decaying spectrum."""
    tokens, d_out, d_in, tasks = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    deltas = [0.02 * (1 + task) * normal(d_out, d_in) for task in range(tasks)]
    inputs = [(normal(tokens, d_in) * torch.logspace(0, -1, d_in) + 0.3) @ normal(d_in, d_in) for _ in range(tasks)]
    return deltas, inputs


def exact(inputs: Tensor) -> InputStatistics:
    """Statistics whose factor is the activation matrix itself."""
    return InputStatistics(inputs, inputs.mean(0), len(inputs))


def factored(inputs: Tensor) -> InputStatistics:
    """Statistics from one QR of all activations."""
    return InputStatistics(triangular_factor(inputs), inputs.mean(0), len(inputs))


def streamed(inputs: Tensor) -> InputStatistics:
    """Statistics of batches of very different sizes, some empty, some longer than the buffer."""
    accumulator = FactorAccumulator(inputs.shape[1])
    cuts = random.Random(len(inputs)).choices(range(len(inputs) + 1), k=5)
    for batch in inputs.tensor_split(sorted(cuts)):
        accumulator.add(batch)
    mean = (accumulator.total / max(accumulator.count, 1)).float()
    return InputStatistics(accumulator.factor, mean, accumulator.count)


def sharded(inputs: Tensor) -> InputStatistics:
    """Statistics of three parts, merged."""
    parts = [ActivationStatistics({"w": streamed(part)}, {"w": "w"}) for part in inputs.tensor_split(3)]
    return ActivationStatistics.merge(parts)["w"]


ROUTES = [exact, factored, streamed, sharded]
