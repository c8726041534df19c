"""The choice among methods: halving, intervals, the table, and the promise that neither mean nor base is better."""

import json
import re
from math import inf, isnan

import pytest
import torch
from safetensors.torch import load_file

from hf_esm import HfEsmError, load_recipe, merge_models
from hf_esm.checkpoints import CARD_FILE, RECIPE_FILE, REPORT_FILE
from hf_esm.merging.contest import (
    Scored,
    Standing,
    finalists,
    first_alphas,
    first_share,
    nearest_as_good,
    search_nearby,
    winner_of,
)
from support.helpers import perturbed
from support.refining_toys import KINDS
from support.toys import LABELS, texts, write_models


def scored(values, higher_is_better=True):
    """The mean of numbers, one per row, by task."""
    tensors = {task: torch.tensor(numbers, dtype=torch.float64) for task, numbers in values.items()}
    return Scored(
        {task: len(numbers) for task, numbers in values.items()},
        lambda draws: torch.stack([tensors[task][draw].mean(1) for task, draw in draws.items()]).mean(0),
        higher_is_better,
    )


def test_a_candidate_is_compared_on_its_own_rows():
    best, other = scored({"a": [1, 1, 0, 0, 0, 0], "b": [1, 0, 0, 0]}), scored({"a": [0, 1, 0], "b": [0, 0]})
    behind, low, high = other.behind(best)
    assert other.score == pytest.approx((1 / 3 + 0) / 2)
    assert behind == pytest.approx((2 / 3 + 1 / 2) / 2 - other.score)  # on the first three rows of a, two of b
    assert low <= behind <= high and low < high
    assert best.behind(best) == (0, 0, 0)


