"""Telling a person at a terminal how far a long pass is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 2.0  # nothing is said about what is over by then
INTERVAL_S = 0.2


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Give the items; from two seconds on, say on a terminal how many are done.

    One line of the standard error is written over and cleared in the end; a file gets nothing.

    Args:
        items: What to go through.
        what: What is done, as in ``"calibrating norms"``.
        total: Number of items, if ``items`` does not know it.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    total = len(items) if total is None and isinstance(items, Sized) else total
    began = said = time.monotonic()
    try:
        for done, item in enumerate(items):
            now = time.monotonic()
            if now - began > PATIENCE_S and now - said > INTERVAL_S:
                said = now
                _say(_line(what, done, total, now - began))
            yield item
    finally:
        if said != began:
            _say("")


def _line(what: str, done: int, total: int | None, elapsed_s: float) -> str:
    if not total:
        return f"{what}: {done} in {elapsed_s:.0f} s"
    rest_s = elapsed_s / max(done, 1) * (total - done)
    return f"{what}: {done} of {total}, about {rest_s:.0f} s left"


def _say(line: str) -> None:
    sys.stderr.write(f"\r\x1b[K{line}")
    sys.stderr.flush()
