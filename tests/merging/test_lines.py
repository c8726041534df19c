"""LiNeS in whole merges: every scale is the literal formula of its block, by every way of merging."""

import re

import pytest
import torch
import yaml

from hf_esm import HfEsmError, load_recipe, merge_models
from hf_esm.checkpoints.layout import CARD_FILE, RECIPE_FILE
from support import reference
from support.helpers import stored_tensors
from support.problems import relative_error
from support.refining_toys import LLAMA, samples_of
from support.routed_toys import tuned


TASKS = ("law", "code")
BLOCKS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = LLAMA.build(num_hidden_layers=BLOCKS)
    base.save_pretrained(folder / "base")
    for seed, task in enumerate(TASKS):
        expert = tuned(base, seed, 0.15)
        with torch.no_grad():
            for weight in (expert.get_input_embeddings().weight, expert.model.norm.weight):
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
        expert.save_pretrained(folder / task)
    return folder


def merge(models, **options):
    given = {"calibration": {task: samples_of(task, 3, 12) for task in TASKS}, "progress": False, "refine": False}
    return merge_models(models / "base", {task: models / task for task in TASKS}, **{**given, **options})


def place(name):
    block = re.search(r"layers\.(\d+)\.", name)
    return int(block[1]) / (BLOCKS - 1) if block else 0.0


def updates_of(models, result):
    base, found = stored_tensors(models / "base"), stored_tensors(result.output_dir)
    return {name: found[name].double() - base[name].double() for name in found}


@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "esm-vit", "tsv-m"])
@pytest.mark.parametrize("weights", [None, {"law": 0.5, "code": -1.5}])
def test_the_published_scale_is_the_formula(models, method, weights):
    """Against a merge without LiNeS at α = 1, β included; weights that α does not scale stay as they are."""
    plain = merge(models, method=method, alpha=1.0, weights=weights)
    found = merge(models, method=method, alpha=0.7, weights=weights, lines=True)
    unscaled = {report.name for report in plain.weights if not report.scaled}
    merged, lines = updates_of(models, plain), updates_of(models, found)
    base = stored_tensors(models / "base")
    experts = [stored_tensors(models / task) for task in TASKS]
    factors = list((weights or dict.fromkeys(TASKS, 1.0)).values())
    scaled = [report.name for report in plain.weights if report.scaled and report.how != "unchanged"]
    sums = {n: sum(w * (e[n].double() - base[n].double()) for w, e in zip(factors, experts)) for n in scaled}
    smallest = reference.lines([sums[n] for n in scaled], [merged[n] for n in scaled], len(TASKS))
    for name in merged:
        scale = 1.0 if name in unscaled else smallest + 0.7 * place(name)
        if merged[name].any():
            assert relative_error(lines[name], scale * merged[name]) < 1e-4, name
    if method == "task-arithmetic" and weights is None:
        assert smallest == pytest.approx(0.5, rel=1e-6)


def test_end_points_are_factors_of_alpha_and_compose_with_kinds_and_overrides(models):
    rules = {"alpha": {"mlp": 0.4}, "overrides": [{"match": "v_proj", "alpha": 2.0}]}
    plain = updates_of(models, merge(models, method="task-arithmetic", **rules))
    found = merge(models, method="task-arithmetic", lines={"first": 0.5, "last": "1.5"}, **rules)
    lines, unscaled = updates_of(models, found), {report.name for report in found.weights if not report.scaled}
    for name in plain:
        scale = 1.0 if name in unscaled else 0.5 + place(name)
        if plain[name].any():
            assert relative_error(lines[name], scale * plain[name]) < 1e-4, name
    assert "depth    scaled by depth (LiNeS) from 0.5 to 1.5 times alpha" in str(found)
    assert "scaled by depth (LiNeS) from 0.5 to 1.5 times alpha" in (found.output_dir / CARD_FILE).read_text()


def test_a_recipe_repeats_lines_and_alpha_is_searched_with_it(models, tmp_path):
    result = merge(models, method="tsv-m", alpha="auto", lines=True, output_dir=tmp_path / "merged")
    path = tmp_path / "merged" / RECIPE_FILE
    assert yaml.safe_load(path.read_text())["lines"] is True and result.chosen_by == "agreement"
    merge_models(**load_recipe(path), output_dir=tmp_path / "again", progress=False)
    found, again = stored_tensors(tmp_path / "merged"), stored_tensors(tmp_path / "again")
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_what_has_no_alpha_is_refused_and_the_remedy_works(models):
    with pytest.raises(HfEsmError, match=r"`lines`: mean has no alpha .* Use 'task-arithmetic' or another method"):
        merge(models, method="mean", lines=True, dry_run=True)
    assert "depth      scaled by depth (LiNeS)" in str(
        merge(models, method="task-arithmetic", lines=True, dry_run=True)
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"first": 1}, "'last' is missing. Give both end points, or true"),
        ({"fist": 1, "last": 2}, "there is no setting 'fist' (did you mean 'first'?)"),
        ({"first": "low", "last": 2}, "`lines`: first must be a finite number, not 'low'"),
        (3, "`lines` must be true or false or a mapping"),
    ],
)
def test_other_values_are_refused(models, value, message):
    with pytest.raises(HfEsmError, match=re.escape(message)):
        merge(models, method="tsv-m", lines=value)
