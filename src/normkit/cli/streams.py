"""Standard streams that may be closed, or that cannot write every character."""

import codecs
import os
import select
import shutil
import sys
import unicodedata
from collections.abc import Generator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import NoReturn, TextIO

from rich.console import Console

PLAIN = {
    "\N{PLUS-MINUS SIGN}": "+-",
    "\N{MINUS SIGN}": "-",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{MIDDLE DOT}": ".",
    "\N{HORIZONTAL ELLIPSIS}": "...",
    "\N{RIGHTWARDS ARROW}": "->",
    "\N{LESS-THAN OR EQUAL TO}": "<=",
    "\N{GREATER-THAN OR EQUAL TO}": ">=",
    "\N{SQUARE ROOT}": "sqrt",
    "\N{N-ARY SUMMATION}": "sum",
    "\N{ELEMENT OF}": "in",
    "\N{DOUBLE VERTICAL LINE}": "||",
    "\N{LEFT FLOOR}": "floor(",
    "\N{RIGHT FLOOR}": ")",
    "\N{SUPERSCRIPT TWO}": "^2",
    "\N{SUPERSCRIPT THREE}": "^3",
    "\N{MODIFIER LETTER CAPITAL T}": "^T",
    "\N{MICRO SIGN}": "u",
}
HANDLER = "normkit-plain"
MIN_COLUMNS = 40


class Terminal(Console):
    """A console that raises an error if its pipe is closed, so that the program can handle it."""

    def on_broken_pipe(self) -> NoReturn:
        """Raise the current ``BrokenPipeError`` again."""
        raise  # noqa: PLE0704 - rich calls this while it handles the error


def prepare_streams() -> None:
    """Set up the standard output and error so that any text can be written to them."""
    codecs.register_error(HANDLER, _plainly)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=HANDLER)


@contextmanager
def wide_enough() -> Generator[None]:
    """Format for at least ``MIN_COLUMNS`` columns; a narrower terminal breaks the lines itself."""
    before = os.environ.get("COLUMNS")
    if shutil.get_terminal_size().columns < MIN_COLUMNS:
        os.environ["COLUMNS"] = str(MIN_COLUMNS)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def drop_output() -> None:
    """Discard what is still to be written to the standard output, whose reader is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_closed(stream: TextIO) -> bool:
    """Whether the other end of a pipe is closed."""
    poll = select.poll()
    poll.register(stream, 0)  # no events: poll reports errors in any case
    return bool(poll.poll(0))


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(char: str) -> str:
    """The character in ASCII, or the nearest there is."""
    if char in PLAIN:
        return PLAIN[char]
    name = unicodedata.name(char, "")
    if name.startswith("GREEK "):
        return name.rpartition(" ")[2].lower()
    if name.startswith("BOX DRAWINGS"):
        return {"HORIZONTAL": "-", "VERTICAL": "|"}.get(name.rpartition(" ")[2], "+")
    return unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode() or "?"
