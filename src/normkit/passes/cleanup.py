"""Cleanup that completes even if exceptions or Ctrl-C interrupt it.

Ctrl-C can raise ``KeyboardInterrupt`` at any line, also inside a ``finally`` block that is cleaning
up. Cleanup is therefore a list of steps that may each run several times, and steps are repeated
until all have completed. The list is also run from several nested ``try`` blocks: an outer block
runs it if an interruption comes before the inner block has begun. A launcher may send several
interruptions in a row.
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
CleanupStep = Callable[[], object]
ATTEMPTS = 100
"""Failures, beyond one for each step, after which failing steps are given up.

A step may fail for good, for instance if a device is lost.
"""
LEVELS = 4
"""Number of nested ``try`` blocks that run the cleanup.

This many interruptions in a row can each miss one block without the cleanup being skipped.
"""


def run_cleanup(steps: Iterable[CleanupStep]) -> None:
    """Run all cleanup steps to completion, then raise the exception that interrupted them, if any.

    Args:
        steps: Each must be idempotent and reach the same final state from any state, because steps
            are repeated, possibly in another order.
    """
    steps = list(steps)
    try:
        _close_suspended_contexts(sys.exc_info()[1])
        problem = _run_until_done(steps)
    except BaseException:  # an interruption between two lines of this function
        _run_until_done(steps)
        raise
    if problem is not None:
        raise problem


def _close_suspended_contexts(error: BaseException | None) -> None:
    """Close the context managers that an interruption inside ``contextlib`` left suspended.

    Otherwise Python closes them when the exception is garbage-collected. They would then restore
    outdated state; torch's function modes, for example, are restored this way.
    """
    for _ in range(ATTEMPTS):  # follow the chain of exceptions raised during handling of others
        if error is None:
            return
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename == contextlib.__file__:
                with contextlib.suppress(RuntimeError):  # raised if the frame is still executing
                    frame.clear()
        error = error.__context__


def _run_until_done(steps: Iterable[CleanupStep]) -> BaseException | None:
    """Repeat the steps until all have completed; return the exception that interrupted them."""
    waiting = deque(steps)
    problem: BaseException | None = None
    for _ in range(len(waiting) + ATTEMPTS):
        try:
            while waiting:
                waiting[0]()
                waiting.popleft()
            break
        except BaseException as error:  # noqa: BLE001 - returned once the other steps are done
            # Report the first error, but prefer an interruption over an ordinary error.
            if problem is None or isinstance(problem, Exception):
                problem = error
            waiting.rotate(-1)
    return problem


def call_with_cleanup(work: Callable[[], T], *steps: CleanupStep, levels: int = LEVELS) -> T:
    """Call ``work``, then run all cleanup steps, whether or not it raised; return its result.

    Args:
        work: The function to call.
        steps: Cleanup steps as in ``run_cleanup``; also valid if ``work`` stopped half-way.
        levels: Number of nested ``try`` blocks.
    """
    if torch.compiler.is_compiling():  # the code is traced, so nothing can interrupt it
        result = work()
        run_cleanup(steps)
        return result
    try:
        if levels > 1:
            return call_with_cleanup(work, *steps, levels=levels - 1)
        try:
            return work()
        finally:
            run_cleanup(steps)
    except BaseException:  # an inner block may have been interrupted before its cleanup
        run_cleanup(steps)
        raise


@contextmanager
def block_with_cleanup(begin: Callable[[], T], *steps: CleanupStep) -> Generator[T]:
    """Call ``begin``, run the block, then run all cleanup steps, whether or not it raised.

    Args:
        begin: Called first; the block gets its result.
        steps: Cleanup steps as in ``run_cleanup``; also valid if ``begin`` stopped half-way.

    Example:
        >>> with block_with_cleanup(lambda: print("open") or 3, lambda: print("close")) as number:
        ...     print(number)
        open
        3
        close
    """
    yield from _nested_blocks(begin, steps, LEVELS)


def _nested_blocks(
    begin: Callable[[], T], steps: Iterable[CleanupStep], levels: int
) -> Generator[T]:
    try:
        if levels > 1:
            yield from _nested_blocks(begin, steps, levels - 1)
        else:
            try:
                yield begin()
            finally:
                run_cleanup(steps)
    except BaseException:  # an inner block may have been interrupted before its cleanup
        run_cleanup(steps)
        raise
