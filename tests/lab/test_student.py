"""Intervals of a mean, and how many values would decide, against other ways to compute them."""

import numpy as np
import pytest
from scipy import stats

from normkit.lab.student import half_width, has_spread, num_to_decide, power


@pytest.mark.parametrize("confidence", [0.95, 1 - 0.05 / 6])
@pytest.mark.parametrize("num", [2, 3, 10])
def test_the_interval_is_that_of_scipys_own_test(num, confidence):
    values = np.random.default_rng(0).normal(0.3, 1.0, num)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    half = half_width(values.std(ddof=1), num, confidence)
    assert (values.mean() - half, values.mean() + half) == pytest.approx((low, high))


def share_that_decides(effect, num, confidence):
    """How often the interval of so many normal values lies wholly above 0, by trying."""
    values = np.random.default_rng(1).normal(effect, 1.0, (40_000, num))
    low = stats.ttest_1samp(values, 0, axis=1).confidence_interval(confidence).low
    return (low > 0).mean()


@pytest.mark.parametrize("confidence", [0.95, 1 - 0.05 / 14])
@pytest.mark.parametrize(("effect", "num"), [(2.0, 3), (1.0, 8), (0.3, 60), (0.0, 5)])
def test_the_power_is_how_often_the_interval_lies_above_zero(effect, num, confidence):
    tried = share_that_decides(effect, num, confidence)
    assert power(effect, num, confidence) == pytest.approx(tried, abs=0.01)


@pytest.mark.parametrize("effect", [0.4, 1.0, 3.0])
def test_the_number_is_the_smallest_that_probably_decides(effect):
    confidence = 1 - 0.05 / 6
    found = num_to_decide(effect, 3, 103, confidence)
    assert found > 3
    assert share_that_decides(effect, found, confidence) > 0.79
    if found > 4:
        assert share_that_decides(effect, found - 1, confidence) < 0.81


def test_no_number_is_given_beyond_the_largest_that_is_tried():
    assert num_to_decide(0.1, 3, 103) is None
    assert num_to_decide(0.0, 3, 103) is None


@pytest.mark.parametrize("effect", [20.0, 1e3, 1e9])
def test_a_huge_effect_needs_one_or_two_more(effect):
    assert num_to_decide(effect, 2, 102, 1 - 0.05 / 14) in {3, 4}


@pytest.mark.parametrize("effect", [8.0, 20.0, 1e9])  # scipy's distribution is nan out there
def test_what_cannot_be_missed_has_power_one(effect):
    assert power(effect, 51, 1 - 0.05 / 12) == pytest.approx(1)


def test_what_is_smaller_than_rounding_is_no_spread():
    assert [has_spread(s) for s in (None, 0.0, 1e-17, 1e-3)] == [False, False, False, True]
