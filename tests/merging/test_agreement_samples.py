"""Which samples statistics are taken from, and which are left for agreement with the experts."""

import random
from functools import partial

import pytest
import torch
import yaml

from hf_esm import HfEsmError, calibrate, merge_models
from hf_esm.checkpoints import RECIPE_FILE, Access, resolve_source
from hf_esm.data import sample_fingerprint, save_samples
from hf_esm.merging.expert_statistics import Needs, gather_statistics
from hf_esm.planning import MergeData, MergeOptions, load_recipe
from support.refining_toys import TASKS, plan_of
from support.tiny import LLAMA
from support.toys import weights


AGREEMENT = Needs(statistics=True, agreement="halves")
merge = partial(merge_models, progress=False)


def samples(seed, count):
    """Different token ids of differing lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 60, (4 + i % 5,), generator=generator)} for i in range(count)]


def prints(rows):
    return [sample_fingerprint(row) for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and two experts on disk."""
    folder = tmp_path_factory.mktemp("models")
    base = LLAMA.build()
    base.save_pretrained(folder / "base")
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        expert = LLAMA.build()
        with torch.no_grad():
            for weight, start in zip(expert.parameters(), base.parameters(), strict=True):
                weight.copy_(start + 0.1 * torch.randn_like(weight))
        expert.save_pretrained(folder / task)
    return folder


def models(folder):
    return folder / "base", {task: folder / task for task in TASKS}


@pytest.fixture(scope="module")
def plan(folder):
    base, experts = models(folder)
    return plan_of(base, experts)


@pytest.fixture
def gather(plan, folder):
    """The fingerprints of each task's samples for statistics and for agreement."""

    def gathered(calibration, needs=AGREEMENT, **options):
        sources = {task: resolve_source(folder / task, task, Access()) for task in TASKS}
        found = gather_statistics(
            plan, sources, MergeData(calibration), dict.fromkeys(TASKS), MergeOptions(**options), needs
        )
        parts = (found.samples, found.agreement_samples)
        return [{task: prints(rows) for task, rows in part.items()} for part in parts]

    return gathered


COUNTS = {  # samples and options: for statistics, for agreement
    "sixty-four": (64, {}, 32, 32),
    "all of eighty": (80, {"num_samples": 0}, 32, 48),
    "sixty-four of eighty": (80, {}, 32, 32),
    "forty": (40, {}, 20, 20),
    "seven": (7, {}, 4, 3),
    "more for statistics": (64, {"statistics_samples": 40}, 40, 24),
    "fewer for statistics": (64, {"statistics_samples": 8}, 8, 56),
}


@pytest.mark.parametrize(("count", "options", "learned", "apart"), COUNTS.values(), ids=COUNTS)
def test_samples_are_split(gather, count, options, learned, apart):
    rows = {task: samples(seed, count) for seed, task in enumerate(TASKS)}
    found = gather(rows, **options)
    for task in TASKS:
        first, second = (part[task] for part in found)
        assert (len(first), len(second)) == (learned, apart)
        assert not set(first) & set(second)
        assert set(first) | set(second) <= set(prints(rows[task]))


def test_the_split_depends_on_the_seed_and_not_on_the_order(gather):
    rows = {task: samples(seed, 64) for seed, task in enumerate(TASKS)}
    shuffled = {task: random.Random(5).sample(rows[task], 64) for task in TASKS}
    assert gather(shuffled) == gather(rows)
    assert gather(rows, seed=1) != gather(rows)


def test_a_sample_that_is_given_twice_is_on_one_side(gather):
    rows = {task: [*samples(seed, 20), *samples(seed, 20)] for seed, task in enumerate(TASKS)}
    first, second = gather(rows, num_samples=0)
    assert all(second[task] and not set(first[task]) & set(second[task]) for task in TASKS)


def test_without_agreement_the_samples_are_those_that_calibrate_takes(gather, folder):
    rows = {task: samples(seed, 50) for seed, task in enumerate(TASKS)}
    learned, apart = gather(rows, Needs(statistics=True), seed=3)
    assert apart == {}
    for task in TASKS:
        statistics = calibrate(folder / task, rows[task], num_samples=32, seed=3, progress=False)
        assert tuple(sorted(learned[task])) == statistics.provenance.samples
    everything, _ = gather(rows, Needs(statistics=True), num_samples=0, statistics_samples=0)
    assert [len(everything[task]) for task in TASKS] == [50, 50]
    few, _ = gather(rows, Needs(statistics=True), statistics_samples=6)
    assert [len(few[task]) for task in TASKS] == [6, 6]


def test_one_task_without_samples_for_agreement_leaves_all_samples_to_statistics(gather):
    """As if agreement were not used, so that the recipe, which names a method, repeats the merge."""
    rows = {"law": samples(0, 50), "code": samples(1, 1)}
    assert gather(rows, seed=2) == gather(rows, Needs(statistics=True), seed=2)


def test_samples_that_statistics_were_made_from_do_not_serve_agreement(gather, folder, tmp_path):
    rows = {task: samples(seed, 24) for seed, task in enumerate(TASKS)}
    calibration = {}
    for task in TASKS:
        statistics = calibrate(folder / task, rows[task][:10], progress=False)
        path = statistics.save(tmp_path / f"{task}.safetensors")
        calibration[task] = {"statistics": str(path) if task == "law" else statistics, "samples": rows[task]}
    learned, apart = gather(calibration)
    assert learned == {}
    assert apart == {task: prints(rows[task][10:]) for task in TASKS}
    only = {task: {**calibration[task], "samples": rows[task][:10]} for task in TASKS}
    assert gather(only) == [{}, {}]


