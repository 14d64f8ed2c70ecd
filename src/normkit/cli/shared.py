"""What commands share: flags, lists of numbers, what is said of files."""

import sys
from pathlib import Path

from normkit.errors import SpecError
from normkit.lab.lines import Contents
from normkit.text import printable

MAX_DIGITS = 100  # far beyond every bound; Python refuses to read thousands of digits


def flag(name: str) -> str:
    """How the flag of an option is typed: ``"--batch-sizes"`` for ``"batch_sizes"``."""
    return f"--{name.replace('_', '-')}"


def whole_numbers(flag: str, text: str) -> tuple[int, ...]:
    """Read ``"2,8,32"``.

    Args:
        flag: Name of the flag, for the message.
        text: What it was given.

    Raises:
        SpecError: If a part is not a whole number.
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not part.isdecimal() or len(part) > MAX_DIGITS]
    if wrong:
        raise SpecError(
            f"{flag} was given {text!r}, of which {', '.join(map(repr, wrong))} is no whole "
            f"number; write whole numbers with commas between, such as 2,8,32"
        )
    return tuple(int(part) for part in parts)


def tell_of_corrupt_lines(contents: Contents, path: Path) -> None:
    """Say on the standard error which lines of a file of records are left out, and why."""
    for line in contents.corrupt:
        sys.stderr.write(
            f"normkit: line {line.number} of {printable(path)} is no record "
            f"({printable(line.reason)}); it is left out, the others are used\n"
        )
