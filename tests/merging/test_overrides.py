"""Overrides and α by kind of weight in whole merges: every weight is what its own rule makes of it."""

import pytest
import torch
import yaml

from hf_esm import METHODS, HfEsmError, load_recipe, merge_models
from hf_esm.architecture import weight_kinds
from hf_esm.checkpoints.layout import RECIPE_FILE
from hf_esm.merging.expert_statistics import _set_apart
from hf_esm.metrics import agreement_of, collect_answers
from hf_esm.planning import MergeOptions
from support import reference
from support.helpers import stored_tensors
from support.problems import relative_error
from support.refining_toys import LLAMA, samples_of
from support.routed_toys import tuned


TASKS = ("law", "code")
UNFIT = ("needs_samples", "routes", "chooses")  # for an override
SINGLE = [name for name in METHODS if not any(getattr(METHODS[name](), what) for what in UNFIT)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = LLAMA.build(num_hidden_layers=3)
    base.save_pretrained(folder / "base")
    for seed, task in enumerate(TASKS):
        expert, generator = tuned(base, seed, 0.15), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in (expert.get_input_embeddings().weight, expert.model.norm.weight):
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        expert.save_pretrained(folder / task)
    return folder


@pytest.fixture(scope="module")
def merged(models, tmp_path_factory):
    """A function that merges by some arguments, once, and returns the tensors and the result."""
    done = {}

    def merge(**options):
        key = repr(sorted(options.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("merged") / "m"
            calibration = {task: samples_of(task, 3, 12) for task in TASKS}
            given = {"calibration": calibration, "output_dir": folder, "progress": False, "refine": False, **options}
            result = merge_models(models / "base", {task: models / task for task in TASKS}, **given)
            done[key] = stored_tensors(folder), result
        return done[key]

    return merge


def parts(models, tensors, match):
    """The names of the tensors that a predicate selects, and the others."""
    selected = {name for name in tensors if match(name)}
    assert selected and selected < tensors.keys()
    return selected, tensors.keys() - selected


@pytest.mark.cases(6)
@pytest.mark.parametrize("method", SINGLE)
def test_each_weight_is_what_its_own_rule_makes_of_it(models, merged, method):
    """By every method as an override, with weights and α, beside another method."""
    weights = {"law": 0.5, "code": 2.0}
    found, result = merged(
        method="task-arithmetic",
        alpha=0.7,
        overrides=[{"match": "mlp.(up|down)", "method": method, "weights": weights, "alpha": 1.3}],
    )
    elsewhere, _ = merged(method="task-arithmetic", alpha=0.7)
    inside, _ = merged(method=method, alpha=1.3, weights=weights)
    base = stored_tensors(models / "base")
    selected, others = parts(models, found, lambda name: "mlp.up" in name or "mlp.down" in name)
    assert all(torch.equal(found[name], elsewhere[name]) for name in others)
    exponent = METHODS[method]().layer_exponent
    for name in selected:
        assert relative_error(found[name] - base[name], inside[name] - base[name]) < 1e-5, name
        assert not torch.allclose(found[name], elsewhere[name])
    if exponent:  # the scale between layers runs over the weights of one type
        assert any(report.layer_scale != 1 for report in result.weights)


@pytest.mark.parametrize("other", ["mean", "esm-roberta"])
def test_the_scale_between_layers_is_of_the_weights_that_one_method_merged(merged, other):
    """The formula, over the layers that the override leaves to the method of the merge."""
    _, result = merged(method="esm-vit", overrides=[{"match": r"layers.1\.", "method": other}])
    exponent = METHODS["esm-vit"]().layer_exponent
    ups = [report for report in result.weights if report.name.endswith("up_proj.weight")]
    norms = [report.norm for report in (ups[0], ups[2])]
    scales = [report.layer_scale for report in ups]
    assert scales[::2] == pytest.approx(reference.layer_scales(norms, exponent), rel=1e-6) and scales[1] == 1


def test_maps_that_share_inputs_are_stacked_only_if_they_are_merged_alike(merged):
    """A map of q, k and v with weights of its own is merged alone, and so are then the other two."""
    stacking = {"name": "esm", "stack_shared_inputs": True}
    alone, _ = merged(method=stacking, overrides=[{"match": "layers.0.*q_proj", "weights": {"law": 0.5}}])
    together, _ = merged(method=stacking)
    single, _ = merged(method="esm")
    changed = {name for name in alone if not torch.equal(alone[name], together[name])}
    assert changed == {name for name in alone if "layers.0.self_attn" in name and name[-13] in "qkv"}
    others = [name for name in changed if "q_proj" not in name]
    assert all(torch.equal(alone[name], single[name]) for name in others) and len(others) == 2


def test_an_embedding_is_merged_by_the_method_that_is_named_for_it(models, merged):
    found, result = merged(method="regmean", overrides=[{"kind": "embedding", "method": "mean"}])
    counted, _ = merged(method="regmean")
    base, name = stored_tensors(models / "base"), "model.embed_tokens.weight"
    mean = sum(stored_tensors(models / task)[name].double() for task in TASKS) / 2
    assert relative_error(found[name] - base[name], mean - base[name].double()) < 1e-5
    assert not torch.allclose(found[name], counted[name])
    assert {report.how for report in result.weights if report.kind == "embedding"} == {"mean"}


def test_a_method_of_an_override_brings_its_default_alpha(models, merged):
    entry = {"kind": "mlp", "method": "task-arithmetic"}
    usual, _ = merged(method="mean", overrides=[entry])
    given, _ = merged(method="mean", overrides=[{**entry, "alpha": 0.3}])
    by_kind, _ = merged(method="mean", overrides=[entry], alpha={"mlp": 0.6})
    base, name = stored_tensors(models / "base"), "model.layers.1.mlp.up_proj.weight"
    assert all(torch.equal(usual[n], given[n]) for n in usual)
    assert relative_error(by_kind[name] - base[name], 2 * (usual[name] - base[name])) < 1e-5


def test_alpha_by_kind_scales_all_weights_of_the_kind_and_no_others(models, merged):
    scales = {"attention": 0.5, "norm": 2.0, "embedding": 0.25}
    found, result = merged(method="task-arithmetic", alpha=scales)
    plain, _ = merged(method="task-arithmetic")
    base, kinds = stored_tensors(models / "base"), weight_kinds(LLAMA.build(num_hidden_layers=3))
    assert (result.alpha, result.alpha_by_kind) == (0.3, scales)
    for report in result.weights:
        name = report.name
        assert report.kind == kinds[name]
        usual = 0.3 if report.scaled else 1.0
        ratio = scales.get(report.kind, usual) / usual
        assert relative_error(found[name] - base[name], ratio * (plain[name] - base[name]).double()) < 1e-4, name
    assert "alpha 0.3, attention 0.5, norm 2, embedding 0.25" in str(result)


def test_alpha_by_kind_is_searched_one_kind_after_the_other(models, merged):
    """By brute force: no kind's α is better a step of the grid further on, with those of the others as chosen."""
    _, result = merged(method="task-arithmetic", alpha={"attention": "auto", "mlp": "auto", "norm": 0.5})
    assert result.chosen_by == "agreement" and result.alpha_by_kind["norm"] == 0.5 and result.alpha == 0.3
    assert "attention" in result.choice
    base, experts = LLAMA.build(num_hidden_layers=3), {}
    for task in ("base", *TASKS):
        experts[task] = type(base).from_pretrained(models / task).eval()
    apart = {t: _set_apart(samples_of(t, 3, 12), None, MergeOptions(), "halves")[1] for t in TASKS}
    answers = {t: collect_answers(experts[t], apart[t], progress=False) for t in TASKS}
    at_base = {t: agreement_of(experts["base"], answers[t]) for t in TASKS}

    def score(**changed):
        merged_at = merged(method="task-arithmetic", alpha={**result.alpha_by_kind, **changed})[1]
        model = merged_at.load_model().eval()
        return sum(agreement_of(model, answers[t]).gain_over(at_base[t]) for t in TASKS) / 2

    last, best = "mlp", score()
    chosen = result.alpha_by_kind[last]
    assert best >= max(score(**{last: round(chosen + step, 1)}) for step in (-0.1, 0.1) if chosen + step > 0.05)
    assert result.alpha_by_kind["attention"] != 0.3 or chosen != 0.3


def test_a_recipe_repeats_overrides_and_alphas(models, merged, tmp_path):
    entry = {"match": "self_attn", "method": {"name": "regmean", "off_diagonal": 0.5}, "weights": {"law": [1, 0.5]}}
    found, result = merged(method="mean", alpha={"mlp": 0.4}, overrides=[entry, {"kind": "norm", "alpha": 2}])
    path = result.output_dir / RECIPE_FILE
    recipe = yaml.safe_load(path.read_text())
    assert recipe["alpha"] == {"mlp": 0.4}
    assert recipe["overrides"][1] == {"kind": "norm", "alpha": 2.0}
    merge_models(**load_recipe(path), output_dir=tmp_path / "again", progress=False)
    again = stored_tensors(tmp_path / "again")
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert "names with 'self_attn': regmean" in (result.output_dir / "README.md").read_text()


def test_work_of_other_overrides_is_not_resumed(models, tmp_path, monkeypatch):
    calibration = {task: samples_of(task, 3, 4) for task in TASKS}
    given = {"calibration": calibration, "progress": False, "method": "regmean", "resume_dir": tmp_path / "work"}
    experts = {task: models / task for task in TASKS}

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("hf_esm.merging.run.write_weights", stop)
        with pytest.raises(KeyboardInterrupt):
            merge_models(models / "base", experts, output_dir=tmp_path / "m", **given)
    with pytest.raises(HfEsmError, match="`overrides`"):
        changed = [{"kind": "mlp", "alpha": 0.5}]
        merge_models(models / "base", experts, output_dir=tmp_path / "m", overrides=changed, **given)


def test_statistics_are_collected_if_the_method_of_an_override_needs_them(models, merged):
    _, result = merged(method="mean", overrides=[{"kind": "mlp", "method": "regmean"}])
    assert {report.how for report in result.weights if report.kind == "mlp"} == {"regmean"}
    experts = {task: models / task for task in TASKS}
    with pytest.raises(HfEsmError, match="calibration"):
        merge_models(models / "base", experts, method="mean", overrides=[{"kind": "mlp", "method": "regmean"}])