def test_statistics_beside_the_weights_leave_all_other_samples_to_agreement(gather, folder):
    rows = {task: samples(seed, 24) for seed, task in enumerate(TASKS)}
    places = [calibrate(folder / task, rows[task][:10], progress=False).save(folder / task) for task in TASKS]
    try:
        assert gather(rows) == [{}, {task: prints(rows[task][10:]) for task in TASKS}]
        learned, _ = gather(rows, Needs(statistics=True))
        assert learned == {task: prints(rows[task]) for task in TASKS}  # samples go before a file that is not named
    finally:
        for path in places:
            path.unlink()


def test_statistics_alone_leave_the_first_method_and_its_alpha(folder, tmp_path):
    base, experts = models(folder)
    for task in TASKS:
        calibrate(folder / task, samples(0, 8), progress=False).save(tmp_path / f"{task}.safetensors")
    result = merge(base, experts, calibration=str(tmp_path))
    assert (result.plan.method.name, result.alpha) == ("regmean", result.plan.method.default_alpha)
    assert (result.chosen_by, result.agreement, result.refined) == ("default", {}, {})
    assert any("not chosen by agreement" in warning for warning in result.warnings)
    fixed = merge(base, experts, calibration=str(tmp_path), method="esm", alpha="auto")
    assert fixed.alpha == fixed.plan.method.default_alpha
    assert any("not chosen by agreement" in warning for warning in fixed.warnings)


FEW = {
    "statistics alone": lambda folder, place: str(place),
    "no samples": lambda folder, place: None,
    "one sample left": lambda folder, place: {"law": samples(0, 8), "code": samples(1, 3)},
}


@pytest.mark.parametrize("calibration", FEW.values(), ids=FEW)
def test_refining_that_was_asked_for_needs_samples_before_long_work(folder, tmp_path, calibration, monkeypatch):
    base, experts = models(folder)
    for task in TASKS:
        calibrate(folder / task, samples(0, 8), progress=False).save(tmp_path / f"{task}.safetensors")
    monkeypatch.setattr("hf_esm.merging.run.check_values", lambda *_: pytest.fail("read weights before the check"))
    with pytest.raises(HfEsmError, match=r"'(law|code)'.*`refine` needs two samples|has no `calibration`"):
        merge(base, experts, calibration=calibration(folder, tmp_path), method="esm", refine=True)


def test_refining_by_default_is_left_out_with_a_warning_where_samples_are_few(folder):
    base, experts = models(folder)
    result = merge(base, experts, calibration={"law": samples(0, 8), "code": samples(1, 3)})
    assert result.refined == {}
    assert result.chosen_by == "agreement"
    assert any("'code' has one sample" in warning for warning in result.warnings)
    single = merge(base, experts, calibration={"law": samples(0, 8), "code": samples(1, 1)})
    assert (single.chosen_by, single.refined) == ("default", {})
    assert any("not chosen by agreement" in warning for warning in single.warnings)


@pytest.mark.cases(4)
@pytest.mark.parametrize("refine", [None, False, {"steps": 2, "components": 4}], ids=["default", "off", "settings"])
@pytest.mark.parametrize("kind", ["rows", "both", "beside the weights", "kept", "file"])
def test_the_recipe_repeats_a_merge_whose_samples_were_split(folder, tmp_path, kind, refine):
    base, experts = models(folder)
    rows = {task: samples(seed, 16) for seed, task in enumerate(TASKS)}
    calibration, options, beside = rows, {}, []
    if kind == "both":
        calibration = {
            task: {"statistics": calibrate(experts[task], rows[task][:6], progress=False), "samples": rows[task]}
            for task in TASKS
        }
    if kind == "beside the weights":
        beside = [calibrate(experts[task], rows[task][:6], progress=False).save(experts[task]) for task in TASKS]
    if kind == "kept":
        options = {"statistics_dir": tmp_path / "kept"}
    if kind == "file":
        for task in TASKS:
            save_samples(rows[task], tmp_path / f"{task}.safetensors")
        calibration = {task: str(tmp_path / f"{task}.safetensors") for task in TASKS}
    try:
        steps = {"refine": {"steps": 3}} if refine is None else {"refine": refine}
        first = merge(base, experts, calibration=calibration, output_dir=tmp_path / "first", **steps, **options)
        again = merge(**load_recipe(tmp_path / "first" / RECIPE_FILE), output_dir=tmp_path / "again")
    finally:
        for path in beside:
            path.unlink()
    assert again.chosen_by == "default"
    assert again.plan.method == first.plan.method
    assert again.refined == first.refined
    found, expected = weights(tmp_path / "again"), weights(tmp_path / "first")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_recipe_names_statistics_and_samples_by_relative_paths(folder, tmp_path):
    base, experts = models(folder)
    for task in TASKS:
        rows = samples(TASKS.index(task), 12)
        calibrate(experts[task], rows[:6], progress=False).save(tmp_path / f"{task}-statistics.safetensors")
        save_samples(rows, tmp_path / f"{task}-samples.safetensors")
    both = {
        task: {"statistics": f"{task}-statistics.safetensors", "samples": f"{task}-samples.safetensors"}
        for task in TASKS
    }
    recipe = {"base": str(base), "experts": {t: str(e) for t, e in experts.items()}, "calibration": both}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"method": "regmean", "alpha": "auto"}))
    result = merge(**load_recipe(tmp_path / "recipe.yaml"))
    assert result.chosen_by == "agreement"
    assert result.agreement.keys() == set(TASKS)
