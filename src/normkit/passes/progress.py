"""Progress of a long pass, shown on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

DELAY_S = 2.0  # shorter passes show nothing
INTERVAL_S = 0.2  # between two updates of the line


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate over the items; after two seconds, show on the terminal how many are done.

    One line of standard error is updated in place, and cleared at the end. Nothing is written if
    standard error is not a terminal.

    Args:
        items: The items.
        what: Label of the line, as in ``"calibrating norms"``.
        total: Number of items, needed if ``items`` has no length.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    total = len(items) if total is None and isinstance(items, Sized) else total
    began = updated = time.monotonic()
    try:
        for done, item in enumerate(items):
            now = time.monotonic()
            if now - began > DELAY_S and now - updated > INTERVAL_S:
                updated = now
                _write_line(_line(what, done, total, now - began))
            yield item
    finally:
        if updated != began:
            _write_line("")


def _line(what: str, done: int, total: int | None, elapsed_s: float) -> str:
    if not total:
        return f"{what}: {done} in {elapsed_s:.0f} s"
    rest_s = elapsed_s / max(done, 1) * (total - done)
    return f"{what}: {done} of {total}, about {rest_s:.0f} s left"


def _write_line(line: str) -> None:
    sys.stderr.write(f"\r\x1b[K{line}")  # carriage return, then clear to the end of the line
    sys.stderr.flush()
