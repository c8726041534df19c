"""The masks of Concrete: the formula, its extremes, and the mean of 1."""

import pytest
import torch

from hf_esm.methods import relaxed_mask, rescaled
from support import reference
from support.problems import relative_error, seeds


@seeds
@pytest.mark.parametrize("shape", [(20, 16), (12, 30), (31, 1), (7,)], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_a_relaxed_mask_is_the_formula(seed, shape, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits, uniform = 2 * torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    mask = relaxed_mask(logits, uniform, temperature)
    assert relative_error(mask, reference.relaxed_mask(logits.double(), uniform.double(), temperature)) < 1e-4
    assert float(mask.mean()) == pytest.approx(1, abs=1e-5)


def test_the_ends_of_the_uniform_numbers_give_a_finite_mask_and_gradient():
    logits = torch.zeros(4, requires_grad=True)
    mask = relaxed_mask(logits, torch.tensor([0.0, 0.25, 0.5, 1.0]), 0.5)
    (mask * torch.arange(4.0)).sum().backward()
    assert mask.isfinite().all() and logits.grad.isfinite().all() and mask[0] < mask[1] < mask[2] < mask[3]
    assert float(relaxed_mask(torch.zeros(1), torch.zeros(1), 0.5)) == 1  # a parameter of one weight


@seeds
def test_an_expected_mask_has_the_mean_1_and_is_1_before_the_first_step(seed):
    logits = torch.randn(23, 17, generator=torch.Generator().manual_seed(seed))
    expected = reference.rescaled(logits.double().sigmoid())
    assert relative_error(rescaled(logits.sigmoid()), expected) < 1e-6
    assert torch.equal(rescaled(torch.zeros(23, 17).sigmoid()), torch.ones(23, 17))
