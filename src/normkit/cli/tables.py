"""Tables of a comparison for the terminal."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from rich.table import Table
from rich.text import Text

from normkit.cli.streams import Terminal
from normkit.lab.comparison import Cell, Comparison
from normkit.lab.records import TrainingRecord
from normkit.lab.text import MINUS, MISSING, percent, points, size_text
from normkit.lab.verdict import Verdict, verdict_of


def print_tables(
    comparison: Comparison, records: Iterable[TrainingRecord], paths: Mapping[str, Path]
) -> None:
    """Print the verdict, accuracy and cost, the runs that did not finish, notes, and paths."""
    console = Terminal()
    verdict = verdict_of(comparison)
    answer, *others = verdict.lines
    console.print(Text(answer, style="bold"), soft_wrap=True)
    for line in others:
        console.print(Text(f"- {line}"), soft_wrap=True)
    console.print(_accuracy_table(comparison, verdict))
    if any(cell.step_time_s is not None for cell in comparison.cells):
        console.print(_cost_table(comparison))
    for note in comparison.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    for record in records:
        if record.outcome.status != "finished":
            console.print(Text(_trouble(record), style="red"), soft_wrap=True)
    for name, path in paths.items():
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True, markup=False)


def _accuracy_table(comparison: Comparison, verdict: Verdict) -> Table:
    what = f"Test {comparison.metric}, %" if comparison.is_share else comparison.metric
    table = _empty_table(comparison, f"{what}: mean ± standard deviation over seeds")
    scored = partial(_accuracy, comparison.is_share)
    for norm in comparison.norms:
        _add_row(table, comparison, norm, norm, scored)
    table.add_section()
    first, *others = comparison.norms
    for norm in others:
        _add_row(table, comparison, f"{norm} {MINUS} {first}", norm, partial(_difference, verdict))
    return table


def _cost_table(comparison: Comparison) -> Table:
    table = _empty_table(comparison, "Time per training step and its peak memory")
    for norm in comparison.norms:
        _add_row(table, comparison, norm, norm, _cost)
    return table


def _empty_table(comparison: Comparison, title: str) -> Table:
    table = Table("norm", title=title, title_justify="left", title_style="bold")
    for size in comparison.batch_sizes:
        table.add_column(f"batch {size}", justify="right")
    return table


def _add_row(
    table: Table, comparison: Comparison, name: str, norm: str, text: Callable[[Cell], str]
) -> None:
    cells = (comparison.cell(norm, size) for size in comparison.batch_sizes)
    table.add_row(Text(name), *(Text(text(cell)) for cell in cells))


def _accuracy(is_share: bool, cell: Cell) -> str:
    lines = [percent(cell.accuracy, is_share)] if cell.accuracy else []
    lines += [f"{cell.num_diverged} diverged"] if cell.num_diverged else []
    lines += [f"{cell.num_failed} failed"] if cell.num_failed else []
    return "\n".join(lines) or MISSING


def _difference(verdict: Verdict, cell: Cell) -> str:
    is_compared = verdict.of(cell.norm, cell.batch_size).mean is not None
    return points(cell.difference, verdict.is_share) if cell.difference and is_compared else MISSING


def _cost(cell: Cell) -> str:
    lines = [] if cell.step_time_s is None else [f"{1000 * cell.step_time_s:.2f} ms"]
    lines += [] if cell.peak_bytes is None else [size_text(cell.peak_bytes)]
    return "\n".join(lines) or MISSING


def _trouble(record: TrainingRecord) -> str:
    spec, outcome = record.spec, record.outcome
    where = f"{spec.norm}, batch size {spec.batch_size}, seed {spec.seed}"
    return f"{where} {outcome.status}: {outcome.message}"
