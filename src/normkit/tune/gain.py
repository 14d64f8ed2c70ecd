"""How much better one weight is than another, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

CONFIDENCE = 0.95
QUANTILE = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Mean gain over examples and its interval; above 0 is better.

    Args:
        mean: Mean over the examples of what each one gains, in the unit of the metric.
        low: Lower end of the interval.
        high: Upper end of the interval.
        num_examples: Examples that it was measured on.
        confidence: Of the interval, two-sided.
    """

    mean: float
    low: float
    high: float
    num_examples: int
    confidence: float = CONFIDENCE

    @property
    def significant(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low > 0

    def __str__(self) -> str:
        ends = f"{self.low:+.4g} to {self.high:+.4g}"
        return f"{self.mean:+.4g} ({100 * self.confidence:g} % interval {ends})"


def paired_gain(differences: Tensor, binary: bool) -> Gain:
    r"""Gain of paired examples ``(n,)``.

    .. math::  \bar d \pm z \sqrt{s^2 / n}

    Of a metric that is 0 or 1 only few examples may differ, and the interval would be too short: it
    then has two more examples, with half a gain and half a loss each.

    Source:
        Agresti & Min 2005, Simple improved confidence intervals for comparing matched proportions.
    """
    n = differences.numel()
    mean = center = differences.mean().item()
    if binary:
        center = differences.sum().item() / (n + 2)
        squares = (differences.square().sum().item() + 1) / (n + 2)
        error = math.sqrt((squares - center**2) / (n + 2))
    else:
        error = standard_error(differences)
    half = QUANTILE * error
    if not differences.any():
        half = 0.0  # the same weight, or one that changes nothing
    return Gain(mean=mean, low=center - half, high=center + half, num_examples=n)


def standard_error(differences: Tensor) -> float:
    """Standard error of a mean over examples ``(n,)``."""
    return differences.std().item() / math.sqrt(differences.numel())
