"""Whether a claim held, by a rule: the 95 % interval of its mean over seeds against a bound."""

import math
import statistics
from collections.abc import Sequence
from typing import Literal, get_args

from pydantic import Field

from normkit.lab.frozen import Frozen
from normkit.lab.student import DECIMALS, half_width

Outcome = Literal["held", "did not hold", "not decided"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
Side = Literal["above", "below", "within"]

FEWEST_SEEDS = 3


class Criterion(Frozen):
    """What a claim says of its quantity: that its mean lies on one side of a bound.

    ``"within"`` says that its distance from 0 is at most the bound.
    """

    side: Side
    bound: float = 0.0

    def __str__(self) -> str:
        if self.side == "within":
            return f"within ±{self.bound:g}"
        return f"{self.side} {self.bound:g}"


ABOVE, BELOW = Criterion(side="above"), Criterion(side="below")


class Verdict(Frozen):
    """What the seeds say of a claim.

    Args:
        outcome: ``"held"`` if the whole interval fulfils the criterion, ``"did not hold"`` if the
            whole interval breaks it, else ``"not decided"``.
        values: One for each seed; None where it was not finite.
        mean: Of the values.
        std: Their standard deviation (of a sample).
        low: Lower end of the interval.
        high: Upper end of the interval.
        reason: Why there is no interval.
    """

    outcome: Outcome
    values: tuple[float | None, ...]
    mean: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = Field(default=None)

    @property
    def num_seeds(self) -> int:
        """Seeds that it rests on."""
        return len(self.values)

    def __str__(self) -> str:
        if self.mean is None:
            return f"{self.reason} (n = {self.num_seeds})"
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}] (n = {self.num_seeds})"


def judge(values: Sequence[float], criterion: Criterion) -> Verdict:
    r"""Hold a criterion against one value for each seed.

    .. math::  \bar v \pm t_{n-1} \, s / \sqrt{n}

    Args:
        values: One for each seed, differences already taken seed by seed.
        criterion: What the claim says of their mean.

    Returns:
        The verdict; not decided if there are fewer than three seeds or a value is not finite.
    """
    values = [round(value, DECIMALS) if math.isfinite(value) else value for value in values]
    kept = tuple(value if math.isfinite(value) else None for value in values)
    missing = kept.count(None)
    if missing:
        return Verdict(
            outcome="not decided", values=kept, reason=f"{missing} of {len(kept)} not finite"
        )
    if len(values) < FEWEST_SEEDS:
        reason = f"fewer than {FEWEST_SEEDS} seeds"
        return Verdict(outcome="not decided", values=kept, reason=reason)
    mean, std = statistics.fmean(values), statistics.stdev(values)
    half = half_width(std, len(values))
    return Verdict(
        outcome=_outcome(mean - half, mean + half, criterion),
        values=kept,
        mean=mean,
        std=std,
        low=mean - half,
        high=mean + half,
    )


def _outcome(low: float, high: float, criterion: Criterion) -> Outcome:
    bound = criterion.bound
    if criterion.side == "above":
        holds, breaks = low > bound, high < bound
    elif criterion.side == "below":
        holds, breaks = high < bound, low > bound
    else:
        holds, breaks = -bound < low and high < bound, high < -bound or low > bound
    return "held" if holds else "did not hold" if breaks else "not decided"
