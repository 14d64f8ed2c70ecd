"""The page of a table, and the same for a terminal: our numbers, the paper's, the verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from normkit.lab.reproduce.report import claims_markdown, differences_markdown
from normkit.lab.reproduce.tables.figure import head_of
from normkit.lab.reproduce.tables.result import TableResult
from normkit.lab.reproduce.tables.table import Number, Numbers, Table
from normkit.lab.text import MISSING, duration_text


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
        *([_readings(result.readings).strip()] if result.readings else []),
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
    return "\n".join(
        [
            f"### {result.preset}\n",
            (
                f"{result.title}: {result.paper}, {result.place}. Scale {result.scale}, "
                f"{result.num_seeds} seeds, {duration_text(result.duration_s)} of runs.\n"
            ),
            *differences_markdown(result.differences, result.silent),
            f"![{result.title}]({images}reproduce-{result.preset}.svg)\n",
            (
                f"Ours, {result.measured}: mean ± 95 % interval over seeds; code "
                f"{result.code_hash}.{_readings(result.readings)}\n"
            ),
            *_markdown(ours(result)),
            "",
            *_paper_markdown(result.numbers),
            *claims_markdown(result.claims, "`"),
        ]
    )


def _readings(readings: Mapping[str, str]) -> str:
    """What each reading is."""
    said = "; ".join(f"{name} is {text}" for name, text in readings.items())
    return f" {said}." if said else ""


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


MOST_COLUMNS = 8  # of a page that needs no scrolling


def ours(result: TableResult) -> list[list[str]]:
    """Rows of our numbers, the head first; arms are rows, or columns if there are fewer of them."""
    rows = []
    for arm in result.arms:
        found = [result.cell(arm, column) for column in result.columns]
        rows.append([arm, *(MISSING if cell is None else str(cell) for cell in found)])
    found = [["", *(head_of(column, result) for column in result.columns)], *rows]
    is_wide = len(result.columns) > max(MOST_COLUMNS, len(rows))
    return [list(row) for row in zip(*found, strict=True)] if is_wide else found


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
