"""The records of a probe: one step, layer by layer, and all steps together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from normkit.diagnostics.measurement import Measurement, new_figure


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """One layer in one step; a number is None if the layer has none or it could not be measured.

    Args:
        name: The layer's name; for a ReLU, followed by the number of the call if that is above 1.
        shift_mean: Distance of the step's means from the running means before the step.
        shift_std: Distance of the step's standard deviations from the running ones.
        stat_diff: StatDiff of the step's inputs, mean over the layer's groups.
        stat_diff_std: Standard deviation of StatDiff over the groups (population).
        num_rectified: Channels of a ReLU's input.
        num_dead: Channels of a ReLU's input that are not positive anywhere in the step.
        zero_share: Share of zeros in the ReLU's output.
        gamma_norm: L2 norm of a norm's weight when ``step`` is called.
        beta_norm: L2 norm of a norm's bias.
        gradient_norm: L2 norm of the gradient of the layer's own parameters.
        gradient_change: Distance of that gradient from the gradient of the step before.
    """

    name: str
    shift_mean: float | None = None
    shift_std: float | None = None
    stat_diff: float | None = None
    stat_diff_std: float | None = None
    num_rectified: int | None = None
    num_dead: int | None = None
    zero_share: float | None = None
    gamma_norm: float | None = None
    beta_norm: float | None = None
    gradient_norm: float | None = None
    gradient_change: float | None = None


NUMBERS = tuple(field.name for field in fields(LayerRecord) if field.name != "name")
"""Columns of a row that hold numbers."""


@dataclass(frozen=True, kw_only=True)
class ProbedStep(Measurement):
    """One recorded step.

    Args:
        step: The step's number, from 1.
        loss: The loss that ``step`` was given.
        stat_diff: StatDiff, mean over all groups of all layers.
        gradient_norm: L2 norm of the gradient of all chosen parameters.
        gradient_change: Distance of that gradient from the gradient of the step before.
        layers: A row for each layer with at least one number.
        notes: What could not be measured, and why.
    """

    step: int
    loss: float | None
    stat_diff: float | None
    gradient_norm: float | None
    gradient_change: float | None
    layers: tuple[LayerRecord, ...]
    notes: tuple[str, ...]

    drawn = ("shift_mean", "shift_std", "stat_diff", "zero_share")

    @property
    def worst(self) -> LayerRecord | None:
        """Layer with the largest shift of standard deviations."""
        rows = [row for row in self.layers if _finite(row.shift_std)]
        return max(rows, key=lambda row: row.shift_std or 0.0, default=None)

    @property
    def num_dead(self) -> int | None:
        """Number of dead channels, over all ReLUs."""
        return _total(row.num_dead for row in self.layers)

    @property
    def num_rectified(self) -> int | None:
        """Number of channels, over all ReLUs."""
        return _total(row.num_rectified for row in self.layers)

    @property
    def summary(self) -> StepSummary:
        """The step in one row."""
        worst = self.worst
        return StepSummary(
            name=self.step,
            loss=self.loss,
            shift_mean=None if worst is None else worst.shift_mean,
            shift_std=None if worst is None else worst.shift_std,
            stat_diff=self.stat_diff,
            num_dead=self.num_dead,
            gradient_norm=self.gradient_norm,
            gradient_change=self.gradient_change,
        )

    @property
    def reading(self) -> str:
        """The largest shift, StatDiff, dead channels and the gradient, in one sentence."""
        loss = self.loss
        dead = f"{self.num_dead} of {self.num_rectified} rectified channels are off"
        parts = (
            f"the loss is {loss}" if loss is not None and not math.isfinite(loss) else None,
            _describe_shift(self.worst),
            _describe_stat_diff(self.stat_diff),
            dead if self.num_rectified else None,
            _describe_gradient(self.gradient_norm, self.gradient_change),
        )
        text = "; ".join(part for part in parts if part is not None)
        return f"Step {self.step}: {text or 'nothing could be measured'}."

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSummary:
    """A row of the history.

    Args:
        name: The step's number.
        loss: The step's loss.
        shift_mean: Shift of the means in the layer with the largest ``shift_std``.
        shift_std: The largest shift of the standard deviations.
        stat_diff: StatDiff, mean over all groups of all layers.
        num_dead: Number of dead channels, over all ReLUs.
        gradient_norm: L2 norm of the gradient.
        gradient_change: Distance of the gradient from the gradient of the step before.
    """

    name: int
    loss: float | None
    shift_mean: float | None
    shift_std: float | None
    stat_diff: float | None
    num_dead: int | None
    gradient_norm: float | None
    gradient_change: float | None


@dataclass(frozen=True, kw_only=True)
class ProbeHistory(Measurement):
    """All recorded steps.

    Args:
        every: One in so many steps is recorded.
        steps: The records.
    """

    every: int
    steps: tuple[ProbedStep, ...]

    drawn = ("shift_mean", "shift_std", "stat_diff", "gradient_change")

    @property
    def rows(self) -> tuple[StepSummary, ...]:
        """A summary of each step."""
        return tuple(step.summary for step in self.steps)

    @property
    def reading(self) -> str:
        """The changes from the first recorded step to the last, in one sentence."""
        if not self.steps:
            return f"No step has been recorded yet; one step in {self.every} is recorded."
        first, last = self.rows[0], self.rows[-1]
        if len(self.steps) == 1:
            return self.steps[0].reading
        changes = [
            f"{what} from {_shown(getattr(first, column))} to {_shown(getattr(last, column))}"
            for column, what in COMPARED.items()
            if getattr(first, column) is not None and getattr(last, column) is not None
        ]
        return (
            f"Between step {first.name} and step {last.name} ({len(self.steps)} recorded): "
            f"{', '.join(changes) or 'nothing can be compared'}."
        )

    def plot(self) -> Any:
        """Plot shifts, dead channels and gradients over the steps; return a ``Figure``.

        Raises:
            PackageError: If matplotlib is not installed.
        """
        figure = new_figure(figsize=(7, 8), layout="constrained")
        figure.suptitle(self.reading, fontsize=9, wrap=True)
        panels = figure.subplots(len(PANELS), sharex=True)
        for axes, columns in zip(panels, PANELS, strict=True):
            for column, style in zip(columns, ("-o", "--s", ":^"), strict=False):
                shown = [(row.name, getattr(row, column)) for row in self.rows]
                known = [(step, value) for step, value in shown if _finite(value)]
                axes.plot(*zip(*known, strict=True) if known else ((), ()), style, markersize=3,
                          label=column.replace("_", " "))  # fmt: skip
            axes.grid(alpha=0.3)
            axes.legend()
        panels[-1].set_xlabel("step")
        return figure


COMPARED = {
    "loss": "the loss",
    "shift_std": "the largest shift of standard deviations",
    "stat_diff": "StatDiff",
    "num_dead": "the number of channels that are off",
    "gradient_change": "the change of the gradient between steps",
}
"""Columns that a history's reading compares, with their names in it."""

PANELS = (("shift_mean", "shift_std", "stat_diff"), ("num_dead",),
          ("gradient_norm", "gradient_change"))  # fmt: skip
"""Columns of each panel of the plot."""


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _total(numbers: Iterable[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def _describe_shift(worst: LayerRecord | None) -> str | None:
    if worst is None:
        return None
    return (
        f"running statistics are furthest from the batch's in {worst.name} ({worst.shift_std:.3g} "
        f"in the standard deviations, {worst.shift_mean:.3g} in the means)"
    )


def _describe_stat_diff(stat_diff: float | None) -> str | None:
    if stat_diff is None:
        return None
    return (
        f"channels that share statistics differ in their means by {stat_diff:.3g} of their "
        f"standard deviations"
    )


def _describe_gradient(norm: float | None, change: float | None) -> str | None:
    if norm is None:
        return None
    changed = "" if change is None else f", and it moved by {change:.3g} since the step before"
    return f"the gradient's length is {norm:.3g}{changed}"
