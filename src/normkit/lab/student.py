"""Student's t: how sure the mean of a few seeds is, and how many seeds would decide."""

import math

from scipy.special import nctdtr, stdtrit

CONFIDENCE = 0.95
POWER = 0.8
DECIMALS = 9  # what is smaller is rounding, which would be decided where all seeds agree


def half_width(spread: float, num: int, confidence: float = CONFIDENCE) -> float:
    r"""Half of the two-sided interval of a mean.

    .. math::  t_{n-1,\,(1+c)/2} \; s / \sqrt{n}

    Args:
        spread: Standard deviation of a sample, ``s``, in the unit of the values.
        num: Values that the mean is of, 2 or more.
        confidence: Of the interval, ``c``.

    Example:
        >>> round(half_width(1.0, 3), 3)
        2.484
    """
    return _quantile(num, confidence) * spread / math.sqrt(num)


def has_spread(spread: float | None) -> bool:
    """Whether a standard deviation says anything: there is one, and it is more than rounding."""
    return spread is not None and round(spread, DECIMALS) > 0


def power(effect: float, num: int, confidence: float = CONFIDENCE) -> float:
    r"""Chance that the interval of a mean lies wholly on that side of 0 where the mean truly is.

    .. math::  P(T > t_{n-1,\,(1+c)/2}), \quad
        T \text{ noncentral } t \text{ with } n - 1 \text{ degrees, noncentrality } d \sqrt{n}

    Args:
        effect: True mean over true standard deviation, ``d``, 0 or more.
        num: Values that the interval will be of, ``n``, 2 or more.
        confidence: Of the interval, ``c``.

    Example:
        >>> round(power(2.0, 3), 2), round(power(2.0, 5), 2)
        (0.47, 0.91)
    """
    missed = float(nctdtr(num - 1, effect * math.sqrt(num), _quantile(num, confidence)))
    return 1.0 if math.isnan(missed) else 1 - missed  # nan: so far beyond that nothing is missed


def num_to_decide(
    effect: float, num_now: int, at_most: int, confidence: float = CONFIDENCE
) -> int | None:
    """The smallest number of values above ``num_now`` whose interval excludes 0 with power 0.8.

    Args:
        effect: Mean over standard deviation, as observed and taken for the truth, 0 or more.
        num_now: Values that there are.
        at_most: The largest number that is tried.
        confidence: Of the interval.

    Returns:
        The number, or None if it is above ``at_most``.

    Example:
        >>> num_to_decide(1.0, 3, at_most=100)
        10
    """
    numbers = range(num_now + 1, at_most + 1)
    return next((n for n in numbers if power(effect, n, confidence) >= POWER), None)


def _quantile(num: int, confidence: float) -> float:
    return float(stdtrit(num - 1, (1 + confidence) / 2))
