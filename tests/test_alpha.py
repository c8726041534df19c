"""The choice of α: found where the scores peak, and not led astray by one lucky score."""

import pytest

from hf_esm.alpha import search_alpha


@pytest.mark.parametrize("peak", [0.2, 0.7, 1.1, 1.9, 2.6])
def test_finds_the_peak(peak):
    alpha, scores = search_alpha(lambda a: 0.9 - 0.1 * (a - peak) ** 2)
    assert alpha == pytest.approx(peak)
    assert scores[alpha] == max(scores.values())


def test_one_lucky_score_does_not_decide():
    alpha, scores = search_alpha(lambda a: 0.9 - 0.1 * (a - 1.0) ** 2 + (0.02 if a == 1.4 else 0))
    assert max(scores, key=scores.get) == 1.4
    assert abs(alpha - 1.0) <= 0.11


@pytest.mark.parametrize(("score", "expected"), [(lambda a: a, 3.0), (lambda a: -a, 0.1), (lambda a: 0.5, 0.1)])
def test_the_ends_of_the_range_and_ties(score, expected):
    assert search_alpha(score)[0] == expected


def test_scores_every_candidate_once():
    seen = []
    _, scores = search_alpha(lambda a: seen.append(a) or -abs(a - 1))
    assert len(seen) == len(set(seen)) == len(scores) < 20
    assert min(seen) > 0 and max(seen) <= 3.0
