"""How reports say things: tables of plain text, names of modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table_lines(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Lines of a table, its columns aligned to the left.

    Example:
        >>> table_lines([("name", "spec"), ("bn1", "gn:32")])
        ['  name  spec', '  bn1   gn:32']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return [indent + "  ".join(row).rstrip() for row in padded]


def shortened(said: object, at_most: int = 240) -> str:
    r"""What an error says, or any text, in one line.

    Example:
        >>> shortened(ValueError("first line,\n  second"), at_most=12)
        'first line, ...'
    """
    text = " ".join(str(said).split())
    return text if len(text) <= at_most else f"{text[:at_most]}..."


def module_name(name: str) -> str:
    """Name of a module in a report; the model's own is empty.

    Example:
        >>> module_name("")
        'the model itself'
    """
    return name or "the model itself"


def escaped(text: str) -> str:
    r"""A text in which control characters are written out, so that none reaches a terminal.

    Lines stay lines.

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
    r"""A name that came from outside, such as a file's, for a sentence: in one line, and cut.

    Example:
        >>> printable("a\nb"), printable("weight" * 100, at_most=6)
        ('a\\nb', 'weight...')
    """
    shown = escaped(str(name)[: at_most + 1]).replace("\n", "\\n")
    return shown if len(shown) <= at_most else f"{shown[:at_most]}..."


def listed(names: Iterable[object], at_most: int = 5) -> str:
    """The first few names, and how many there are more.

    Example:
        >>> listed("abcdefg", at_most=2)
        'a, b and 5 more'
    """
    found = list(names)
    rest = len(found) - at_most
    return ", ".join(map(printable, found[:at_most])) + (f" and {rest} more" if rest > 0 else "")
