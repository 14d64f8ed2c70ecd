"""Functions that commands share: flags, numbers, checks of files, JSON."""

import json
import math
import sys
from pathlib import Path

from torch import Tensor

from normkit.errors import SpecError
from normkit.lab.data import Examples
from normkit.lab.files import usable_folder
from normkit.lab.lines import Contents
from normkit.text import printable

MAX_DIGITS = 100  # far beyond every bound; Python refuses to read thousands of digits
MAX_COUNT = 2**31 - 1


def flag(name: str) -> str:
    """The flag of an option: ``"--batch-sizes"`` for ``"batch_sizes"``."""
    return f"--{name.replace('_', '-')}"


def require_counts(command: object, *names: str, at_most: int = MAX_COUNT) -> None:
    """Check options that are counts; an option that was not given is None.

    Raises:
        SpecError: If an option is below 1 or too large.
    """
    for name in names:
        given = getattr(command, name)
        if given is not None and not 1 <= given <= at_most:
            raise SpecError(
                f"{flag(name)} was given {given}; give 1 or more, and {at_most} at most"
            )


def require_seconds(flag: str, given: float) -> None:
    """Check an option that is a time.

    Raises:
        SpecError: If it is below 0 or not a number.
    """
    if not given >= 0:
        raise SpecError(f"{flag} was given {given}; give 0 or more")


def require_file_name(path: Path, option: str, *suffixes: str) -> None:
    """Check, before any work is done, that a file can be written.

    Raises:
        SpecError: If its name does not end in one of the suffixes.
        DataError: If it cannot be written.
    """
    if path.suffix not in suffixes:
        known = " or ".join(suffixes)
        raise SpecError(f"{option} was given {str(path)!r}; its name ends in {known}")
    usable_folder(path.parent, path.name, option=option)


def batches_of(examples: Examples, at_most: int | None, size: int) -> list[tuple[Tensor, Tensor]]:
    """Cut the first examples, or all if ``at_most`` is None, into batches of inputs and targets."""
    kept = (examples.inputs[:at_most], examples.targets[:at_most])
    return list(zip(*(values.split(size) for values in kept), strict=True))


def whole_numbers(flag: str, text: str) -> tuple[int, ...]:
    """Parse a list of integers such as ``"2,8,32"``.

    Args:
        flag: Name of the flag, for the error message.
        text: The text to parse.

    Raises:
        SpecError: If a part is not a whole number.
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = [p for p in parts if not (p.isascii() and p.isdecimal()) or len(p) > MAX_DIGITS]
    if wrong:
        raise SpecError(
            f"{flag} was given {text!r}, in which {', '.join(map(repr, wrong))} is not a whole "
            f"number; write whole numbers separated by commas, such as 2,8,32"
        )
    return tuple(int(part) for part in parts)


def decimals(flag: str, text: str) -> tuple[float, ...]:
    """Parse a list of numbers such as ``"0.3,1,3"``.

    Args:
        flag: Name of the flag, for the error message.
        text: The text to parse.

    Raises:
        SpecError: If a part is not a finite number.
    """
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (math.nan,)
    if not all(map(math.isfinite, found)):
        raise SpecError(
            f"{flag} was given {text!r}; write numbers separated by commas, such as 0.3,1,3"
        )
    return found


def tell_of_corrupt_lines(contents: Contents, path: Path) -> None:
    """Report on the standard error which lines of a file are not read as records, and why."""
    for line in contents.corrupt:
        sys.stderr.write(
            f"normkit: line {line.number} of {printable(path)} is not a record "
            f"({printable(line.reason)}); it is left out, the others are used\n"
        )


def print_json(value: object) -> None:
    """Print a value as JSON; NaN and infinity, which JSON does not have, become null."""
    sys.stdout.write(json.dumps(_finite(value), allow_nan=False) + "\n")


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
