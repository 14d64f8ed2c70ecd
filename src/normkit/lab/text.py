"""How figures are written, in the reports and in the terminal."""

from collections.abc import Sequence

from normkit.lab.comparison import Comparison, Summary

MINUS = "\N{MINUS SIGN}"
MISSING = "\N{EN DASH}"


def percent(summary: Summary, is_share: bool = True) -> str:
    """A summary of shares in percent: ``"97.31 ± 0.42"``; of other scores as they are."""
    if not is_share:
        return f"{summary.mean:.4g}" + (
            "" if summary.spread is None else f" ± {summary.spread:.2g}"
        )
    spread = "" if summary.spread is None else f" ± {100 * summary.spread:.2f}"
    return f"{100 * summary.mean:.2f}{spread}"


def points(summary: Summary, is_share: bool = True) -> str:
    """A summary of differences in percentage points, with its sign: ``"+0.31 ± 0.42"``."""
    if not is_share:
        spread = "" if summary.spread is None else f" ± {summary.spread:.2g}"
        return f"{signed(summary.mean, '.3g')}{spread}"
    spread = "" if summary.spread is None else f" ± {100 * summary.spread:.2f}"
    return f"{signed(100 * summary.mean)}{spread}"


def signed(value: float, form: str = ".2f") -> str:
    """A difference with its sign.

    Example:
        >>> signed(0.305), signed(12.5, ".3g")
        ('+0.30', '+12.5')
    """
    return f"{MINUS if value < 0 else '+'}{abs(value):{form}}"


def joined(words: Sequence[object], at_end: str = "and") -> str:
    """Words with commas between, and a word before the last.

    Example:
        >>> joined([2, 8, 32])
        '2, 8 and 32'
    """
    *before, last = map(str, words)
    return f"{', '.join(before)} {at_end} {last}" if before else last


def size_text(num_bytes: float) -> str:
    """Bytes in the decimal unit that fits: ``"1.68 MB"``."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"


def duration_text(seconds: float) -> str:
    """Write a duration in the unit (s, min or h) in which it is below 100.

    Example:
        >>> duration_text(240)
        '4 min'
    """
    for limit, unit, size in ((100, "s", 1), (100 * 60, "min", 60)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"


def table_lines(comparison: Comparison) -> list[str]:
    """Scores as a table of plain text: a row for each norm, a column for each batch size."""
    head = ["norm", *(f"batch {size}" for size in comparison.batch_sizes)]
    cells = [
        [comparison.cell(n, size) for size in comparison.batch_sizes] for n in comparison.norms
    ]
    rows = [
        [norm, *(percent(c.accuracy, comparison.is_share) if c.accuracy else MISSING for c in row)]
        for norm, row in zip(comparison.norms, cells, strict=True)
    ]
    return aligned([head, *rows])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of equal columns, the first one to the left and the others to the right.

    Example:
        >>> aligned([["norm", "batch 2"], ["gn:8", "97.3"]])
        ['norm  batch 2', 'gn:8     97.3']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
