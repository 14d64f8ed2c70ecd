"""The result of tuning: chosen weights, gains, and the curve, as text and as a plot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, NamedTuple

from torch import nn

from normkit.core.check import require_share
from normkit.passes import Snapshot, as_list, call_with_cleanup
from normkit.tune.gain import Gain, paired_gain
from normkit.tune.layers import Weights, common_weight
from normkit.tune.metrics import Metric
from normkit.tune.sweep import How, Sweep


class CurvePoint(NamedTuple):
    """The metric at one weight, over all examples.

    Args:
        alpha: The weight, the same in all layers.
        mean: Mean of the metric over the examples.
        num_examples: Number of examples.
        gain: Mean gain over the old weights; above 0 is better.
        error: Standard error of that gain, from paired examples.
    """

    alpha: float
    mean: float
    num_examples: int
    gain: float
    error: float


@dataclass(kw_only=True, eq=False, repr=False)
class Tuning:
    """The example weight chosen for a model, and its gain; prints as a table.

    Half of the examples choose the weight, and the other half judge its gain.

    Args:
        model: The tuned model.
        metric: The metric that the weight was tuned for.
        before: The layers' old weights: one weight, or a dict by layer name if they differ.
        alpha: The weight that was set: ``best``, or ``before`` if the gain may be noise; with
            ``per_layer`` a dict by layer name.
        best: The best weight by the examples that choose, whether it was set or not.
        gain: Gain of ``best`` over ``before`` on the examples that judge.
        shared: The best weight that all layers have in common.
        shared_gain: Gain of ``shared`` over ``before`` on the examples that judge.
        tied: All common weights that were as good as ``best`` on the examples that choose.
        curve: The metric at every common weight that was tried, in rising order.
        how: ``"from the first norm on"`` or ``"from the input on"``, if several weights were
            computed in one forward from there on; otherwise ``"one by one"``.
    """

    model: nn.Module
    metric: Metric
    before: Weights
    alpha: Weights
    best: Weights
    gain: Gain
    shared: float
    shared_gain: Gain
    tied: tuple[float, ...]
    curve: tuple[CurvePoint, ...]
    how: How
    _sweep: Sweep = field(kw_only=True)

    @property
    def significant(self) -> bool:
        """Whether the interval of the gain lies above 0, so that ``alpha`` was set to ``best``."""
        return self.gain.significant

    def gain_on(self, batches: Iterable[Any], alpha: Weights | None = None) -> Gain:
        """Measure the gain over ``before`` on other data, such as the test set.

        Args:
            batches: Data in the form that ``tune_example_weight`` takes.
            alpha: Weight to measure; by default the one that was set.

        Raises:
            OptionError: If ``alpha`` is no weight from 0 to 1, or the tuning was undone.
            DataError: For the reasons that ``tune_example_weight`` names.
        """
        return call_with_cleanup(
            lambda: self._gain_on(batches, alpha), Snapshot(self.model).put_back
        )

    def _gain_on(self, batches: Iterable[Any], alpha: Weights | None) -> Gain:
        weights = self.alpha if alpha is None else alpha
        for value in weights.values() if isinstance(weights, Mapping) else [weights]:
            require_share("alpha", value)
        tuned = self._sweep
        tuned.layers.require_in_place()
        sweep = Sweep(tuned.layers, self.metric, tuned.forward, as_list(batches))
        before = sweep.scores_of(self.before)
        differences = self.metric.gains(sweep.scores_of(weights), before)
        return paired_gain(differences, self.metric.binary)

    def undo(self) -> nn.Module:
        """Restore torch's layers and the old weights; return the model.

        The restored layers are the same module objects as before tuning, with the same running
        statistics. A second call changes nothing.

        Raises:
            OptionError: If the layers were replaced again since; then nothing is changed.
        """
        return self._sweep.layers.undo()

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Plot the gain over the weights; return matplotlib's figure.

        Args:
            path: File to save the plot to; its name ends in ``.png``, ``.svg`` or ``.pdf``.

        Raises:
            PackageError: If matplotlib is not installed.
        """
        from normkit.tune.figure import draw  # matplotlib is slow and optional

        figure = draw(self)
        if path is not None:
            figure.savefig(path)
        return figure

    def __repr__(self) -> str:
        return f"<Tuning: {self._summary()}>"

    def __str__(self) -> str:
        return "\n".join([self._summary(), *self._rows(), *self._left(), self.reading])

    def _summary(self) -> str:
        direction = "larger" if self.metric.larger_is_better else "smaller"
        number = len(self._sweep.layers.named)
        return (
            f"example weight of {number} layer{'s' if number > 1 else ''}, tuned for "
            f"{self.metric.name} ({direction} is better) on {self.curve[0].num_examples:,} examples"
        )

    def _rows(self) -> list[str]:
        head = ("alpha", self.metric.name, "gain", "standard error")
        rows = [
            (f"{p.alpha:.3g}", f"{p.mean:.4f}", f"{p.gain:+.4f}", f"{p.error:.4f}")
            for p in self.curve
        ]
        return _table([head, *rows])

    def _left(self) -> Iterator[str]:
        for name, why in self._sweep.layers.left.items():
            yield f"left alone: {name}: {why}"

    @property
    def reading(self) -> str:
        """The result in one or two sentences."""
        stays = f"alpha stays {shown(self.before)}"
        if common_weight(self.best) == self.before:
            return f"{stays}: no other weight was better on the examples that choose"
        found = shown(self.best)
        judged = f"{self.gain} on {self.gain.num_examples:,} examples that had no part in choosing"
        if isinstance(self.best, Mapping):
            judged += f"; {self.shared:.3g} in all layers gains {self.shared_gain}"
        if len(self.tied) > 1:
            ends = f"{min(self.tied):.3g} to {max(self.tied):.3g}"
            judged += f" ({len(self.tied)} weights from {ends} are equally good on those that do)"
        if self.significant:
            return f"alpha is set to {found}, which gains {judged}"
        doubt = "which may be noise" if self.gain.high > 0 else "which is a loss"
        return f"{stays}: {found} gains {judged}, {doubt}"


def shown(weights: Weights) -> str:
    """Format a weight, or the range of the layers' weights."""
    if not isinstance(weights, Mapping):
        return f"{weights:.3g}"
    return f"{min(weights.values()):.3g} to {max(weights.values()):.3g}, layer by layer"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  " + "  ".join(row).rstrip() for row in padded]
