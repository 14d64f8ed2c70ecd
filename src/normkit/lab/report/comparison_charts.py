"""The charts of the report, and the values that they show."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from normkit.lab.comparison import Cell, Comparison, Summary, select
from normkit.lab.records import Epoch, TrainingRecord
from normkit.lab.report.charts import Axis, Chart, Frame, Line, Tick, Value, line_chart
from normkit.lab.student import half_width, has_spread

WIDE = Frame(width=820, height=360, right=110)
NARROW = Frame(width=380, height=300)
PANEL = Frame(width=320, height=220)

Figure = Callable[[Epoch], float | None]


def accuracy_chart(
    comparison: Comparison, records: Sequence[TrainingRecord], frame: Frame
) -> Chart:
    """Test accuracy by batch size: a line for each norm, its 95 % intervals and every seed.

    The norms of a batch size are drawn side by side, so that no interval covers another.
    """
    sizes = sorted(comparison.batch_sizes)
    ticks = tuple(Tick(at=math.log2(size), text=str(size)) for size in sizes)
    lines = [
        Line(
            name=norm,
            style=style,
            values=tuple(_accuracies(comparison, records, norm)),
            place=style - (len(comparison.norms) - 1) / 2,
        )
        for style, norm in enumerate(comparison.norms)
    ]
    title = f"test {comparison.metric}, %" if comparison.is_share else comparison.metric
    return line_chart(lines, frame, Axis(title="batch size", ticks=ticks), title)


def _accuracies(
    comparison: Comparison, records: Sequence[TrainingRecord], norm: str
) -> Iterator[Value]:
    for size in sorted(comparison.batch_sizes):
        cell = comparison.cell(norm, size)
        if cell.accuracy is not None:
            scores = [record.score for record in select(records, norm, size)]
            yield _score(cell, cell.accuracy, scores, _Scale.of(comparison))


class _Scale(NamedTuple):
    """Scale of scores: shares are drawn in percent from 0 to 100, other scores unchanged."""

    factor: float
    least: float
    most: float
    written: str

    @classmethod
    def of(cls, comparison: Comparison) -> "_Scale":
        if comparison.is_share:
            return cls(100, 0.0, 100.0, "{:.2f} %")
        return cls(1, -math.inf, math.inf, "{:.4g}")


def _score(cell: Cell, accuracy: Summary, seeds: Iterable[float | None], scale: _Scale) -> Value:
    mean = scale.factor * accuracy.mean
    said = f"{cell.norm}, batch size {cell.batch_size}: {scale.written.format(mean)}"
    low = high = None
    # As in the verdict, there is no interval without spread or with diverged runs.
    if accuracy.spread and has_spread(accuracy.spread) and not cell.num_diverged:
        half = scale.factor * half_width(accuracy.spread, accuracy.num_seeds)
        low, high = max(mean - half, scale.least), min(mean + half, scale.most)
        ends = (scale.written.format(end).removesuffix(" %") for end in (low, high))
        said += f", 95 % interval {' to '.join(ends)}"
    said += f", {cell.num_diverged} diverged" if cell.num_diverged else ""
    return Value(
        x=math.log2(cell.batch_size),
        y=mean,
        low=low,
        high=high,
        dots=tuple(scale.factor * seed for seed in seeds if seed is not None),
        title=said,
    )


def loss_chart(comparison: Comparison, records: Iterable[TrainingRecord], batch_size: int) -> Chart:
    """Training loss by epoch at one batch size."""
    return _curves(
        comparison, select_size(records, batch_size), lambda e: e.train_loss, "training loss"
    )


def validation_chart(
    comparison: Comparison, records: Iterable[TrainingRecord], batch_size: int
) -> Chart:
    """The first score on the validation examples by epoch, at one batch size."""

    def score(epoch: Epoch) -> float | None:
        value = next(iter(epoch.validation_scores.values()), None)
        return None if value is None else 100 * value

    title = f"validation {comparison.metric}, %"
    return _curves(comparison, select_size(records, batch_size), score, title)


def select_size(records: Iterable[TrainingRecord], batch_size: int) -> list[TrainingRecord]:
    """Records at one batch size."""
    return [record for record in records if record.spec.batch_size == batch_size]


def _curves(
    comparison: Comparison, records: Sequence[TrainingRecord], figure: Figure, title: str
) -> Chart:
    num_epochs = max((len(record.outcome.epochs) for record in records), default=1)
    lines = [
        Line(name=norm, style=style, values=_means(_of_norm(records, norm), figure))
        for style, norm in enumerate(comparison.norms)
    ]
    return line_chart(lines, PANEL, Axis(title="epoch", ticks=_epoch_ticks(num_epochs)), title)


def _of_norm(records: Iterable[TrainingRecord], norm: str) -> list[TrainingRecord]:
    return [record for record in records if record.spec.norm == norm]


def _epoch_ticks(num_epochs: int) -> tuple[Tick, ...]:
    step = max(1, math.ceil((num_epochs - 1) / 5))
    epochs = sorted({*range(1, num_epochs + 1, step), num_epochs})
    if len(epochs) > 2 and epochs[-1] - epochs[-2] < step:
        del epochs[-2]  # its text would touch that of the last epoch
    return tuple(Tick(at=epoch, text=str(epoch)) for epoch in epochs)


def _means(records: Sequence[TrainingRecord], figure: Figure) -> tuple[Value, ...]:
    """Mean of each epoch over the runs that reached it."""
    values = []
    for index in range(max((len(r.outcome.epochs) for r in records), default=0)):
        known = [figure(r.outcome.epochs[index]) for r in records if index < len(r.outcome.epochs)]
        finite = [value for value in known if value is not None]
        if finite:
            mean = statistics.fmean(finite)
            values.append(Value(x=index + 1, y=mean, title=f"epoch {index + 1}: {mean:.4g}"))
    return tuple(values)
