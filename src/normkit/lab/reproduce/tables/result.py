"""What a table came to: scores of all runs, and whether the paper's claims held."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from normkit.lab.figures import Curve, draw_curves, figure_file
from normkit.lab.files import file_errors, write_whole
from normkit.lab.frozen import Frozen
from normkit.lab.lines import read_whole
from normkit.lab.records import TrainingRecord
from normkit.lab.reproduce.preset import Scale
from normkit.lab.reproduce.report import Judged, claims_markdown, result_path
from normkit.lab.reproduce.tables.catalog import tables
from normkit.lab.reproduce.tables.quantity import At
from normkit.lab.reproduce.tables.table import Number, Numbers, Part, Table
from normkit.lab.reproduce.verdict import judge
from normkit.lab.student import half_width
from normkit.lab.text import MISSING, joined

WAY_OUT = "run normkit reproduce again, which repeats no run that has a record"


class Run(Frozen):
    """One run of a cell.

    Args:
        seed: Of weights and order.
        score: In percent, in the table's measure; None if the training diverged.
        learning_rate: Base learning rate.
    """

    seed: int
    score: float | None
    learning_rate: float


class Cell(Frozen):
    """One arm in one part at one batch size."""

    arm: str
    part: str
    batch_size: int
    runs: tuple[Run, ...]

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
        text = f"{statistics.fmean(scores):.2f}"
        if len(scores) > 1:
            text += f" ± {half_width(statistics.stdev(scores), len(scores)):.2f}"
        return f"{text} ({said})" if said else text


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
    numbers: Numbers
    claims: tuple[Judged, ...]
    code_hash: str
    duration_s: float

    @property
    def columns(self) -> list[tuple[str, int]]:
        """Parts and batch sizes, in the order of the file."""
        return list(dict.fromkeys((cell.part, cell.batch_size) for cell in self.cells))

    @property
    def arms(self) -> list[str]:
        """Labels of the arms."""
        return list(dict.fromkeys(cell.arm for cell in self.cells))

    def cell(self, arm: str, part: str, batch_size: int) -> Cell | None:
        """One cell; None where the table has none."""
        wanted = At(arm, part, batch_size)
        return next(
            (c for c in self.cells if At(c.arm, c.part, c.batch_size) == wanted),
            None,
        )

    @property
    def num_seeds(self) -> int:
        """Runs of a cell, at most."""
        return max(len(cell.runs) for cell in self.cells)


def conclude_table(
    table: Table, scale: Scale, found: Sequence[tuple[Part, Sequence[TrainingRecord]]]
) -> TableResult:
    """Judge every claim of a table by the records of its parts."""
    cells = tuple(cell for part, records in found for cell in _cells(table, part, records))
    records = [record for _, of_part in found for record in of_part]
    return TableResult(
        preset=table.name,
        paper=str(table.cited),
        place=table.place,
        title=table.title,
        scale=scale,
        measured=f"test {table.measure}, {table.score}, %",
        differences=table.differences(scale),
        silent=table.unstated(),
        cells=cells,
        numbers=table.numbers,
        claims=judged(table, scale, cells),
        code_hash=joined(sorted({record.code_hash for record in records})),
        duration_s=round(sum(record.duration_s for record in records), 1),
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


def _cells(table: Table, part: Part, records: Sequence[TrainingRecord]) -> list[Cell]:
    return [
        Cell(
            arm=label,
            part=column,
            batch_size=size,
            runs=tuple(
                _run(table, score, record)
                for record in records
                if (record.spec.norm, record.spec.batch_size) == (part.sweep.norms[at], size)
            ),
        )
        for column, score in table.columns_of(part.name).items()
        for at, label in enumerate(part.arms)
        for size in part.sweep.batch_sizes
    ]


def _run(table: Table, score: str | None, record: TrainingRecord) -> Run:
    return Run(
        seed=record.spec.seed,
        score=_score(table, score, record),
        learning_rate=record.spec.protocol.base_lr,
    )


def _score(table: Table, score: str | None, record: TrainingRecord) -> float | None:
    value = record.score if score is None else record.outcome.scores.get(score)
    if score is None and table.score != "last epoch" and record.outcome.median_of_5 is not None:
        value = record.outcome.median_of_5
    if value is None:
        return None
    return round(100 - 100 * value if table.measure == "error" else 100 * value, 4)


def _by_seed(cells: Sequence[Cell]) -> dict[int, Mapping[At, float | None]]:
    found: dict[int, dict[At, float | None]] = {}
    for cell in cells:
        for run in cell.runs:
            at = At(cell.arm, cell.part, cell.batch_size)
            found.setdefault(run.seed, {})[at] = run.score
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


def draw_table(result: TableResult, path: Path) -> None:
    """Draw the scores into a file whose name ends in .svg, .png or .pdf.

    A part with several batch sizes has axes of its own; parts with one share theirs.

    Raises:
        DataError: If it cannot be written.
    """
    sizes: dict[str, list[int]] = {}
    for part, size in result.columns:
        sizes.setdefault(part, []).append(size)
    wide = [part for part, of_part in sizes.items() if len(of_part) > 1]
    single = [part for part in sizes if part not in wide]
    num_axes = len(wide) + bool(single)
    with figure_file(path, figsize=(5 * num_axes, 4), layout="constrained") as figure:
        axes = figure.subplots(1, num_axes, squeeze=False)[0]
        for at, part in enumerate(wide):
            columns = [(part, size) for size in sorted(sizes[part])]
            x = [size for _, size in columns]
            _draw(axes[at], result, columns, x, {"title": part, "x": "batch size"})
            axes[at].set_xscale("log", base=2)
            axes[at].set_xticks(x, list(map(str, x)))
        if single:
            columns = [(part, sizes[part][0]) for part in single]
            _draw(axes[-1], result, columns, range(len(columns)), {"title": "", "x": "part"})
            names = [part or f"batch size {size}" for part, size in columns]
            axes[-1].set_xticks(range(len(columns)), names)


def _draw(
    axes: Any,
    result: TableResult,
    columns: Sequence[tuple[str, int]],
    x: Sequence[int],
    labels: Mapping[str, str],
) -> None:
    curves = []
    for arm in result.arms:
        cells = [result.cell(arm, part, size) for part, size in columns]
        there = [(at, cell) for at, cell in zip(x, cells, strict=True) if cell and cell.scores]
        if there:
            fewest = min(len(cell.scores) for _, cell in there)
            values = np.array([cell.scores[:fewest] for _, cell in there]).T
            curves.append(Curve(label=arm, x=[at for at, _ in there], values=values))
    draw_curves(axes, curves, {**labels, "y": result.measured})


def table_text(result: TableResult) -> str:
    """A result for a terminal."""
    lines = [
        (
            f"{result.preset}: {result.paper}, {result.place} (scale {result.scale}, "
            f"{result.num_seeds} seeds)"
        ),
        *(f"  {difference}" for difference in result.differences),
        "",
        f"{result.measured}: mean ± 95 % interval over seeds",
        *_aligned(ours(result)),
    ]
    if result.numbers.rows:
        lines += ["", "the paper's", *_aligned(theirs(result.numbers))]
        lines += [f"  {result.numbers.note}"] if result.numbers.note else []
    for one in result.claims:
        lines += ["", *one.lines]
    return "\n".join(lines)


def table_markdown(result: TableResult, images: str = "") -> str:
    """A section: our numbers, the paper's, and the claims with their verdicts.

    Args:
        result: Of the table.
        images: What stands before the name of the figure's file.
    """
    differences = "; ".join(result.differences) or "nothing"
    silent = f" The paper does not state {joined(result.silent)}." if result.silent else ""
    return "\n".join(
        [
            f"### {result.preset}\n",
            (
                f"{result.title}: {result.paper}, {result.place}. Scale {result.scale}, "
                f"{result.num_seeds} seeds, {result.duration_s / 60:.0f} minutes of runs. "
                f"Otherwise than in the paper: {differences}.{silent}\n"
            ),
            f"![{result.title}]({images}reproduce-{result.preset}.svg)\n",
            f"Ours, {result.measured}: mean ± 95 % interval over seeds.\n",
            *_markdown(ours(result)),
            "",
            *_paper_markdown(result.numbers),
            *claims_markdown(result.claims, "`"),
        ]
    )


def unrun_markdown(table: Table) -> str:
    """A section of a table that has no result: the paper's settings, numbers and claims."""
    unstated = ", ".join(table.unstated())
    silent = f" Ours, as the paper does not state them: {unstated}." if unstated else ""
    cannot = f" Not as in the paper: {'; '.join(table.cannot)}." if table.cannot else ""
    claims = [f"| {c.text} ({c.source}) | `{c.quantity}` | {c.criterion} |" for c in table.claims]
    settings = [f"- {line}" for line in table.settings("paper")]
    return "\n".join(
        [
            f"### {table.name}\n",
            (
                f"{table.title}: {table.cited}, {table.place}. No result at small scale is kept "
                f"here; `normkit reproduce {table.name}` makes one.{silent}{cannot}\n"
            ),
            "Settings at the paper's scale:\n",
            *settings,
            "",
            *_paper_markdown(table.numbers),
            "| the paper says | measured | claimed |",
            "|---|---|---|",
            *claims,
            "",
        ]
    )


def _paper_markdown(numbers: Numbers) -> list[str]:
    if not numbers.rows:
        return []
    note = [f"{numbers.note}\n"] if numbers.note else []
    return ["The paper's numbers:\n", *_markdown(theirs(numbers)), "", *note]


def ours(result: TableResult) -> list[list[str]]:
    """Rows of our numbers, the head first."""
    has_sizes = len({size for _, size in result.columns}) > 1
    heads = [
        " ".join([part] * bool(part) + [f"batch {size}"] * (has_sizes or not part))
        for part, size in result.columns
    ]
    rows = []
    for arm in result.arms:
        found = [result.cell(arm, part, size) for part, size in result.columns]
        rows.append([arm, *(MISSING if cell is None else str(cell) for cell in found)])
    return [["", *heads], *rows]


def theirs(numbers: Numbers) -> list[list[str]]:
    """Rows of the paper's numbers, the head first."""
    rows = [[name, *map(_number, row)] for name, row in numbers.rows.items()]
    return [["", *numbers.columns], *rows]


def _number(value: Number) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in rows
    ]


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *others = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *others]
