from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from weightproof.guards.multiple_testing import benjamini_hochberg, bonferroni, exponential_tail_p


def two_sided_p(z: float) -> float:
    return math.erfc(abs(z) / math.sqrt(2))


def test_four_families_benjamini_hochberg_keeps_three_and_bonferroni_one():
    p_values = [two_sided_p(z) for z in (2.576, 2.326, 2.17, 1.8)]
    assert p_values == pytest.approx([0.010, 0.020, 0.030, 0.072], abs=5e-4)
    assert benjamini_hochberg(p_values, 0.05) == (True, True, True, False)
    assert bonferroni(p_values, 0.05) == (True, False, False, False)


def test_tail_of_the_gaussian():
    assert two_sided_p(2.5) == pytest.approx(0.0124, abs=1e-4)
    draws = np.random.default_rng(0).standard_normal(200_000)
    assert float(np.mean(np.abs(draws) >= 2.5)) == pytest.approx(two_sided_p(2.5), abs=0.01)


def test_halving_one_p_value_never_lowers_the_number_of_rejections():
    draws = np.random.default_rng(1).beta(0.3, 3.0, size=(200, 12))
    for p_values in draws:
        before = sum(benjamini_hochberg(list(p_values), 0.05))
        for index in range(len(p_values)):
            halved = p_values.copy()
            halved[index] /= 2
            assert sum(benjamini_hochberg(list(halved), 0.05)) >= before


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.5, math.nan])
def test_alpha_outside_its_range_rejects_nothing(alpha):
    assert benjamini_hochberg([0.0, 0.5], alpha) == (False, False)
    assert bonferroni([0.0, 0.5], alpha) == (False, False)


def test_nan_is_never_rejected_and_still_counts():
    assert benjamini_hochberg([math.nan, 0.04], 0.05) == (False, False)
    assert benjamini_hochberg([0.04], 0.05) == (True,)
    assert benjamini_hochberg([], 0.05) == ()


def test_equals_scipys_adjusted_p_values():
    for p_values in np.random.default_rng(2).beta(0.2, 2.0, size=(100, 20)):
        expected = stats.false_discovery_control(p_values) <= 0.05
        assert benjamini_hochberg(list(p_values), 0.05) == tuple(expected)


def test_exponential_tail():
    assert exponential_tail_p(0.0, 1.0) == 1.0
    assert exponential_tail_p(math.log(20), 1.0) == pytest.approx(0.05)
    assert math.isnan(exponential_tail_p(math.nan, 1.0))
    assert exponential_tail_p(math.inf, 1.0) == 0.0
