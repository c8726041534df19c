"""Weights of tasks in whole merges: as an argument, in an expert's mapping, in recipes; and merges of one expert."""

import json

import pytest
import torch
import yaml

from hf_esm import METHODS, load_recipe, merge_models
from hf_esm.checkpoints.layout import RECIPE_FILE
from hf_esm.checkpoints.layout import REPORT_FILE as REPORT
from support.helpers import stored_tensors, text_samples
from support.problems import relative_error
from support.tiny import save_models


DROPPING = ("ties", "dare", "dare-ties", "breadcrumbs", "della")
every_method = pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name]().needs_samples])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def merged(models, output, **changes):
    arguments = {**models.arguments, "output_dir": str(output), "progress": False, "alpha": 1.0, **changes}
    return merge_models(**arguments)


def same(one, other):
    first, second = stored_tensors(one), stored_tensors(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_task_arithmetic_adds_weighted_updates(models, tmp_path):
    merged(models, tmp_path / "m", method="task-arithmetic", weights={"left": -0.5}, calibration=None)
    base, found = stored_tensors(models.base), stored_tensors(tmp_path / "m")
    left, right = (stored_tensors(models.experts[task]) for task in ("left", "right"))
    for name in (name for name in found if "encoder" in name):
        tuned = (left[f"bert.{name}"] - base[name], right[f"bert.{name}"] - base[name])
        assert relative_error(found[name] - base[name], -0.5 * tuned[0] + tuned[1]) < 1e-4, name


def test_a_weight_in_a_mapping_in_a_recipe_and_in_an_argument_is_one_setting(models, tmp_path):
    result = merged(models, tmp_path / "argument", weights={"left": "5e-1"})
    assert "weight 0.5" in str(result.plan) and str(result.plan).count("weight 0.5") == 1
    experts = {**models.experts, "left": {"path": models.experts["left"], "weight": 0.5}}
    merged(models, tmp_path / "mapping", experts=experts)
    recipe = yaml.safe_load((tmp_path / "mapping" / RECIPE_FILE).read_text())
    assert recipe["weights"] == {"left": 0.5, "right": 1.0} and recipe["experts"]["left"] == str(
        models.experts["left"]
    )
    merge_models(**load_recipe(tmp_path / "mapping" / RECIPE_FILE), output_dir=tmp_path / "recipe", progress=False)
    assert same(tmp_path / "argument", tmp_path / "mapping") and same(tmp_path / "argument", tmp_path / "recipe")


@pytest.mark.cases(5)
@every_method
def test_weights_of_one_are_no_weights_and_are_not_recorded(models, tmp_path, method):
    """Any others change every tensor that the experts change, of whatever kind."""
    alpha = {"alpha": None} if method in ("mean", "tsv-c") else {}
    merged(models, tmp_path / "plain", method=method, **alpha)
    merged(models, tmp_path / "ones", method=method, weights={"left": 1, "right": 1.0}, **alpha)
    merged(models, tmp_path / "other", method=method, weights={"left": 2}, **alpha)
    assert same(tmp_path / "plain", tmp_path / "ones")
    base, plain, other = (stored_tensors(folder) for folder in (models.base, tmp_path / "plain", tmp_path / "other"))
    changed = {name for name in plain if not torch.equal(plain[name], base[name])}
    same_as_plain = [plain[name].numel() for name in changed if torch.equal(plain[name], other[name])]
    # The biases of `esm-roberta` are the base's, and of `model-stock` all weights whose updates point apart.
    assert len(changed) >= (12 if "roberta" in method else 8 if method == "model-stock" else 15)
    # Of a short vector, these methods may drop all that one expert changed.
    assert same_as_plain == [] or (method in DROPPING and max(same_as_plain) < 50)
    assert "weights" not in yaml.safe_load((tmp_path / "ones" / RECIPE_FILE).read_text())


@pytest.mark.cases(8)
@every_method
def test_one_expert_is_merged_by_every_method(models, tmp_path, method):
    experts, calibration = {"left": models.experts["left"]}, {"left": text_samples(1)}
    arguments = {"alpha": None} if method in ("mean", "tsv-c") else {}
    merged(models, tmp_path / "m", experts=experts, calibration=calibration, method=method, **arguments)
    report = json.loads((tmp_path / "m" / REPORT).read_text())
    assert all(weight["norm"] < float("inf") for weight in report["weights"])
    assert all(tensor.isfinite().all() for tensor in stored_tensors(tmp_path / "m").values())
    if method == "mean":
        base, tuned = stored_tensors(models.base), stored_tensors(models.experts["left"])
        for name, tensor in stored_tensors(tmp_path / "m").items():
            assert relative_error(tensor - base[name], tuned[f"bert.{name}"] - base[name]) < 1e-4 or "pooler" in name
