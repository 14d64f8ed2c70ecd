"""Formatting of texts in reports and errors: tables, names and lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table_lines(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Return the lines of a table with left-aligned columns.

    Example:
        >>> table_lines([("name", "spec"), ("bn1", "gn:32")])
        ['  name  spec', '  bn1   gn:32']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return [indent + "  ".join(row).rstrip() for row in padded]


def shortened(said: object, at_most: int = 240) -> str:
    r"""Return the text of an error or another object in one line, cut off after ``at_most``.

    Example:
        >>> shortened(ValueError("first line,\n  second"), at_most=12)
        'first line, ...'
    """
    text = " ".join(str(said).split())
    return text if len(text) <= at_most else f"{text[:at_most]}..."


def module_name(name: str) -> str:
    """Return the name of a module for a report; the name of the model itself is empty.

    Example:
        >>> module_name("")
        'the model itself'
    """
    return name or "the model itself"


def escaped(text: str) -> str:
    r"""Escape the control characters of a text, so that none reaches a terminal.

    Line breaks stay.

    Example:
        >>> print(escaped("first\x1b[2J\nsecond"))
        first\x1b[2J
        second
    """
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def printable(name: object, at_most: int = 300) -> str:
    r"""Escape and cut off a name from outside, such as a file name, so that it fits a sentence.

    Example:
        >>> printable("a\nb"), printable("weight" * 100, at_most=6)
        ('a\\nb', 'weight...')
    """
    shown = escaped(str(name)[: at_most + 1]).replace("\n", "\\n")
    return shown if len(shown) <= at_most else f"{shown[:at_most]}..."


def by_reason(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Group ``(name, reason)`` pairs by reason: each reason once, with its names joined by commas.

    Example:
        >>> by_reason([("bn1", "frozen"), ("gn", "no buffers"), ("bn2", "frozen")])
        {'frozen': 'bn1, bn2', 'no buffers': 'gn'}
    """
    found: dict[str, str] = {}
    for name, reason in pairs:
        found[reason] = f"{found[reason]}, {name}" if reason in found else name
    return found


def listed(names: Iterable[object], at_most: int = 5) -> str:
    """Join the first few names, and say how many more there are.

    Example:
        >>> listed("abcdefg", at_most=2)
        'a, b and 5 more'
    """
    found = list(names)
    rest = len(found) - at_most
    return ", ".join(map(printable, found[:at_most])) + (f" and {rest} more" if rest > 0 else "")


def parts_of(text: str) -> tuple[str, ...]:
    """The parts of a text between its commas, without the blanks around them; none is empty."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
