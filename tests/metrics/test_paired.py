"""Tests and bounds of paired outcomes against SciPy's."""

import numpy as np
import pytest
from scipy import stats

from tinybert_jax.metrics.paired import Pairs, count_pairs, mcnemar, needed_examples, upper_bound


@pytest.mark.parametrize(
    ("fixed", "broken"), [(0, 0), (1, 0), (0, 7), (5, 5), (12, 3), (40, 61), (300, 250), (1, 2000)]
)
def test_mcnemar_is_the_exact_binomial_test(fixed, broken):
    num = fixed + broken
    expected = stats.binomtest(fixed, num, 0.5).pvalue if num else 1.0
    assert mcnemar(fixed, broken) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("count", "total"), [(0, 872), (1, 872), (5, 100), (99, 100), (100, 100)])
def test_the_bound_is_that_of_clopper_and_pearson(count, total):
    test = stats.binomtest(count, total, alternative="less")
    expected = test.proportion_ci(0.95, method="exact").high
    assert upper_bound(count, total) == pytest.approx(expected, rel=1e-9)


def test_the_fewest_examples():
    assert upper_bound(0, 872) == pytest.approx(0.0034, abs=5e-5)
    for limit in (0.5, 0.05, 0.005, 0.001):
        num = needed_examples(limit)
        assert upper_bound(0, num) <= limit < upper_bound(0, num - 1)


def test_counts():
    old = np.array([True, True, False, False, True])
    new = np.array([True, False, True, False, False])
    assert count_pairs(old, new) == Pairs(both=1, fixed=1, broken=2, neither=1)
    assert count_pairs(old, new).total == 5