def test_an_interval_holds_most_draws_of_rows():
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.rand(40, generator=generator) + 0.1 * i for i in range(2))
    _, low, high = scored({"a": one.tolist()}).behind(scored({"a": two.tolist()}))
    error = float((two - one).std() / 40**0.5)
    middle = float((two - one).mean())
    assert low == pytest.approx(middle - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(middle + 1.96 * error, abs=0.3 * error)


def test_no_number_is_the_worst():
    assert scored({"a": [float("nan"), 1.0]}).score == -inf
    assert not isnan(scored({"a": [1.0]}).behind(scored({"a": [float("nan")]}))[0])


def rows_around(mean, count=400, seed=0):
    """Numbers of a mean, and a standard deviation of 1."""
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scored({"a": (mean + (noise - noise.mean()) / noise.std()).tolist()})


@pytest.mark.parametrize(
    ("first", "later", "winner"), [(0.0, 0.04, 0), (0.0, 0.2, 1), (0.3, 0.2, 0), (-inf, -inf, 0), (-inf, 0.0, 1)]
)
def test_a_later_candidate_must_be_better_by_more_than_a_standard_error(first, later, winner):
    """Of independent numbers, the difference of two means of 400 has a standard error of 0.07."""
    assert winner_of([rows_around(first), rows_around(later, seed=1)]) == winner


@pytest.mark.parametrize(
    ("means", "left"),
    [((0.0, 0.3, 0.2, 0.1), [1, 2]), ((0.11, 0.3, 0.2, 0.1), [1, 2]), ((0.2, 0.3, 0.28), [0, 1])],
)
def test_the_best_two_are_scored_on_all_rows_and_the_first_unless_it_is_worse(means, left):
    """By two standard errors, of 0.07 each."""
    assert finalists([rows_around(mean, seed=i) for i, mean in enumerate(means)]) == left


@pytest.mark.parametrize(("rows", "share"), [({}, 1), ({"a": 31, "b": 400}, 1), ({"a": 32, "b": 400}, 0.25)])
def test_a_quarter_of_the_rows_is_enough_at_first_if_they_are_many(rows, share):
    assert first_share(rows) == share


def test_alpha_is_left_at_its_default_unless_the_rows_tell_the_difference():
    curve = {alpha: rows_around(-((alpha - 1.6) ** 2) / 10, seed=int(10 * alpha)) for alpha in (0.4, 1.0, 1.6, 2.2)}
    assert nearest_as_good(curve, default=1.0) == 1.0
    curve[1.0] = rows_around(-0.5)
    assert nearest_as_good(curve, default=1.0) == 1.6


@pytest.mark.parametrize(("default", "alphas"), [(1, [1, 0.6]), (0.3, [0.3, 0.2]), (2.0, [2.0, 1.2])])
def test_the_first_alphas_are_the_default_and_less(default, alphas):
    assert first_alphas(default, 3.0) == alphas


@pytest.mark.parametrize("best", [0.05, 0.4, 1.0, 1.65, 5.0])
def test_alpha_is_searched_nearby(best):
    found, scores = search_nearby(lambda alpha: -((alpha - best) ** 2), 1.0, 3.0)
    assert found == min((round(0.2 * i, 1) for i in range(1, 16)), key=lambda alpha: (alpha - best) ** 2)
    assert all(0.1 <= alpha <= 3.0 for alpha in scores) and scores[found] == max(scores.values())


def test_the_table_shows_errors_as_they_are():
    place = Standing.of("esm", "alpha 1", scored({"a": [-20.0, -22.0]}, False), scored({"a": [-10.0, -12.0]}, False))
    assert place.cells == ("esm", "alpha 1", "21.000", "2", "10.000 (10.000 to 10.000)")


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    models = write_models(tmp_path_factory.mktemp("classifiers"))
    return models / "base", {"a": models / "a", "b": models / "b"}


def merged(classifiers, output, **options):
    base, experts = classifiers
    calibration = {"a": texts(0, 64), "b": texts(1, 64)}
    return merge_models(base, experts, output_dir=output, **{"calibration": calibration, "progress": False} | options)


def labelled(count=36):
    return {
        task: [{"text": text, "label": i % len(LABELS[task])} for i, text in enumerate(texts(5 + j, count))]
        for j, task in enumerate("ab")
    }


NAMED = {"name": "auto", "methods": ["esm", "tsv-m", {"name": "ties", "density": 0.5}, "iso-c"]}


def test_the_method_is_chosen_from_those_that_are_named(classifiers, tmp_path):
    result = merged(classifiers, tmp_path / "first", method=NAMED)
    first, others = result.standings[0], result.standings[1:]
    assert result.chosen_by == "agreement" and result.plan.method.name == first.method
    assert {place.method for place in result.standings} == {"esm", "tsv-m", "ties", "iso-c", "mean", "base"}
    assert sum(place.rows == first.rows for place in result.standings) in (2, 3)
    assert all(place.behind >= 0 for place in others if place.method in ("mean", "base"))
    shown, card = str(result), (tmp_path / "first" / CARD_FILE).read_text()
    assert all(place.cells[2] in shown and " | ".join(place.cells) in card for place in result.standings)
    report = json.loads((tmp_path / "first" / REPORT_FILE).read_text())
    assert [place["method"] for place in report["standings"]] == [place.method for place in result.standings]
    merge_models(**load_recipe(tmp_path / "first" / RECIPE_FILE), output_dir=tmp_path / "again", progress=False)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_labelled_rows_choose_the_method_without_being_asked_for_alpha(classifiers, tmp_path):
    result = merged(classifiers, tmp_path / "out", method="auto", validation=labelled())
    assert result.chosen_by == "labels"
    assert {place.method for place in result.standings} == {"esm", "tsv-m", "iso-cts", "mean", "base"}
    assert result.scores.keys() == {"a", "b"}
    with pytest.raises(HfEsmError, match="`validation` has nothing for 'b'"):
        merged(classifiers, tmp_path / "lacking", validation={"a": labelled()["a"]})


def test_a_function_chooses_the_method_too(classifiers, tmp_path):
    result = merged(classifiers, tmp_path / "out", score_fn=lambda model: 1.0)
    assert result.chosen_by == "labels" and all(place.rows == 0 for place in result.standings)
    assert all(place.behind == 0 for place in result.standings)


@pytest.mark.parametrize("refine", [False, {"components": 2, "steps": 2, "batch_size": 2}])
def test_the_base_is_written_where_every_merge_is_worse(tmp_path, refine):
    """One expert answers nearly as the base does, which every step towards the other one ruins."""
    base = KINDS["llama"].build()
    base.save_pretrained(tmp_path / "base")
    for seed, (task, size) in enumerate({"near": 0.003, "far": 1.0}.items()):
        perturbed(base, size, seed).save_pretrained(tmp_path / task)
    calibration = {task: [{"input_ids": list(range(i, i + 6))} for i in range(50)] for task in ("near", "far")}
    result = merge_models(
        tmp_path / "base",
        {"near": tmp_path / "near", "far": tmp_path / "far"},
        calibration=calibration,
        method="auto",
        refine=refine,
        output_dir=tmp_path / "out",
        progress=False,
    )
    assert result.standings[0].method == "base" and result.alpha == 0
    assert any("The base scores higher than every merged model" in warning for warning in result.warnings)
    if not refine:
        found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base"))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        merge_models(**load_recipe(tmp_path / "out" / RECIPE_FILE), output_dir=tmp_path / "again", progress=False)
        again = load_file(tmp_path / "again" / "model.safetensors")
        assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("method", "words"), [("esm++", "writes experts"), ("concrete-adamerging", "learns"), ("auto", "chooses")]
)
def test_what_is_not_one_of_several_is_refused(classifiers, method, words):
    with pytest.raises(HfEsmError, match=re.escape(f"{method!r} {words}")):
        merged(classifiers, None, method={"name": "auto", "methods": ["esm", method]}, dry_run=True)
