"""Method and α chosen by agreement with the experts on samples apart from the statistics, and refining by default."""

import copy
import json
from math import inf

import pytest
import torch
from safetensors.torch import load_file

from hf_esm import HfEsmError, calibrate, merge_models
from hf_esm.data import sample_fingerprint
from hf_esm.merging.contest import climb_alpha
from hf_esm.merging.expert_statistics import _for_statistics, _set_apart
from hf_esm.metrics import agreement_of, collect_answers
from hf_esm.planning import MergeOptions
from support.refining_toys import KINDS, samples_of, with_mean_weights
from support.routed_toys import tuned
from support.toys import texts, write_models


TASKS = ("law", "code")


def samples(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(5, 900, (6,), generator=generator)} for _ in range(count)]


@pytest.mark.parametrize(
    ("count", "asked", "how", "learned"),
    [(64, None, "halves", 32), (20, None, "halves", 10), (100, None, "halves", 32), (1, None, "halves", 1)]
    + [(64, 10, "halves", 10), (20, None, "rest", 20), (50, None, "rest", 32), (40, 0, "halves", 40)],
)
def test_samples_are_split_without_overlap_whatever_their_order(count, asked, how, learned):
    rows, options = samples(count), MergeOptions(statistics_samples=asked)
    for_statistics, for_agreement = _set_apart(rows, None, options, how)
    assert (len(for_statistics), len(for_agreement)) == (learned, count - learned)
    marks = [{sample_fingerprint(row) for row in part} for part in (for_statistics, for_agreement)]
    assert not marks[0] & marks[1] and len(marks[0] | marks[1]) == count
    again = _set_apart(rows[::-1], None, options, how)
    assert [sample_fingerprint(row) for row in again[0]] == [sample_fingerprint(row) for row in for_statistics]
    other = _set_apart(rows, None, MergeOptions(statistics_samples=asked, seed=1), how)
    assert learned == count or {sample_fingerprint(row) for row in other[0]} != marks[0]


def test_without_agreement_at_most_32_samples_are_read():
    assert [_for_statistics(MergeOptions(num_samples=n)).num_samples for n in (64, 8, 0)] == [32, 8, 32]
    assert _for_statistics(MergeOptions(num_samples=0, statistics_samples=0)).num_samples == 0
    assert _for_statistics(MergeOptions(statistics_samples=40)).num_samples == 40


@pytest.mark.parametrize("best", [0.05, 0.4, 1.0, 1.7, 2.9, 5.0])
@pytest.mark.parametrize("start", [0.3, 1.0, 2.0])
def test_alpha_is_climbed_to_the_best_of_the_grid(best, start):
    found, scores = climb_alpha(lambda alpha: -((alpha - best) ** 2), start)
    grid = [round(0.1 * i, 1) for i in range(1, 31)]
    assert found == max(grid, key=lambda alpha: -((alpha - best) ** 2))
    assert len(scores) < 20 and all(alpha in grid for alpha in scores)


def test_alpha_stays_where_no_score_is_a_number():
    assert climb_alpha(lambda alpha: -inf, 1.0)[0] == 1.0


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def language(request, tmp_path_factory):
    """A base, and two experts with trained, tied embeddings, in memory and on disk."""
    folder = tmp_path_factory.mktemp(request.param)
    base = KINDS[request.param].build(tie_word_embeddings=True)
    experts = {task: tuned(base, seed, 0.15) for seed, task in enumerate(TASKS)}
    with torch.no_grad():
        for seed, expert in enumerate(experts.values()):
            noise = torch.randn(
                expert.get_input_embeddings().weight.shape, generator=torch.Generator().manual_seed(seed)
            )
            expert.get_input_embeddings().weight.add_(0.1 * noise)
    base.save_pretrained(folder / "base")
    for task, expert in experts.items():
        expert.save_pretrained(folder / task)
    return folder, base, experts


def merged(language, output, **options):
    folder, _, _ = language
    calibration = {task: samples_of(task, 3, 24) for task in TASKS}
    given = {"calibration": calibration, "output_dir": output, "progress": False, **options}
    return merge_models(folder / "base", {task: folder / task for task in TASKS}, **given)


SMALL = {"components": 4, "steps": 12, "batch_size": 2}


