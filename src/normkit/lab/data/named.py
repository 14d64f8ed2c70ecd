"""Names of data with options behind them, such as ``scenes:side=96``."""

from dataclasses import dataclass, fields
from typing import TypeVar

from normkit.errors import SpecError
from normkit.text import printable

MAX_DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of named data: whole numbers and names, each with a default."""


O = TypeVar("O", bound=Options)  # noqa: E741 - it stands for options


def read_options(kind: type[O], text: str) -> O:
    """Read ``NAME:key=value:key=value``.

    Args:
        kind: The options and their defaults.
        text: The name and what follows it.

    Raises:
        SpecError: If a key is unknown or there twice, or a value is not of its kind.
    """
    known = {field.name: field.default for field in fields(kind)}
    values: dict[str, int | str] = {}
    for argument in text.split(":")[1:]:
        key, _, value = argument.partition("=")
        whole = isinstance(known.get(key), int)
        fits = value.isdecimal() and len(value) <= MAX_DIGITS and int(value) > 0 if whole else value
        if key not in known or key in values or not fits:
            rules = ", ".join(
                f"{name}={'N' if isinstance(default, int) else 'NAME'}"
                for name, default in known.items()
            )
            raise SpecError(
                f"data {printable(text)!r} has the argument {printable(argument)!r}; it takes "
                f"{rules}, each once, with N a whole number from 1"
            )
        values[key] = int(value) if whole else value
    return kind(**values)  # type: ignore[arg-type]
