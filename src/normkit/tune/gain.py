"""The mean gain of one weight over another, with its confidence interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

CONFIDENCE = 0.95
QUANTILE = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Mean gain over examples with its confidence interval; a gain above 0 is an improvement.

    Args:
        mean: Mean of the examples' gains, in the unit of the metric.
        low: Lower end of the interval.
        high: Upper end of the interval.
        num_examples: Number of examples that the gain was measured on.
        confidence: Confidence level of the two-sided interval.
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
    r"""Compute the gain from the differences ``(n,)`` of paired examples.

    .. math::  \bar d \pm z \sqrt{s^2 / n}

    With a metric of 0 or 1 only few examples may differ, and this interval would be too short. It
    is then computed with two more examples, of which each has half a gain and half a loss.

    Args:
        differences: The gain of each example.
        binary: Whether the metric is 0 or 1.

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
        half = 0.0  # The two weights are equal, or give equal results for every example.
    return Gain(mean=mean, low=center - half, high=center + half, num_examples=n)


def standard_error(differences: Tensor) -> float:
    """Standard error of a mean over examples ``(n,)``."""
    return differences.std().item() / math.sqrt(differences.numel())
