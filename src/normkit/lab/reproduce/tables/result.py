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
from normkit.lab.task import parse_task
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
        if self.reading and not scores:
            return MISSING  # there is nothing of this to read off the arm's networks
        said = f"{lost} of {len(self.runs)} diverged" if lost else ""
        if not scores:
            return said or MISSING
        mean = statistics.fmean(scores)
        digits = 3 if abs(mean) < (10 if self.reading else 1) else 2
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
    splits = joined(list(dict.fromkeys(part.on for part in parts)))
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
    """The cells of a part: a column for each score of the task, then one for each reading."""
    runs = _by_run(results)
    columns = table.columns_of(part.name)
    found = [(column, "", score) for column, score in columns.items()]
    found += [(column, reading, None) for column in columns for reading in part.readings]
    return [
        Cell(
            arm=label,
            part=column,
            batch_size=size,
            reading=reading,
            runs=tuple(
                Run(
                    seed=run.spec.seed,
                    score=run.number(table, part, reading, score),
                    learning_rate=run.spec.protocol.base_lr,
                )
                for run in runs
                if (run.spec.norm, run.spec.batch_size) == (part.sweep.norms[at], size)
                and run.may_have(score)
            ),
        )
        for column, reading, score in found
        for at, label in enumerate(part.arms)
        for size in part.sweep.batch_sizes
    ]


class _OneRun(NamedTuple):
    """A network: how it was trained, what came out, and what was read off it."""

    spec: TrainingSpec
    outcome: Outcome | None
    taken: Mapping[str, Taken]

    def may_have(self, score: str | None) -> bool:
        """Whether a finished run has the score; a shift of statistics needs norms that have some.

        A run that is not finished might have had it.
        """
        outcome = self.outcome
        if score is None or outcome is None or outcome.status != "finished":
            return True
        return score in outcome.scores

    def number(self, table: Table, part: Part, reading: str, score: str | None) -> float | None:
        """A score, or a reading where one is named, in the units of the table."""
        task = parse_task(part.sweep.protocol.task)
        plain = PLAIN if score is None else f"{PLAIN}: {score}"
        how = part.readings[reading] if reading else Reading.parse(plain, task)
        if not reading and self.outcome is not None:
            value = _score(table, part, self.outcome, score)
        elif not how.of_network and self.outcome is not None:
            value = how.of_epochs(self.outcome)
        else:
            value = how.value(self.taken, part.on) if how.state in self.taken else None
        if value is None or not how.is_share:
            return value
        return round(100 - 100 * value if table.measure == "error" else 100 * value, 4)


def _by_run(results: Results) -> list[_OneRun]:
    read = {record.spec.training.key: record for record in results.readings}
    if results.trained is None:
        return [_OneRun(record.spec.training, None, record.values) for record in results.readings]
    return [
        _OneRun(
            record.spec,
            record.outcome,
            read[record.spec.key].values if record.spec.key in read else {},
        )
        for record in results.trained
    ]


def _score(table: Table, part: Part, outcome: Outcome, name: str | None) -> float | None:
    """A score of the task, by default its first, of a training that did not diverge."""
    name = name or next(iter(outcome.scores), None)
    if name is None or outcome.status == "diverged":
        return None
    median = table.score != "last epoch"
    if part.on == "test":
        is_first = name == next(iter(outcome.scores))
        last_five = outcome.median_of_5 if median and is_first else None
        return outcome.scores.get(name) if last_five is None else last_five
    found = [e.validation_scores.get(name) for e in outcome.epochs[-NUM_LAST_EPOCHS:]]
    values = [value for value in found if value is not None]
    return (statistics.median(values) if median else found[-1]) if values else None


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
