"""How reports say things: tables of plain text, names of modules."""

from __future__ import annotations

from collections.abc import Sequence


def table_lines(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Lines of a table, its columns aligned to the left.

    Example:
        >>> table_lines([("name", "spec"), ("bn1", "gn:32")])
        ['  name  spec', '  bn1   gn:32']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return [indent + "  ".join(row).rstrip() for row in padded]


def shortened(error: Exception, at_most: int = 240) -> str:
    r"""What an error says, in one line.

    Example:
        >>> shortened(ValueError("first line,\n  second"), at_most=12)
        'first line, ...'
    """
    text = " ".join(str(error).split())
    return text if len(text) <= at_most else f"{text[:at_most]}..."


def module_name(name: str) -> str:
    """Name of a module in a report; the model's own is empty.

    Example:
        >>> module_name("")
        'the model itself'
    """
    return name or "the model itself"