def test_the_default_of_models_that_write_is_chosen_refined_and_repeated(language, tmp_path):
    result = merged(language, tmp_path / "first", refine=SMALL)
    assert result.plan.method.name in ("regmean", "esm", "mean") and result.chosen_by == "agreement"
    assert result.agreement.keys() == set(TASKS) and result.refined
    assert min(result.refined.values()) <= result.refined[0]
    assert "by agreement" in result.choice and result.choice in str(result)
    report = json.loads((tmp_path / "first" / "merge_report.json").read_text())
    assert report["chosen_by"] == "agreement" and report["agreement"].keys() == set(TASKS)
    assert "refined" in (tmp_path / "first" / "README.md").read_text()
    again = merged(language, tmp_path / "again", refine=SMALL)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again"))
    assert again.alpha == result.alpha and all(torch.equal(one[name], other[name]) for name in one)


def test_a_refined_model_is_plain_and_its_adapter_the_same_model(language, tmp_path):
    from peft import PeftModel

    folded = merged(language, tmp_path / "folded", method="regmean", refine=SMALL)
    merged(language, tmp_path / "kept", method="regmean", refine={**SMALL, "keep_adapter": True})
    _, base, _ = language
    plain, root = (type(base).from_pretrained(tmp_path / name).eval() for name in ("folded", "kept"))
    adapted = PeftModel.from_pretrained(root, str(tmp_path / "kept"), subfolder="refined").eval()
    ids = torch.stack([sample["input_ids"][:4] for sample in samples_of("law", 9, 4)])
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, adapted(ids).logits, atol=1e-5)
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert folded.refined


def test_alpha_by_agreement_is_the_best_of_its_neighbours(language, tmp_path):
    """By brute force: models at other α agree less with the experts, on the samples that the merge set apart."""
    _, base, experts = language
    result = merged(language, tmp_path / "auto", method="task-arithmetic", alpha="auto")
    assert result.chosen_by == "agreement"
    apart = {t: _set_apart(samples_of(t, 3, 24), None, MergeOptions(), "halves")[1] for t in TASKS}
    answers = {t: collect_answers(experts[t], apart[t], progress=False) for t in TASKS}
    at_base = {t: agreement_of(base, answers[t]) for t in TASKS}

    def score(alpha):
        merged(language, tmp_path / f"{alpha}", method="task-arithmetic", alpha=alpha)
        model = type(base).from_pretrained(tmp_path / f"{alpha}").eval()
        return sum(agreement_of(model, answers[t]).gain_over(at_base[t]) for t in TASKS) / 2

    scores = {alpha: score(alpha) for alpha in (result.alpha - 0.1, result.alpha, result.alpha + 0.1) if alpha > 0.05}
    assert max(scores, key=scores.get) == result.alpha
    assert scores[result.alpha] == pytest.approx(result.alpha_scores[result.alpha], abs=1e-4)


def test_embeddings_are_counted_by_every_method_that_has_samples(language, tmp_path):
    _, base, experts = language
    merged(language, tmp_path / "averaged", method="tsv-m", calibration=None)
    found = type(base).from_pretrained(tmp_path / "averaged").get_input_embeddings().weight
    mean = with_mean_weights(base, list(experts.values())).get_input_embeddings().weight
    assert torch.allclose(found, mean, atol=1e-6)
    result = merged(language, tmp_path / "counted", method="tsv-m")
    assert "counts" in {report.how for report in result.weights}


def test_statistics_alone_leave_method_and_alpha_fixed(language, tmp_path, caplog):
    folder, _, _ = language
    statistics = {task: calibrate(folder / task, samples_of(task, 3, 8), progress=False) for task in TASKS}
    result = merged(language, tmp_path / "fixed", calibration=statistics)
    assert (result.plan.method.name, result.alpha, result.chosen_by) == ("regmean", 1.0, "default")
    assert any("agreement" in warning for warning in result.warnings) and not result.refined
    with pytest.raises(HfEsmError, match="refine"):
        merged(language, tmp_path / "refused", calibration=statistics, refine=True)
    assert not (tmp_path / "refused").exists()


def test_samples_beside_statistics_serve_agreement_unless_they_made_the_statistics(language, tmp_path):
    folder, _, _ = language
    rows = {task: samples_of(task, 3, 24) for task in TASKS}
    seen = {task: calibrate(folder / task, rows[task][:16], progress=False) for task in TASKS}
    for task, statistics in seen.items():
        statistics.save(tmp_path / f"{task}.safetensors")
        left = _set_apart(rows[task], statistics, MergeOptions(), "halves")[1]
        known = {sample_fingerprint(row) for row in rows[task][:16]}
        assert not {sample_fingerprint(row) for row in left} & known
    both = {t: {"statistics": str(tmp_path / f"{t}.safetensors"), "samples": rows[t]} for t in TASKS}
    result = merged(language, tmp_path / "both", calibration=both, method="regmean", alpha="auto")
    assert result.chosen_by == "agreement"


