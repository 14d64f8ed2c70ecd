"""What a table came to: scores of all runs, and whether the paper's claims held."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from normkit.lab.files import file_errors, write_whole
from normkit.lab.frozen import Frozen
from normkit.lab.lines import read_whole
from normkit.lab.records import Outcome, TrainingRecord
from normkit.lab.reproduce.preset import Scale
from normkit.lab.reproduce.report import Judged, result_path
from normkit.lab.reproduce.tables.catalog import tables
from normkit.lab.reproduce.tables.quantity import At
from normkit.lab.reproduce.tables.reading import PLAIN, Reading, Taken
from normkit.lab.reproduce.tables.readings import ReadingRecord
from normkit.lab.reproduce.tables.table import Numbers, Part, Table
from normkit.lab.reproduce.verdict import judge
from normkit.lab.spec import TrainingSpec
from normkit.lab.student import half_width
from normkit.lab.text import MISSING, joined
from normkit.lab.train import NUM_LAST_EPOCHS

WAY_OUT = "run normkit reproduce again, which repeats no run that has a record"


class Run(Frozen):
    """One run of a cell.

    Args:
        seed: Of weights and order.
        score: In percent, in the table's measure, or what was read; None if the training diverged.
        learning_rate: Base learning rate.
    """

    seed: int
    score: float | None
    learning_rate: float


class Cell(Frozen):
    """One arm in one part at one batch size: its score, or a reading."""

    arm: str
    part: str
    batch_size: int
    reading: str = ""
    runs: tuple[Run, ...]

    @property
    def at(self) -> At:
        """Where it is in the table."""
        return At(self.arm, self.part, self.batch_size, self.reading)

    @property
    def scores(self) -> list[float]:
        """Scores of the runs that have one."""
        return [run.score for run in self.runs if run.score is not None]

    def __str__(self) -> str:
        """Mean and 95 % interval over seeds, and how many runs diverged."""
        scores, lost = self.scores, len(self.runs) - len(self.scores)
        said = f"{lost} of {len(self.runs)} diverged" if lost else ""
        if not scores:
            return said or MISSING
        mean = statistics.fmean(scores)
        digits = 2 if abs(mean) >= 10 or not self.reading else 3
        text = f"{mean:.{digits}f}"
        if len(scores) > 1:
            text += f" ± {half_width(statistics.stdev(scores), len(scores)):.{digits}f}"
        return f"{text} ({said})" if said else text


class Column(NamedTuple):
    """A part, a batch size and a reading, which is empty for scores."""

    part: str
    batch_size: int
    reading: str = ""


class Results(NamedTuple):
    """The records of a part: of its trainings, if there were any, and of its readings."""

    trained: Sequence[TrainingRecord] | None
    readings: Sequence[ReadingRecord]


class TableResult(Frozen):
    """A table that was run.

    Args:
        preset: Its name.
        paper: Authors and title.
        place: In the paper.
        title: What it shows.
        scale: How large it was run.
        measured: What the scores are.
        differences: From the paper's settings.
        silent: Settings that the paper does not state, and ours.
        cells: All of them.
        readings: What each reading is, by name.
        numbers: The paper's.
        claims: With their verdicts.
        code_hash: Of normkit's code.
        duration_s: Of all runs together.
    """

    preset: str
    paper: str
    place: str
    title: str
    scale: Scale
    measured: str
    differences: tuple[str, ...]
    silent: tuple[str, ...]
    cells: tuple[Cell, ...]
    readings: Mapping[str, str] = Field(default_factory=dict)
    numbers: Numbers
    claims: tuple[Judged, ...]
    code_hash: str
    duration_s: float

    @property
    def columns(self) -> list[Column]:
        """Parts, batch sizes and readings, in the order of the file."""
        return list(dict.fromkeys(Column(*cell.at[1:]) for cell in self.cells))

    @property
    def arms(self) -> list[str]:
        """Labels of the arms."""
        return list(dict.fromkeys(cell.arm for cell in self.cells))

    def cell(self, arm: str, column: Column) -> Cell | None:
        """One cell; None where the table has none."""
        return next((cell for cell in self.cells if cell.at == At(arm, *column)), None)

    @property
    def num_seeds(self) -> int:
        """Runs of a cell, at most."""
        return max(len(cell.runs) for cell in self.cells)


def conclude_table(
    table: Table, scale: Scale, found: Sequence[tuple[Part, Results]]
) -> TableResult:
    """Judge every claim of a table by the records of its parts."""
    cells = tuple(cell for part, results in found for cell in cells_of(table, part, results))
    parts, results = [part for part, _ in found], [results for _, results in found]
    trained = [record for each in results for record in each.trained or ()]
    read = [record for each in results for record in each.readings]
    splits = joined(dict.fromkeys(part.on for part in parts))
    score = table.score if any(part.trained for part in parts) else "of given weights"
    return TableResult(
        preset=table.name,
        paper=str(table.cited),
        place=table.place,
        title=table.title,
        scale=scale,
        measured=f"{splits} {table.measure}, {score}, %",
        differences=table.differences(scale),
        silent=table.unstated(),
        cells=cells,
        readings={
            n: table.readings[n] for n in table.readings if any(n in p.readings for p in parts)
        },
        numbers=table.numbers,
        claims=judged(table, scale, cells),
        code_hash=joined(sorted({record.code_hash for record in (*trained, *read)})),
        duration_s=round(sum(record.duration_s for record in (*trained, *read)), 1),
    )


def judged(table: Table, scale: Scale, cells: Sequence[Cell]) -> tuple[Judged, ...]:
    """The claims of a table with the verdicts that its cells give."""
    by_seed = _by_seed(cells)
    return tuple(
        Judged(
            source=claim.source,
            claim=claim.text,
            quantity=claim.quantity,
            criterion=claim.criterion,
            verdict=judge([quantity(scores) for scores in by_seed.values()], claim.criterion),
        )
        for claim, quantity in table.claims_at(scale)
    )


def cells_of(table: Table, part: Part, results: Results) -> list[Cell]:
    """The cells of a part."""
    runs: dict[At, list[Run]] = {}
    for record, taken in _by_run(results):
        spec = record if isinstance(record, TrainingSpec) else record.spec
        for reading in ("", *part.readings):
            at = At(part.label(spec.norm), part.name, spec.batch_size, reading)
            score = _number(table, part, record, taken, reading)
            rate = spec.protocol.base_lr
            runs.setdefault(at, []).append(Run(seed=spec.seed, score=score, learning_rate=rate))
    return [
        Cell(arm=at.arm, part=at.part, batch_size=at.batch_size, reading=at.reading, runs=of)
        for at in (
            At(label, part.name, size, reading)
            for label in part.arms
            for size in part.sweep.batch_sizes
            for reading in ("", *part.readings)
        )
        for of in (tuple(runs.get(at, ())),)
    ]


def _by_run(results: Results) -> list[tuple[TrainingRecord | TrainingSpec, Mapping[str, Taken]]]:
    """The record of each training, or its spec if there was none, and what was read then."""
    read = {record.spec.training.key: record for record in results.readings}
    if results.trained is None:
        return [(record.spec.training, record.values) for record in results.readings]
    nothing: Mapping[str, Taken] = {}
    return [
        (record, read[record.spec.key].values if record.spec.key in read else nothing)
        for record in results.trained
    ]


def _number(
    table: Table,
    part: Part,
    run: TrainingRecord | TrainingSpec,
    taken: Mapping[str, Taken],
    name: str,
) -> float | None:
    """The score of a run, or a reading of it, in the units of the table."""
    reading = part.readings.get(name, Reading(state=PLAIN))
    if name and not reading.of_network and isinstance(run, TrainingRecord):
        diverged = run.outcome.status == "diverged"
        value = None if diverged else reading.of_epochs(run.outcome.epochs)
    elif not name and isinstance(run, TrainingRecord):
        value = _score(table, part, run.outcome)
    else:
        value = reading.value(taken, part.on) if reading.state in taken else None
    if value is None or not reading.is_share:
        return value
    return round(100 * value if table.measure == "accuracy" else 100 - 100 * value, 4)


def _score(table: Table, part: Part, outcome: Outcome) -> float | None:
    """The share of right answers of a training that did not diverge."""
    median = table.score != "last epoch"
    if part.on == "test":
        last_five = outcome.test_accuracy_median_of_5
        return last_five if median and last_five is not None else outcome.test_accuracy
    if outcome.status == "diverged" or not outcome.epochs:
        return None
    found = [epoch.validation_accuracy for epoch in outcome.epochs[-NUM_LAST_EPOCHS:]]
    return statistics.median(found) if median else found[-1]


def _by_seed(cells: Sequence[Cell]) -> dict[int, Mapping[At, float | None]]:
    found: dict[int, dict[At, float | None]] = {}
    for cell in cells:
        for run in cell.runs:
            found.setdefault(run.seed, {})[cell.at] = run.score
    return dict(found)


def write_table(folder: Path, result: TableResult) -> Path:
    """Write a result in one piece.

    Raises:
        DataError: If it cannot be written.
    """
    return write_whole(result_path(folder, result.preset), result.model_dump_json(indent=1) + "\n")


def read_table_result(path: Path) -> TableResult:
    """Read a result.

    Raises:
        DataError: If the file holds none.
    """
    return read_whole(path, TableResult, "result of a table", WAY_OUT)


def table_results_in(folder: Path) -> list[TableResult]:
    """Results of all tables that a folder has, in the order of their names.

    Raises:
        DataError: If one cannot be read.
    """
    paths = [result_path(folder, name) for name in tables()]
    with file_errors(folder):
        return [read_table_result(path) for path in paths if path.exists()]
