"""Methods that need no statistics in whole merges: bfloat16, scopes of a density, numbers of experts, cards."""

import pytest
import torch

from hf_esm import METHODS, merge_models
from support import reference
from support.helpers import perturbed, save, stored_tensors
from support.problems import relative_error
from support.tiny import LLAMA, assert_refused


TASKS = ("law", "code", "verse")
EMBEDDINGS = [{"kind": "embedding", "method": "mean"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base in bfloat16 and three experts; of the last, only one map differs from the base."""
    folder, base = tmp_path_factory.mktemp("models"), LLAMA.build().to(torch.bfloat16)
    save(base, folder / "base")
    for seed, task in enumerate(TASKS[:2]):
        save(perturbed(base, 0.1, seed), folder / task)
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    save(base, folder / TASKS[2])
    return folder


def merge(models, *tasks, **options):
    options = {"calibration": None, "progress": False, **options}
    return merge_models(models / "base", {task: models / task for task in tasks}, **options)


def updates_of(models, *tasks):
    base = stored_tensors(models / "base")
    experts = [stored_tensors(models / task) for task in tasks]
    return base, {name: [expert[name].double() - base[name].double() for expert in experts] for name in base}


FORMULAS = {  # method, and what it makes of one weight's base and updates
    "ties": ({"density_scope": "tensor"}, lambda _, updates: reference.ties(updates, 0.2)),
    "breadcrumbs": ({"density": 0.5}, lambda _, updates: 0.6 * kept(updates, 0.5, 0.01)),
    "sce": ({"density": 1.0}, lambda _, updates: reference.sce(updates)),
    "model-stock": ({}, lambda _, updates: reference.model_stock(updates)),
    "nuslerp": ({}, lambda _, updates: reference.slerp(*updates, 0.5)),
    "slerp": ({"t": 0.3}, lambda w, updates: reference.slerp(w + updates[0], w + updates[1], 0.3, 0.9995) - w),
    "karcher": ({}, lambda w, updates: reference.karcher([w + u for u in updates], [0.5, 0.5]) - w),
}


def kept(updates, density, gamma):
    """Breadcrumbs with all entries that are as large as the first or the last that is kept: bfloat16 has many."""
    total = 0
    for update in updates:
        magnitudes = update.abs().flatten().sort(descending=True).values
        count, dropped = max(int(density * len(magnitudes)), 1), int(gamma * len(magnitudes))
        least, most = magnitudes[dropped + count - 1], magnitudes[dropped]
        total = total + update * ((update.abs() >= least) & (update.abs() <= most))
    return total


@pytest.mark.parametrize("name", FORMULAS)
def test_weights_of_bfloat16_are_merged_by_the_formula_and_rounded_once(models, tmp_path, name):
    settings, formula = FORMULAS[name]
    merge(models, *TASKS[:2], method={"name": name, **settings}, output_dir=tmp_path / "m")
    base, updates = updates_of(models, *TASKS[:2])
    for weight, found in stored_tensors(tmp_path / "m").items():
        if "embed_tokens" not in weight and "lm_head" not in weight:
            expected = base[weight].double() + formula(base[weight].double(), updates[weight])
            assert found.dtype == torch.bfloat16 and relative_error(found, expected) < 3e-3, weight
            # At most one unit in the last place, where the formula lies between two numbers.
            assert (found != expected.bfloat16()).float().mean() < 0.01, weight
    card = (tmp_path / "m" / "README.md").read_text()
    assert f"with method `{name}`" in card
    assert all(f"[arXiv {paper}](https://arxiv.org/abs/{paper})" in card for paper in METHODS[name]().papers)


def test_each_method_of_a_merge_ranks_in_its_own_scope(models, tmp_path):
    """An override's method has the thresholds of its own settings: of the whole model, of each weight."""
    whole = {"name": "breadcrumbs", "density": 0.3, "gamma": 0.1, "density_scope": "model"}
    overrides = [{"match": "mlp", "method": {"name": "ties", "density_scope": "tensor"}}]
    merge(models, *TASKS[:2], method=whole, overrides=[*overrides, *EMBEDDINGS], output_dir=tmp_path / "both")
    merge(models, *TASKS[:2], method=whole, overrides=EMBEDDINGS, output_dir=tmp_path / "whole")
    merge(models, *TASKS[:2], method=overrides[0]["method"], overrides=EMBEDDINGS, output_dir=tmp_path / "ties")
    both, first, second = (stored_tensors(tmp_path / folder) for folder in ("both", "whole", "ties"))
    assert all(torch.equal(tensor, (second if "mlp" in name else first)[name]) for name, tensor in both.items())
    _, updates = updates_of(models, *TASKS[:2])
    per_weight = merge(models, *TASKS[:2], method={**whole, "density_scope": "tensor"}).load_model().state_dict()
    assert any(not torch.equal(per_weight[name], first[name]) for name in updates if "proj" in name)


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
def test_three_experts_are_too_many_for_an_arc(models, tmp_path, method):
    """Refused before any work; both remedies merge them."""
    experts = {task: models / task for task in TASKS}
    arguments = {"base": models / "base", "experts": experts, "output_dir": tmp_path / "m"}
    says = [f"'{method}' merges 2 experts, not 3", "Leave experts out", "'karcher'"]
    assert_refused(tmp_path, says, {**arguments, "method": method})
    assert_refused(tmp_path, says, {**arguments, "overrides": [{"match": "mlp", "method": method}], "method": "mean"})
    merge(models, *TASKS, method="karcher", output_dir=tmp_path / "karcher")
    merge(models, *TASKS[:2], method=method, output_dir=tmp_path / "two")
    alone = merge(models, TASKS[2], method=method).load_model().state_dict()
    assert all(torch.equal(alone[name], tensor) for name, tensor in stored_tensors(models / TASKS[2]).items())


@pytest.mark.parametrize(
    "name", ["ties", "dare-ties", "breadcrumbs", "della", "sce", "model-stock", "slerp", "karcher"]
)
def test_an_expert_that_leaves_a_weight_alone_and_weights_of_tasks_are_merged(models, tmp_path, name):
    tasks = (TASKS[0], TASKS[2])
    merge(models, *tasks, method=name, weights={TASKS[2]: 0.5}, output_dir=tmp_path / "m")
    base, found = stored_tensors(models / "base"), stored_tensors(tmp_path / "m")
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert any(not torch.equal(found[weight], base[weight]) for weight in base)


def test_alpha_scales_the_way_from_the_base_and_is_not_searched_for_a_mean_of_weights(models, tmp_path):
    for name in ("slerp", "karcher"):
        arguments = {"base": models / "base", "experts": {task: models / task for task in TASKS[:2]}}
        says = [name, "alpha"]
        assert_refused(tmp_path, says, {**arguments, "method": name, "alpha": "auto", "output_dir": tmp_path / "m"})
    half = merge(models, *TASKS[:2], method="slerp", alpha=0.5, dtype="float32").load_model().state_dict()
    whole = merge(models, *TASKS[:2], method="slerp", dtype="float32").load_model().state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    base = stored_tensors(models / "base")[name].float()
    assert relative_error(half[name] - base, 0.5 * (whole[name] - base)) < 1e-5
