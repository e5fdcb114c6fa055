"""Confidence intervals and pass@k against numbers known from elsewhere."""

import itertools
import math
import random

import pytest

from finchtune.evaluation.summary import pass_at, share, weighted_mean, wilson


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # R: prop.test(right, n, correct = FALSE)$conf.int, or the formula's limits at 0 and n.
    [(8, 10, 0.4901625, 0.9433178), (0, 10, 0.0, 0.2775328), (10, 10, 0.7224672, 1.0)],
)
def test_wilson_interval(right, n, low, high):
    assert wilson(right / n, n) == pytest.approx((low, high), abs=1e-6)


def test_interval_holds_the_share():
    for n in (1, 2, 7, 1319):
        for right in range(n + 1):
            found = share([True] * right + [False] * (n - right))
            assert 0 <= found["low"] <= found["rate"] <= found["high"] <= 1
            assert (found["right"], found["of"]) == (right, n)


def test_pass_at_k_counts_subsets():
    for n, right, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 5, 2), (4, 4, 4)):
        answers = [i < right for i in range(n)]
        subsets = list(itertools.combinations(answers, k))
        assert pass_at(k, n, right) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_interval_of_a_weighted_mean_covers_the_truth():
    """About 95 of 100 intervals of random documents hold the mean they were drawn around."""
    rng = random.Random(0)
    covered = 0
    for _ in range(300):
        weights = [rng.randint(5, 50) for _ in range(80)]
        sums = [w * rng.gauss(2.0, 0.5) for w in weights]
        mean, low, high = weighted_mean(sums, weights)
        assert mean == pytest.approx(sum(sums) / sum(weights))
        covered += low <= 2.0 <= high
    assert 0.90 <= covered / 300 <= 0.99
    assert weighted_mean([6.0], [3]) == (2.0, 2.0, 2.0)
    assert not math.isnan(weighted_mean([1.0, 1.0], [1, 1])[1])
