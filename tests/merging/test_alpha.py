"""The choice of α: found where the scores peak, and not led astray by what a few rows cannot tell."""

import json
from functools import partial

import pytest
import torch

from hf_esm import HfEsmError, merge_models
from hf_esm.merging.alpha import describe_alpha, search_alpha
from hf_esm.merging.contest import climb_alpha
from support.architectures import ARCHITECTURES
from support.helpers import perturbed, reloaded


@pytest.mark.parametrize("peak", [0.2, 0.7, 1.1, 1.9, 2.6])
def test_finds_the_peak(peak):
    alpha, scores = search_alpha(lambda a: 0.9 - 0.1 * (a - peak) ** 2)
    assert alpha == pytest.approx(peak)
    assert scores[alpha] == max(scores.values())


@pytest.mark.parametrize(("rows", "expected"), [(100, 1.0), (900, 1.3), (10**6, 1.6)])
def test_the_default_is_left_for_as_much_as_the_rows_can_tell(rows, expected):
    # One standard error at the best score of 0.9 is 0.03, 0.01 and 0.0003.
    alpha, _ = search_alpha(lambda a: 0.9 - 0.06 * (a - 1.6) ** 2, default=1.0, rows=rows)
    assert alpha == pytest.approx(expected)


def test_a_default_beyond_the_peak_is_left_downwards():
    alpha, _ = search_alpha(lambda a: 0.9 - 0.06 * (a - 0.4) ** 2, default=1.0, rows=900)
    assert alpha == pytest.approx(0.7)


@pytest.mark.parametrize(("score", "expected"), [(lambda a: a, 3.0), (lambda a: -a, 0.1), (lambda a: 0.5, 1.0)])
def test_the_ends_of_the_range_and_ties(score, expected):
    assert search_alpha(score)[0] == expected


@pytest.mark.parametrize("largest", [0.1, 1.0, 3.0, 5.0])
def test_the_search_goes_as_far_as_the_method_says(largest):
    for search in (search_alpha, partial(climb_alpha, start=1.0)):
        assert search(lambda alpha: alpha, largest=largest)[0] == largest
        best, scores = search(lambda alpha: -abs(alpha - 0.8 * largest), largest=largest)
        assert best == pytest.approx(0.8 * largest, abs=0.1 if largest < 5 else 0.25) and max(scores) <= largest


def test_a_merge_searches_alpha_as_far_as_its_method_says(tmp_path):
    base = ARCHITECTURES["bert"].build(num_hidden_layers=1)
    experts, calibration = {}, {}
    for seed, task in enumerate("ab"):
        experts[task] = perturbed(base, 0.05, seed)
        calibration[task] = ARCHITECTURES["bert"].samples(seed)
    largest = {}
    for method in ("esm", "esm-roberta"):
        scores = dict.fromkeys(
            experts, lambda model: float(model.encoder.layer[0].output.dense.weight.detach().norm())
        )
        options = {"calibration": calibration, "alpha": "auto", "score_fn": scores, "progress": False}
        largest[method] = merge_models(base, experts, method=method, **options).alpha
    assert largest == {"esm": 3.0, "esm-roberta": 5.0}


def test_a_score_that_is_no_number_is_no_best_and_nothing_but_such_is_refused():
    alpha, _ = search_alpha(lambda a: float("nan") if a < 1.5 else -a)
    assert alpha in (1.5, 1.6)
    with pytest.raises(HfEsmError, match="every score is NaN"):
        search_alpha(lambda a: float("nan"))


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_scored_is_what_is_written(whole, tmp_path):
    """Running means and variances are merged and scored, too."""
    architecture, seen = ARCHITECTURES["resnet"], {}
    base = architecture.build()
    experts = {f"t{i}": perturbed(base, 0.05, i) for i in range(2)}

    def score(model):
        seen[tuple(float(weight.float().sum()) for weight in model.state_dict().values())] = None
        return 1.0

    options = {"score_fn": score if whole else dict.fromkeys(experts, score), "output_dir": tmp_path / "merged"}
    merge_models(base, experts, method="task-arithmetic", alpha="auto", progress=False, **options)
    written = reloaded(base, tmp_path / "merged").float().state_dict().values()
    found = torch.tensor([list(sums) for sums in seen], dtype=torch.float64)
    expected = torch.tensor([float(weight.float().sum()) for weight in written], dtype=torch.float64)
    assert float((found - expected).abs().amax(1).min()) < 1e-4


SCORES = {0.4: 0.5, 0.7: 0.8, 1.0: 0.79}


@pytest.mark.parametrize(
    ("alpha", "within_error", "says"),
    [
        (0.7, False, "alpha 0.7 of 3 tried, the best"),
        (1.0, True, "alpha 1 of 3 tried: nearest to the default 1 within one standard error of the best, 0.7"),
        (0.7, True, "alpha 0.7 of 3 tried: nearest to the default 1 within one standard error of the best, 0.7"),
        (0.3, True, ""),
    ],
)
def test_the_rule_is_said_in_one_line(alpha, within_error, says):
    assert describe_alpha(alpha, SCORES, 1.0, within_error) == says


def test_where_alpha_comes_from_is_printed_and_in_the_card_and_the_report(tmp_path):
    base = ARCHITECTURES["bert"].build(num_hidden_layers=1)
    experts, seen = {f"t{i}": perturbed(base, 0.05, i) for i in range(2)}, []

    def score(model):
        seen.append(float(model.encoder.layer[0].output.dense.weight.detach().norm()))
        return -abs(len(seen) - 3)  # the third of 1, 0.7, 0.4, … is the best, whatever the model

    results, cards = {}, {}
    for name, alpha in {"default": None, "given": 0.5, "chosen": "auto"}.items():
        options = {"alpha": alpha, "score_fn": score if alpha == "auto" else None, "output_dir": tmp_path / name}
        results[name] = merge_models(base, experts, method="tsv-m", progress=False, **options)
        cards[name] = (tmp_path / name / "README.md").read_text()
    default = results["default"].alpha
    assert f"alpha {default:g} (the default)\n" in str(results["default"])
    assert f"α = {default:g} is the default." in cards["default"]
    assert f"alpha 0.5 (given; the default is {default:g})\n" in str(results["given"])
    assert f"α = 0.5 is given; the default is {default:g}." in cards["given"]
    found, report = results["chosen"], json.loads((tmp_path / "chosen" / "merge_report.json").read_text())
    tried = len(found.alpha_scores)
    assert found.alpha == 0.4 and found.evaluations == report["evaluations"] == tried < len(seen)
    assert report["alpha_default"] == default
    cost = f"{tried} merged models scored in {found.seconds['choosing']:.1f} s"
    text, card = str(found), cards["chosen"]
    assert "alpha 0.4 (chosen; the default is 1)\n" in text and f"  cost     {cost}\n" in text
    assert " 0.4 0.000 (chosen), " in text and ", 1 -2.000 (default), " in text
    assert f"{tried} merged models were scored for that." in card  # no time: a repeated merge has the same card
    assert f"alpha 0.4 of {tried} tried, the best" in card
    assert "| 0.4 | 0.000 | chosen |" in card and "| 1 | -2.000 | default |" in card


def test_scores_every_candidate_once():
    seen = []
    _, scores = search_alpha(lambda a: seen.append(a) or -abs(a - 1))
    assert len(seen) == len(set(seen)) == len(scores) <= 9
    assert min(seen) > 0 and max(seen) <= 3.0
