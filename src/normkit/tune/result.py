"""What tuning found, in numbers, words and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, NamedTuple

from torch import nn

from normkit.core.check import require_share
from normkit.passes import Snapshot, as_list, call_with_cleanup
from normkit.tune.gain import Gain, paired_gain
from normkit.tune.layers import Weights, one_for_all
from normkit.tune.metrics import Metric
from normkit.tune.sweep import How, Sweep


class CurvePoint(NamedTuple):
    """The metric at one weight, over all examples.

    Args:
        alpha: The weight, the same in all layers.
        mean: Mean of the metric.
        num_examples: Examples behind it.
        gain: Mean gain against the weights from before; above 0 is better.
        error: Standard error of that gain, of examples compared in pairs.
    """

    alpha: float
    mean: float
    num_examples: int
    gain: float
    error: float


@dataclass(kw_only=True, eq=False, repr=False)
class Tuning:
    """The example weight of a model, chosen and judged; prints as a table.

    Args:
        model: The tuned model.
        metric: What it was tuned for.
        before: What the layers had: one weight, or a dict from their names where they differ.
        alpha: What was set: the best weight, or that from before if its gain may be noise; with
            ``per_layer`` a dict from the names of the layers.
        best: The best weight by the examples that choose, whether it was set or not.
        gain: What ``best`` gains against ``before`` on the examples that had no part in choosing.
        shared: The best weight common to all layers.
        shared_gain: What that gains, likewise.
        tied: All common weights that the examples that choose found as good as ``best``.
        curve: The metric at every common weight that was tried, in rising order.
        how: Where weights shared a forward, and from where on.
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
        """Measure the gain against ``before`` on other data, such as the test set.

        Args:
            batches: As in ``tune_example_weight``.
            alpha: Weight to measure; by default the one that was set.

        Raises:
            OptionError: If ``alpha`` is no weight from 0 to 1, or the tuning was undone.
            DataError: As in ``tune_example_weight``.
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
        """Put torch's layers and the old weights back; return the model.

        The old layers are the same modules with their own running statistics. A second time
        changes nothing.

        Raises:
            OptionError: If the layers were replaced again since; nothing is changed then.
        """
        return self._sweep.layers.undo()

    def plot(self, path: str | PathLike[str] | None = None) -> Any:  # noqa: ANN401 - no import here
        """Draw the gain over the weights; return matplotlib's figure.

        Args:
            path: File to write as well; its name ends in ``.png``, ``.svg`` or ``.pdf``.

        Raises:
            PackageError: If matplotlib is not installed.
        """
        from normkit.tune.figure import draw  # noqa: PLC0415 - matplotlib is slow and optional

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
        """What came out, in a sentence or two."""
        stays = f"alpha stays {shown(self.before)}"
        if one_for_all(self.best) == self.before:
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
    """A weight, or the range of several."""
    if not isinstance(weights, Mapping):
        return f"{weights:.3g}"
    return f"{min(weights.values()):.3g} to {max(weights.values()):.3g}, layer by layer"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  " + "  ".join(row).rstrip() for row in padded]
