"""The table of a sweep, made from its records: norms as rows, batch sizes as columns."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from pydantic import Field

from normkit.lab.evaluation import ACCURACY
from normkit.lab.frozen import Frozen
from normkit.lab.records import TrainingRecord, latest, missing_runs
from normkit.lab.spec import SweepSpec, TrainingSpec

N = TypeVar("N", int, float)


class Summary(Frozen):
    """Mean over seeds, and the sample standard deviation, which is ``None`` for a single seed."""

    mean: float
    spread: float | None
    num_seeds: int


class Cell(Frozen):
    """One norm at one batch size.

    Accuracies are shares of the test examples after the last epoch. ``difference`` is the
    difference from the first norm with the same seed, so effects of the seed cancel. ``further``
    has the other test scores by name.
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
    base_lr: float | None = None
    further: Mapping[str, Summary] = Field(default_factory=dict)

    def row(self) -> dict[str, object]:
        """The cell as plain values: means and spreads by name."""
        values = self.model_dump(exclude={"accuracy", "difference", "further"})
        summaries = {"accuracy": self.accuracy, "difference": self.difference}
        for name, summary in (
            summaries | {f"test_{n}": s for n, s in self.further.items()}
        ).items():
            values |= {name: summary and summary.mean, f"{name}_spread": summary and summary.spread}
        return values


class Comparison(Frozen):
    """All cells of a sweep.

    Args:
        norms: The norms; the others are compared with the first.
        batch_sizes: The batch sizes.
        seeds: The seeds.
        cells: One cell for each norm and batch size.
        metric: Name of the scores: test accuracy, or the name that a user's training gives them.
        higher_is_better: Whether a higher score is ahead.
        is_share: Whether scores are shares from 0 to 1, which are written in percent.
        notes: What a reader should know, such as pictures and records that are left out.
    """

    norms: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    metric: str = ACCURACY
    higher_is_better: bool = True
    is_share: bool = True
    notes: tuple[str, ...] = ()

    def cell(self, norm: str, batch_size: int) -> Cell:
        """The cell of a norm and a batch size."""
        return next(c for c in self.cells if (c.norm, c.batch_size) == (norm, batch_size))

    @property
    def further(self) -> tuple[str, ...]:
        """Names of the scores besides the one that is compared."""
        return tuple(dict.fromkeys(name for cell in self.cells for name in cell.further))


def compared(
    sweep: SweepSpec, records: Iterable[TrainingRecord], notes: tuple[str, ...] = ()
) -> Comparison:
    """Summarise the records of a sweep.

    Args:
        sweep: The sweep, which decides the cells.
        records: Records of this and possibly other sweeps, with one learning rate in each cell.
        notes: What a reader should know.
    """
    ours = latest(sweep.runs(), records)
    return Comparison(
        norms=sweep.norms,
        batch_sizes=sweep.batch_sizes,
        seeds=sweep.seeds,
        metric=next((next(iter(r.outcome.scores), ACCURACY) for r in ours), ACCURACY),
        is_share=sweep.protocol.train is None,
        higher_is_better=sweep.protocol.better == "higher",
        notes=notes,
        cells=tuple(
            _cell(norm, batch_size, ours, sweep.norms[0])
            for norm in sweep.norms
            for batch_size in sweep.batch_sizes
        ),
    )


def best_rates(sweep: SweepSpec, records: Sequence[TrainingRecord]) -> tuple[TrainingRecord, ...]:
    """Records with the learning rate that is best for their norm and batch size.

    The best rate has the highest mean validation score after the last epoch, over the seeds that
    choose. Rates with which all runs finished come before those with a diverged or failed run.
    """
    if not sweep.learning_rates:
        return tuple(records)
    chosen: list[TrainingRecord] = []
    for norm, batch_size in itertools.product(sweep.norms, sweep.batch_sizes):
        mine = select(records, norm, batch_size)
        best = _best_rate(sweep, mine)
        chosen += [record for record in mine if record.spec.protocol.base_lr == best]
    return tuple(chosen)


def due_runs(sweep: SweepSpec, records: Sequence[TrainingRecord]) -> tuple[TrainingSpec, ...]:
    """The runs that are needed, as far as records say by now.

    All learning rates run with the seeds that choose. A later seed runs with the best rate of its
    norm and batch size, as soon as that is known.
    """
    if not sweep.learning_rates:
        return sweep.runs()
    choosing = [spec for spec in sweep.runs() if spec.seed in sweep.seeds_of_choice]
    ours = latest(choosing, records)
    waiting = {(spec.norm, spec.batch_size) for spec in missing_runs(choosing, ours)}
    rates = {
        cell: _best_rate(sweep, select(ours, *cell))
        for cell in itertools.product(sweep.norms, sweep.batch_sizes)
        if cell not in waiting
    }
    return tuple(
        spec
        for spec in sweep.runs()
        if spec.seed in sweep.seeds_of_choice
        or rates.get((spec.norm, spec.batch_size)) == spec.protocol.base_lr
    )


def _best_rate(sweep: SweepSpec, records: Sequence[TrainingRecord]) -> float | None:
    """The best learning rate of one norm at one batch size; ``None`` if nothing has run."""
    by_rate: dict[float, list[TrainingRecord]] = {}
    for record in records:
        if record.spec.seed in sweep.seeds_of_choice:
            by_rate.setdefault(record.spec.protocol.base_lr, []).append(record)
    return max(by_rate, key=lambda rate: _validation(by_rate[rate]), default=None)


def _validation(records: Sequence[TrainingRecord]) -> tuple[int, float]:
    finished = [r for r in records if r.outcome.status == "finished" and r.outcome.epochs]
    scores = [next(iter(r.outcome.epochs[-1].validation_scores.values())) for r in finished]
    accuracies = [0.0 if score is None else score for score in scores]
    return (len(finished) - len(records), statistics.fmean(accuracies) if accuracies else 0.0)


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
        base_lr=next((record.spec.protocol.base_lr for record in mine), None),
        further=_further(mine),
    )


def _further(records: Sequence[TrainingRecord]) -> dict[str, Summary]:
    """Every test score but the first; of each, the records that have it."""
    found: dict[str, list[float]] = {}
    for record in records:
        for name, value in list(record.outcome.scores.items())[1:]:
            if value is not None:
                found.setdefault(name, []).append(value)
    return {name: s for name, values in found.items() if (s := summarise(values)) is not None}


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
    return {record.spec.seed: record.score for record in records if record.score is not None}


def _combined(combine: Callable[[list[N]], N], values: Sequence[N | None]) -> N | None:
    known = [value for value in values if value is not None]
    return combine(known) if known else None


def _num_with(records: Iterable[TrainingRecord], status: str) -> int:
    return sum(record.outcome.status == status for record in records)
