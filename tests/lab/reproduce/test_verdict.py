"""The rule that decides whether a claim held."""

import math

import pytest
from scipy import stats

from normkit.lab.reproduce.verdict import Criterion, judge

ABOVE_ONE = Criterion(side="above", bound=1)
BELOW_ONE = Criterion(side="below", bound=1)
WITHIN_ONE = Criterion(side="within", bound=1)


@pytest.mark.parametrize(
    ("values", "criterion", "outcome"),
    [
        ((2.0, 2.1, 2.2), ABOVE_ONE, "held"),
        ((0.0, 0.1, 0.2), ABOVE_ONE, "did not hold"),
        ((0.5, 1.0, 1.8), ABOVE_ONE, "not decided"),
        ((0.0, 0.1, 0.2), BELOW_ONE, "held"),
        ((2.0, 2.1, 2.2), BELOW_ONE, "did not hold"),
        ((0.5, 1.0, 1.8), BELOW_ONE, "not decided"),
        ((-0.1, 0.0, 0.1), WITHIN_ONE, "held"),
        ((2.0, 2.1, 2.2), WITHIN_ONE, "did not hold"),
        ((-2.2, -2.1, -2.0), WITHIN_ONE, "did not hold"),
        ((-2.0, 0.0, 2.0), WITHIN_ONE, "not decided"),
        ((1.0, 1.0, 1.0), ABOVE_ONE, "not decided"),  # all at the bound
        ((1 + 1e-12, 1 + 1e-12, 1 + 1e-12), ABOVE_ONE, "not decided"),  # rounding decides nothing
    ],
)
def test_the_interval_decides(values, criterion, outcome):
    assert judge(values, criterion).outcome == outcome


def test_the_interval_is_that_of_students_t():
    values = (0.3, 0.7, 0.4, 1.2, 0.9)
    found = judge(values, ABOVE_ONE)
    error = stats.sem(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / 5, scale=error)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    assert found.std == pytest.approx(error * math.sqrt(5))
    assert f"{found}" == "0.7 [0.244, 1.16] (n = 5)"


@pytest.mark.parametrize("number", [3, 10, 20])
def test_the_quantiles_are_students_for_any_number_of_seeds(number):
    values = [0.0, *[1.0, 0.5] * number][:number]
    found = judge(values, ABOVE_ONE)
    width = 2 * stats.sem(values) * stats.t.ppf(0.975, number - 1)
    assert found.high - found.low == pytest.approx(width)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((2.0, 2.1), "fewer than 3 seeds (n = 2)"),
        ((2.0, math.nan, 2.1, math.inf), "2 of 4 not finite (n = 4)"),
    ],
)
def test_too_few_or_broken_values_decide_nothing(values, reason):
    found = judge(values, ABOVE_ONE)
    assert (found.outcome, found.mean, f"{found}") == ("not decided", None, reason)


def test_criteria_print():
    assert [f"{c}" for c in (ABOVE_ONE, BELOW_ONE, WITHIN_ONE)] == [
        "above 1",
        "below 1",
        "within ±1",
    ]
