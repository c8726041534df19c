"""Routed experts against the literal formulas in float64: outputs of modules, the prototype router of the paper,
the discriminant router (a linear discriminant analysis with one shrunk covariance), and the factors.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_esm.routing.discriminant import fit_at_shrinkage, fit_discriminant
from hf_esm.routing.experts import expert_factors
from support import reference
from support.problems import exact, random_problem, relative_error, seeds, shapes
from support.routed import (
    KINDS,
    ROUTERS,
    TASKS,
    chosen,
    fresh,
    loaded,
    logits,
    passed,
    pooled,
    recorded,
    shares,
    write_cases,
)


kinds = pytest.mark.parametrize("kind", KINDS)
routers = pytest.mark.parametrize("router", ROUTERS)
cases = pytest.fixture(write_cases, scope="module")


@pytest.mark.cases(6)
@kinds
@routers
@torch.no_grad()
def test_every_module_gives_the_formula(cases, kind, router):
    case = cases[kind]
    model = loaded(case, router)
    _, decisions = recorded(model, **case.batch)
    routes = {key: shares(decision.route) for key, decision in decisions.items()}
    experts = case.written[router]
    seen = passed(model.get_base_model(), case, list(experts.factors))
    assert len(seen) == len(experts.factors) > 7 and len({str(found) for found in routes.values()}) > len(routes) // 4
    tasks: list = [{}] * len(case.samples)
    for name, (x, found) in seen.items():  # in the order in which they ran
        base, (a, b) = case.base.get_submodule(name), experts.factors[name]
        weight = base.weight.double().T if isinstance(base, Conv1D) else base.weight.double()
        if router == "prototype":
            prototypes, means = experts.prototypes[name].double(), pooled(x, case.batch["attention_mask"])
            cosines = (means @ prototypes.T) / means.norm(dim=1, keepdim=True) / prototypes.norm(dim=1)
            assert routes[router, name] == [{expert: 1.0} for expert in cosines.argmax(1).tolist()]
            torch.testing.assert_close(decisions[router, name].probabilities.double(), cosines, rtol=1e-4, atol=1e-5)
        tasks = routes.get((router, name), tasks)  # a discriminant's, from where it decided on
        for i, given in enumerate(tasks):
            expected = x[i] @ weight.T + (0 if base.bias is None else base.bias.double())
            for task, weighted in given.items():
                expected = expected + weighted * (x[i] @ a[task].double().T) @ b[task].double().T
            assert relative_error(found[i], expected) < 1e-5, (name, i)


@kinds
def test_the_discriminant_decides_by_its_distances(cases, kind):
    case = cases[kind]
    model = loaded(case, "discriminant")
    config = model.peft_config["discriminant"]
    assert len(config.readers) == (2 if kind == "bert" else 1)
    features = case.written["discriminant"].features
    fitted = fit_discriminant({task: torch.cat([features[task][m] for m in config.readers], -1) for task in TASKS})
    seen = passed(case.base, case, config.readers)
    read = torch.cat([pooled(seen[name][0], case.batch["attention_mask"]) for name in config.readers], dim=1)
    near, beside = fitted.distances(read)
    probabilities = torch.softmax(-near / 2 / fitted.temperature, dim=1)
    distance = near.min(1).values + beside
    _, decisions = recorded(model, **case.batch)
    ((key, decision),) = decisions.items()
    assert key == ("discriminant", config.readers[-1])
    torch.testing.assert_close(decision.probabilities.double(), probabilities, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(decision.distance.double() * fitted.threshold, distance, rtol=1e-3, atol=1e-3)
    known, weights = distance <= fitted.threshold, torch.softmax(-near / 2 / fitted.temperature / 2, dim=1)
    assert known[:-1].all()
    assert not known[-1] or kind != "bert"  # beginnings of few tokens are far apart
    for weight, near_enough, given in zip(weights, known, shares(decision.route), strict=True):
        expected = weight.topk(2).indices.tolist() if near_enough else []
        assert list(given) == expected
        assert list(given.values()) == pytest.approx((256 * weight[expected]).round().div(256).tolist(), abs=1e-6)
    assert len({*chosen(decisions)[key]}) > 2


def literal_lda(x: Tensor, y: Tensor, shrinkage: float, queries: Tensor) -> Tensor:
    """Squared Mahalanobis distances `[N, T]`, by the inverse of the covariance that all tasks share."""
    means = torch.stack([x[y == task].mean(0) for task in range(int(y.max()) + 1)])
    centered = x - means[y]
    covariance = centered.T @ centered / max(len(x) - len(means), 1)
    mean_diagonal = covariance.diagonal().mean() * torch.eye(x.shape[1], dtype=torch.float64)
    precision = torch.linalg.inv((1 - shrinkage) * covariance + shrinkage * mean_diagonal)
    apart = queries[:, None] - means
    return torch.einsum("ntd,de,nte->nt", apart, precision, apart)


LDA = {  # tasks, samples each, features, directions
    "more-features": (3, 12, 50, 256),
    "more-samples": (3, 40, 6, 256),
    "more-tasks-than-features": (8, 10, 5, 256),
    "two-each": (3, 2, 30, 256),
    "few-directions": (4, 10, 50, 4),
    "one-more-direction": (4, 10, 50, 5),
    "no-more-than-needed": (4, 10, 50, 3),
}


def lda_problem(seed: int, tasks: int, each: int, width: int, apart: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Samples with their tasks, and samples to classify; features are correlated, with unequal variances."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mix = normal(width, width) * torch.logspace(0, -1, width, dtype=torch.float64)
    y = torch.arange(tasks).repeat_interleave(each)
    return normal(len(y), width) @ mix + apart * normal(tasks, width)[y], y, normal(40, width) @ mix + 1


@seeds
@pytest.mark.parametrize("problem", LDA.values(), ids=LDA)
@pytest.mark.parametrize("shrinkage", [0.03, 0.6])
def test_the_discriminant_orders_tasks_as_the_full_one(seed, problem, shrinkage):
    *sizes, directions = problem
    x, y, queries = lda_problem(seed, *sizes)
    fitted = fit_at_shrinkage(x, y, shrinkage, directions)
    assert len(fitted.directions) <= directions
    expected, (found, _) = literal_lda(x, y, shrinkage, queries), fitted.distances(queries)
    assert torch.equal(found.argmin(1), expected.argmin(1))
    assert relative_error(found - found[:, :1], expected - expected[:, :1]) < 1e-6


@seeds
@pytest.mark.parametrize("problem", [(3, 12, 8), (3, 12, 50)], ids=str)
def test_along_and_beside_the_directions_is_the_whole_distance(seed, problem):
    x, y, queries = lda_problem(seed, *problem)
    along, beside = fit_at_shrinkage(x, y, 0.1, 256).distances(queries)
    assert relative_error(along + beside[:, None], literal_lda(x, y, 0.1, queries)) < 1e-6


@seeds
def test_settings_of_the_discriminant_are_chosen_on_held_out_samples(seed):
    """The literal formula takes the likeliest settings of the grid, and the distance that one held-out sample in 20
    exceeds.
    """
    x, y, _ = lda_problem(seed, 3, 16, 5, 0.3)
    held_out, fold = {}, torch.arange(16).repeat(3) % 8
    for shrinkage in (0.03, 0.1, 0.3, 0.6, 0.9):
        distances = torch.zeros(len(x), 3, dtype=torch.float64)
        for k in range(8):
            distances[fold == k] = literal_lda(x[fold != k], y[fold != k], shrinkage, x[fold == k])
        for t in [2 ** (i / 2) for i in range(-2, 15)]:
            likelihood = torch.log_softmax(-distances / 2 / t, 1)[torch.arange(len(x)), y].mean()
            held_out[shrinkage, t] = float(likelihood), distances
    (shrinkage, temperature), (_, distances) = max(held_out.items(), key=lambda item: item[1][0])
    found = fit_discriminant({str(task): x[y == task] for task in range(3)})
    assert (found.shrinkage, found.temperature) == (shrinkage, temperature)
    assert found.threshold == pytest.approx(float(distances.min(1).values.quantile(0.95)), rel=1e-6)
    assert found.accuracy == pytest.approx(float((distances.argmin(1) == y).double().mean()))


@seeds
def test_all_beginnings_of_a_sample_are_held_out_together(seed):
    """Else a router of noise would find every sample by its own copies, and choose by that."""
    x, y, _ = lda_problem(seed, 3, 16, 50, 0.0)
    copies = {str(task): x[y == task][:, None].expand(-1, 4, -1) for task in range(3)}
    assert fit_discriminant(copies).accuracy < 0.75  # 0.6 has been seen; among its own copies, 0.9 or more


@seeds
def test_the_discriminant_of_beginnings_is_that_of_as_many_samples(seed):
    x, y, _ = lda_problem(seed, 3, 32, 5, 0.3)
    of_parts = fit_discriminant({str(task): x[y == task].reshape(8, 4, 5) for task in range(3)})
    expected = fit_at_shrinkage(x, y, of_parts.shrinkage, 256)
    for name in ("directions", "center", "classes", "precision"):
        assert torch.equal(getattr(of_parts, name), getattr(expected, name))


def test_beginnings_count_only_where_all_tasks_have_them():
    """Else a router would tell tasks apart by whether a sample is whole."""
    x, y, _ = lda_problem(0, 3, 16, 5, 0.3)
    whole = {str(task): x[y == task] for task in range(3)}
    parts = {task: torch.stack([10 + rows, rows], 1) for task, rows in whole.items()}
    found, expected = fit_discriminant({**parts, "2": whole["2"]}), fit_discriminant(whole)
    assert torch.equal(found.classes, expected.classes) and found.threshold == expected.threshold


def of_features(case: SimpleNamespace, folder: Path, features: Callable[[Tensor], Tensor]) -> PeftModel:
    """The model of a case with a router that was made from other features."""
    written = copy.copy(case.written["discriminant"])
    written.features = {t: {m: features(x) for m, x in found.items()} for t, found in written.features.items()}
    written.save(folder / "adapter", case.base)
    return PeftModel.from_pretrained(fresh(case), folder / "adapter").eval()


def test_one_sample_per_task_routes_to_the_nearest(cases, tmp_path):
    case = cases["llama"]
    model = of_features(case, tmp_path, lambda x: x[:1, -1])  # the whole sample
    _, decisions = recorded(model, **case.batch)
    features = case.written["discriminant"].features
    (reader,) = model.peft_config["default"].readers
    rows = pooled(passed(case.base, case, [reader])[reader][0], case.batch["attention_mask"])
    nearest = torch.cdist(rows, torch.cat([features[task][reader][:1, -1] for task in TASKS]).double()).argmin(1)
    ((_, tasks),) = chosen(decisions).items()
    assert tasks == nearest.tolist()


def test_tasks_that_look_alike_get_the_static_model(cases, tmp_path):
    case = cases["llama"]
    model = of_features(case, tmp_path, torch.ones_like)
    assert torch.equal(logits(model, case), logits(case.base, case))


@seeds
@shapes
@pytest.mark.parametrize("rank", [1, 4, 40])
def test_factors_are_the_essential_directions_of_the_residual(seed, shape, rank):
    """Directions beyond the rank of the residual are zero."""
    (residual, *_), (x, *_) = random_problem(seed, shape)
    a, b = expert_factors(residual, exact(x), rank)
    directions, _, coordinates = reference.esd(x, residual, rank)
    there = len(coordinates)
    assert a.shape == (rank, residual.shape[1]) and b.shape == (residual.shape[0], rank)
    assert relative_error(b.double() @ a.double(), directions @ coordinates) < 1e-4
    assert relative_error(b[:, :there].T.double() @ b[:, :there].double(), torch.eye(there)) < 1e-5
    assert not a[there:].any() and not b[:, there:].any() and (rank < 40 or there < 40)


@seeds
@shapes
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("rank", [1, 4, 40])
def test_factors_give_along_the_updates_directions_what_the_expert_gives(seed, shape, calibrated, rank):
    (update, residual, *_), (x, *_) = random_problem(seed, shape)
    a, b = expert_factors(residual, exact(x) if calibrated else None, rank, update=update)
    seen = x.double() if calibrated else torch.eye(update.shape[1], dtype=torch.float64)
    directions, *_ = reference.esd(seen, update, rank)
    expected = directions @ directions.T @ residual.double()
    assert relative_error(b.double() @ a.double(), expected) < 1e-4
    unchanged, _ = expert_factors(residual, exact(x), rank, update=torch.zeros_like(update))
    assert unchanged.shape == a.shape and not unchanged.any()


@seeds
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_tolerance_leads_nearly_to_the_same_factors(seed, calibrated):
    (residual, *_), (x, *_) = random_problem(seed, (150, 60, 50, 6))
    residual = residual * torch.logspace(0, -1, 50)
    products = []
    for tolerance in (0.0, 1e-6, 0.3):
        a, b = expert_factors(residual, exact(x) if calibrated else None, 6, tolerance)
        products.append(b @ a)
    assert 0 < relative_error(products[1], products[0]) < relative_error(products[2], products[0]) < 0.5