def test_a_task_below_the_base_is_named(language, tmp_path):
    """Far off in the wrong direction, both tasks agree less with their experts than the base does."""
    result = merged(language, tmp_path / "far", method="task-arithmetic", alpha=-20.0, refine={**SMALL, "steps": 1})
    assert all(any(f"'{task}'" in warning for warning in result.warnings) for task in TASKS)
    assert any("base agrees more" in warning for warning in result.warnings)


def test_classifiers_keep_esm_at_its_alpha_and_can_be_chosen_by_agreement(tmp_path):
    models = write_models(tmp_path)
    calibration = {"a": texts(0, 24), "b": texts(1, 24)}
    given = {"calibration": calibration, "progress": False}
    plain = merge_models(models / "base", {"a": models / "a", "b": models / "b"}, **given)
    assert (plain.plan.method.name, plain.alpha, plain.chosen_by, plain.agreement) == ("esm", 1.0, "default", {})
    chosen = merge_models(models / "base", {"a": models / "a", "b": models / "b"}, alpha="auto", **given)
    assert chosen.chosen_by == "agreement" and copy.copy(chosen.agreement).keys() == {"a", "b"}


def test_auto_may_be_written_as_settings(language, tmp_path):
    result = merged(language, tmp_path / "named", method={"name": "auto"}, refine=False)
    assert result.chosen_by == "agreement" and not result.refined


def test_a_plan_names_the_methods_that_it_will_choose_from(language):
    plan = merged(language, None, dry_run=True)
    assert str(plan).startswith("regmean or esm merge of 2 experts")
    assert str(merged(language, None, dry_run=True, method="esm++")).startswith("esm++ (over regmean or esm) merge")
    assert str(merged(language, None, dry_run=True, method="tsv-m")).startswith("tsv-m merge")


@torch.no_grad()
def rows_written_by(result, count=80, length=20):
    """Rows of token ids drawn from what a merged model writes, so that its likelihood of them is the highest."""
    model, generator = result.load_model().eval(), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (count, 1), generator=generator)
    while ids.shape[1] < length:
        ids = torch.cat([ids, torch.multinomial(model(ids).logits[:, -1].softmax(-1), 1, generator=generator)], 1)
    return {task: [{"input_ids": row.tolist()} for row in rows] for task, rows in zip(TASKS, ids.chunk(2))}


@pytest.mark.parametrize("language", ["llama"], indirect=True)
def test_labels_choose_among_all_methods_and_the_line_says_what_agreement_would_choose(language, tmp_path):
    folder, _, _ = language
    calibration = {}
    for task in TASKS:
        rows = samples_of(task, 3, 24)
        calibration[task] = {"statistics": calibrate(folder / task, rows[:10], progress=False), "samples": rows}
    given = {"calibration": calibration, "refine": False}
    by_agreement = merged(language, tmp_path / "agreement", **given, alpha="auto")
    chosen = f"{by_agreement.plan.method.name} at alpha {by_agreement.alpha:g}"
    assert by_agreement.chosen_by == "agreement" and by_agreement.plan.method.name != "mean"
    writers = {"same": by_agreement}
    for name, alpha in {"mean": None, "esm": 1.6}.items():
        writers[name] = merged(language, tmp_path / name, **given, method=name, alpha=alpha)
    for name, writer in writers.items():
        labelled = {"alpha": "auto", "metric": "perplexity", "validation": rows_written_by(writer)}
        result = merged(language, tmp_path / f"by {name}", **given, **labelled)
        assert (result.chosen_by, result.plan.method.name) == ("labels", writer.plan.method.name)
        assert result.alpha == pytest.approx(writer.alpha, abs=0.11)
        says = "chooses the same" if name == "same" else f"would choose {chosen}"
        of_experts = "agreement with the experts" if name == "same" else "agreement"
        assert result.choice.startswith(f"by labelled rows: {writer.plan.method.name} ")
        assert f"; {of_experts} {says}" in result.choice
        rule = f"; alpha {result.alpha:g} of {len(result.alpha_scores)} tried"
        assert (rule in result.choice) == bool(result.alpha_scores) == ("by alpha" in str(result))
        assert result.choice in str(result) and result.agreement.keys() == set(TASKS)
