"""Interference between tasks against its literal formulas."""

import pytest
import torch

from hf_esm import HfEsmError, Interference, calibrate, measure_interference, merge_models
from hf_esm.evaluation.interference import energy_kept, singular_task_interference, subspace_overlap
from support import reference
from support.problems import exact, random_problem, seeds, shapes, streamed
from support.routed_toys import expert, inputs, task_texts, write_bert


@seeds
@shapes
def test_sti_is_the_formula(seed, shape):
    deltas, _ = random_problem(seed, shape)
    assert singular_task_interference(deltas) == pytest.approx(reference.sti(deltas), rel=1e-6)


@seeds
def test_sti_is_zero_for_orthogonal_tasks_and_large_for_equal_ones(seed):
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    deltas = [u[:, k : k + 4] @ torch.diag(torch.rand(4, generator=generator) + 0.5) @ v[k : k + 4] for k in (0, 4, 8)]
    assert singular_task_interference(deltas) == pytest.approx(0, abs=1e-5)
    assert singular_task_interference([deltas[0]] * 3) > 1
    assert singular_task_interference([deltas[0] * 0] * 3) == 0
    assert singular_task_interference([deltas[0], deltas[1] * 0, deltas[2]]) == pytest.approx(0, abs=1e-5)


@seeds
def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles(seed):
    generator = torch.Generator().manual_seed(seed)
    bases = [torch.linalg.qr(torch.randn(20, k, generator=generator).double()).Q for k in (3, 5, 20)]
    found = subspace_overlap([*bases, bases[0][:, :0]])
    for s, one in enumerate(bases):
        for t, other in enumerate(bases):
            cosines = torch.linalg.svdvals(one.T @ other)
            assert float(found[s, t]) == pytest.approx(float(cosines.square().mean()), abs=1e-9)
    assert torch.equal(found[3], torch.zeros(4, dtype=torch.float64))
    assert found[:3, 2].tolist() == pytest.approx([1, 1, 1])


@seeds
@shapes
def test_energies_are_those_of_the_projected_shift(seed, shape):
    (delta, *_), (x, *_) = random_problem(seed, shape)
    ranks = [1, 2, min(delta.shape)]
    shift = x.double() @ delta.double().T
    directions = reference.svd(shift)[2].T, reference.svd(delta)[0]
    for route in (exact, streamed):
        for found, basis in zip(energy_kept(delta, route(x), ranks), directions):
            expected = [(shift @ basis[:, :r] @ basis[:, :r].T).square().sum() / shift.square().sum() for r in ranks]
            assert found == pytest.approx([float(share) for share in expected], rel=1e-5)
    essential, singular = energy_kept(delta, exact(x), ranks)
    assert all(a >= b - 1e-9 for a, b in zip(essential, singular))  # what they are chosen for
    assert energy_kept(delta * 0, exact(x), ranks) == ([1.0] * 3, [1.0] * 3)


def test_statistics_are_matched_by_task(tmp_path):
    models = write_bert(tmp_path)
    experts = {task: models / task for task in "ab"}
    plan = merge_models(models / "base", experts, method="mean", progress=False).plan
    known = {task: calibrate(models / task, task_texts(task), progress=False) for task in "ab"}
    turned = dict(reversed(known.items()))
    assert measure_interference(plan, turned).as_dict() == measure_interference(plan, known).as_dict()
    with pytest.raises(HfEsmError, match="`statistics`: there is no expert 'c'; there are a, b"):
        measure_interference(plan, known | {"c": known["a"]})


def test_without_linear_maps_there_is_no_interference():
    found = Interference(["a", "b"], [])
    assert found.sti == 0 and found.overlap == [[0, 0], [0, 0]] and found.energy() == {}


def test_interference_of_a_merge(tmp_path):
    models = write_bert(tmp_path)
    experts = {task: models / task for task in "ab"}
    plan = merge_models(models / "base", experts, method="mean", progress=False).plan
    statistics = {task: calibrate(models / task, task_texts(task), progress=False) for task in "ab"}
    found = measure_interference(plan, statistics)
    assert len(found.layers) == 12
    name = "encoder.layer.1.output.dense.weight"
    (layer,) = (layer for layer in found.layers if layer.name == name)
    base = plan.base.tensor(name)
    deltas = [expert(task).state_dict()[f"bert.{name}"] - base for task in "ab"]
    assert layer.sti == pytest.approx(reference.sti(deltas), rel=1e-4)
    rank = min(base.shape) // 2
    bases = [reference.esd(inputs(task)[f"bert.{name}"], delta, rank)[0] for task, delta in zip("ab", deltas)]
    expected = float((bases[0].T @ bases[1]).square().sum()) / rank
    assert layer.overlap[0][1] == pytest.approx(expected, rel=1e-4)
    assert found.sti == pytest.approx(sum(layer.sti for layer in found.layers) / 12)
    energy = found.energy()
    assert energy["essential"][-1] == pytest.approx((1.0, 1.0))
    assert Interference.from_dict(found.as_dict()) == found
    bare = measure_interference(plan, dict.fromkeys("ab"))
    assert bare.energy() == {}
    assert [one.sti for one in bare.layers] == pytest.approx([one.sti for one in found.layers])
