"""From records to the table: norms as rows, batch sizes as columns."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from normkit.lab.records import TrainingRecord, latest
from normkit.lab.spec import Frozen, SweepSpec

N = TypeVar("N", int, float)


class Summary(Frozen):
    """Mean over seeds and the sample standard deviation, ``None`` for a single seed."""

    mean: float
    spread: float | None
    num_seeds: int


class Cell(Frozen):
    """One norm at one batch size.

    Accuracies are shares of the test examples after the last epoch. The difference is to the
    first norm, seed by seed, so that what the seeds have in common cancels.
    """

    norm: str
    batch_size: int
    accuracy: Summary | None
    difference: Summary | None
    step_time_s: float | None
    peak_bytes: int | None
    num_finished: int
    num_diverged: int
    num_failed: int


class Comparison(Frozen):
    """All cells of a sweep."""

    norms: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]

    def cell(self, norm: str, batch_size: int) -> Cell:
        """The cell of a norm and a batch size."""
        return next(c for c in self.cells if (c.norm, c.batch_size) == (norm, batch_size))


def compare(sweep: SweepSpec, records: Iterable[TrainingRecord]) -> Comparison:
    """Summarise the records of a sweep.

    Args:
        sweep: Says which cells there are.
        records: Records of this and any other sweep.
    """
    ours = latest(sweep.runs(), records)
    return Comparison(
        norms=sweep.norms,
        batch_sizes=sweep.batch_sizes,
        seeds=sweep.seeds,
        cells=tuple(
            _cell(norm, batch_size, ours, sweep.norms[0])
            for norm in sweep.norms
            for batch_size in sweep.batch_sizes
        ),
    )


def _cell(norm: str, batch_size: int, records: Sequence[TrainingRecord], first_norm: str) -> Cell:
    mine = select(records, norm, batch_size)
    accuracies = _accuracies(mine)
    baseline = _accuracies(select(records, first_norm, batch_size))
    paired = [value - baseline[seed] for seed, value in accuracies.items() if seed in baseline]
    return Cell(
        norm=norm,
        batch_size=batch_size,
        accuracy=summarise(list(accuracies.values())),
        difference=summarise(paired) if norm != first_norm else None,
        step_time_s=_combined(statistics.median, [r.step_time_s for r in mine]),
        peak_bytes=_combined(max, [r.outcome.peak_bytes for r in mine]),
        num_finished=_num_with(mine, "finished"),
        num_diverged=_num_with(mine, "diverged"),
        num_failed=_num_with(mine, "failed"),
    )


def select(records: Iterable[TrainingRecord], norm: str, batch_size: int) -> list[TrainingRecord]:
    """Records of one norm at one batch size."""
    return [r for r in records if (r.spec.norm, r.spec.batch_size) == (norm, batch_size)]


def summarise(values: Sequence[float]) -> Summary | None:
    """Mean and spread of values, ``None`` if there are none."""
    if not values:
        return None
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Summary(mean=statistics.fmean(values), spread=spread, num_seeds=len(values))


def _accuracies(records: Iterable[TrainingRecord]) -> Mapping[int, float]:
    return {
        record.spec.seed: record.outcome.test_accuracy
        for record in records
        if record.outcome.test_accuracy is not None
    }


def _combined(combine: Callable[[list[N]], N], values: Sequence[N | None]) -> N | None:
    known = [value for value in values if value is not None]
    return combine(known) if known else None


def _num_with(records: Iterable[TrainingRecord], status: str) -> int:
    return sum(record.outcome.status == status for record in records)
