"""What has to be done to its end, wherever an exception or Ctrl-C comes.

An interruption may come at any line, also while something is put back. So a way back is made of
steps that may be done again, and they are repeated until all of them are through. They are called
from several places, one around the other: the outer ones are for interruptions that come before an
inner one has begun. A launcher may send several in a row.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
Step = Callable[[], object]
ATTEMPTS = 100
"""How often steps may fail, after a failure of each, before those that do are given up: a device
may be lost for good."""
LEVELS = 4
"""Places one around the other, and so interruptions in a row that each miss the steps."""


def finish(steps: Iterable[Step]) -> None:
    """Do all steps to their end; what has interrupted them is raised afterwards.

    Args:
        steps: May be done again, and in any order: each leads from anywhere to the same end.
    """
    steps = list(steps)
    try:
        _end_suspended(sys.exc_info()[1])
        problem = _repeated(steps)
    except BaseException:  # a line of it was interrupted
        _repeated(steps)
        raise
    if problem is not None:
        raise problem


def _end_suspended(error: BaseException | None) -> None:
    """Let contexts end now that an interruption inside of ``contextlib`` has left suspended.

    Python would end them once nobody looks at the error any more, when they put back what nobody
    wants any more: torch, for one, has its function modes put back like that.
    """
    for _ in range(ATTEMPTS):  # errors in whose handling others came
        if error is None:
            return
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename == contextlib.__file__:
                with contextlib.suppress(RuntimeError):  # it still runs
                    frame.clear()
        error = error.__context__


def _repeated(steps: Iterable[Step]) -> BaseException | None:
    """Repeat the steps until all are through; give what has interrupted them."""
    waiting = deque(steps)
    problem: BaseException | None = None
    for _ in range(len(waiting) + ATTEMPTS):
        try:
            while waiting:
                waiting[0]()
                waiting.popleft()
            break
        except BaseException as error:  # noqa: BLE001 - given, once the others are done
            if problem is None or isinstance(problem, Exception):  # Ctrl-C counts more than errors
                problem = error
            waiting.rotate(-1)
    return problem


def surely(work: Callable[[], T], *end: Step, levels: int = LEVELS) -> T:
    """Do the work and then, whatever has become of it, all steps; give the work's result.

    Args:
        work: What is done.
        end: Steps as ``finish`` takes them; right also after a part of the work.
        levels: How often they are called from one place around the other.
    """
    if torch.compiler.is_compiling():  # traced, where nothing interrupts
        result = work()
        finish(end)
        return result
    try:
        if levels > 1:
            return surely(work, *end, levels=levels - 1)
        try:
            return work()
        finally:
            finish(end)
    except BaseException:  # also where a line further inside was interrupted
        finish(end)
        raise


@contextmanager
def between(begin: Callable[[], T], *end: Step) -> Generator[T]:
    """Do the one, run the block, do the others: ``surely`` for a block.

    Args:
        begin: Its result is what the block gets.
        end: Steps as ``finish`` takes them; right also after a part of ``begin``.

    Example:
        >>> with between(lambda: print("open") or 3, lambda: print("close")) as number:
        ...     print(number)
        open
        3
        close
    """
    yield from _held(begin, end, LEVELS)


def _held(begin: Callable[[], T], end: Iterable[Step], levels: int) -> Generator[T]:
    try:
        if levels > 1:
            yield from _held(begin, end, levels - 1)
        else:
            try:
                yield begin()
            finally:
                finish(end)
    except BaseException:  # as in ``surely``
        finish(end)
        raise
