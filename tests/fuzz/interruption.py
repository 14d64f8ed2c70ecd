"""Exceptions at chosen source lines, and at chosen calls of a user's code."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import NamedTuple
from unittest.mock import patch

import torch

import normkit
from fuzz.bench import Bench
from fuzz.wholeness import differences
from normkit.errors import NormError

OURS = os.path.dirname(normkit.__file__) + os.sep  # noqa: PTH120 - compared with names of code
ERRORS = {each.__name__: each for each in (KeyboardInterrupt, RuntimeError, SystemExit)}
UNSURVIVABLE = {
    ("distributed/accumulate.py", "__enter__"),
    ("distributed/accumulate.py", "__exit__"),
}
"""Functions that Python calls for ``with``; an exception before their first line cannot be handled.

``Probe`` has such ones too; it then ends when it is collected.
"""


class Trial(NamedTuple):
    """Where something is raised.

    Args:
        call: Which call of the user's code raises, from 1; None for no such call.
        line: ``(file, line, occurrence)`` in normkit, counted from that call on if there is one.
        errors: What is raised: at the call, at the line.
    """

    call: int | None = None
    line: tuple[str, int, int] | None = None
    errors: tuple[str, str] = ("KeyboardInterrupt", "KeyboardInterrupt")


class Lines:
    """Notes every source line of normkit that runs, and raises at one of them.

    Args:
        at: ``(file, line, occurrence)`` where to raise; None only notes.
        error: What is raised.
        is_on: Whether lines count from the beginning; else once it is set.
        without: How the names of files begin that do not count.
    """

    def __init__(self, at=None, error=None, is_on=True, without=()):
        self.at, self.error, self.is_on = at, error, is_on
        self.without = tuple(OURS + each for each in without)
        self.seen = Counter()
        self.hit = False

    def run(self, work):
        """Do the work, watched."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            work()
        finally:
            sys.settrace(before)

    def _enter(self, frame, event, arg):
        file = frame.f_code.co_filename
        return self._line if file.startswith(OURS) and not file.startswith(self.without) else None

    def _line(self, frame, event, arg):
        if event == "line" and self.is_on and not self.hit:
            place = frame.f_code.co_filename[len(OURS) :], frame.f_lineno
            self.seen[place] += 1
            if self.at == (*place, self.seen[place]) and _can_be_survived(frame):
                self.hit = True
                raise self.error
        return self._line


def _can_be_survived(frame):
    place = frame.f_code.co_filename[len(OURS) :], frame.f_code.co_name
    if place in UNSURVIVABLE and frame.f_lineno == _first_line(frame.f_code):
        return False
    while frame is not None:
        if frame.f_code.co_name == "__del__":  # Python itself takes exceptions there
            return False
        frame = frame.f_back
    return True


def _first_line(code):
    return min(line for *_, line in code.co_lines() if line and line > code.co_firstlineno)


@contextmanager
def shortened():
    """Shorten slow operations."""
    doctor, gradient = map(import_module, ("normkit.doctor.diagnose", "normkit.tune.gradient"))
    with (
        patch.object(doctor, "DELTAS", doctor.DELTAS[:1]),
        patch.object(doctor, "NUM_SEEDS", 2),
        patch.object(gradient, "NUM_STEPS", 1),
    ):
        yield


@dataclass
class Profile:
    """Record of a tool's run without interruption.

    Args:
        tool: The tool.
        path: A file for what it writes.
        lines: How often each line of normkit runs.
        num_calls: Calls of the user's code.
        changes: What it leaves otherwise than it was.
    """

    tool: object
    path: object
    lines: Counter
    num_calls: int
    changes: list
    _after: dict = field(default_factory=dict)

    def drawn(self, kind, draw):
        """Draw a trial: at a line, at a call, or at a line after a call has raised."""
        errors = draw.choice(list(ERRORS)), draw.choice(list(ERRORS))
        call = None if kind == "line" else draw.randint(1, self.num_calls)
        if kind == "call":
            return Trial(call, None, errors)
        lines = self.lines if call is None else self._lines_after(call, errors)
        return Trial(call, _occurrence(lines, draw) if lines else None, errors)

    def all_lines(self, draw):
        """Give a trial for every line, and one for every call, in any order."""
        found = [Trial(None, (*place, 1)) for place in self.lines]
        found += [Trial(None, (*place, n)) for place, n in self.lines.items() if n > 1]
        found += [Trial(call) for call in range(1, self.num_calls + 1)]
        return draw.sample(found, len(found))

    @shortened()
    def _lines_after(self, call, errors):
        """Find the lines that run once a call of the user's code has raised."""
        if (call, errors[0]) not in self._after:
            lines = Lines(is_on=False, without=self.tool.without)
            _run(Bench(self.tool.prepare, self.path), Trial(call, None, errors), lines)
            self._after[call, errors[0]] = lines.seen
        return self._after[call, errors[0]]


def _occurrence(lines, draw):
    place = draw.choice(list(lines))
    return (*place, draw.choice([1, lines[place], draw.randint(1, lines[place])]))


@shortened()
def profiled(tool, path):
    """Run a tool without interruption, and note all of it."""
    bench, lines = Bench(tool.prepare, path), Lines(without=tool.without)
    before = bench.state()
    bench.calls.arm()
    lines.run(bench.work)
    num_calls = bench.calls.count
    return Profile(tool, path, lines.seen, num_calls, differences(before, bench.state()))


@shortened()
def carried_out(trial, tool, path, benches):
    """Run a trial, and report what differs from the state before, or is wrong.

    Args:
        trial: What is raised.
        tool: The tool.
        path: A file for what it writes.
        benches: One that is still as it was before, if there is one.
    """
    bench = benches.pop() if benches else Bench(tool.prepare, path)
    before = bench.state()
    error = ERRORS[trial.errors[1]]("injected")
    lines = Lines(trial.line, error, trial.call is None, tool.without)
    raised = _run(bench, trial, lines)
    found = list(_swallowed(trial, lines, raised))
    if raised is not None or tool.measures:
        states = [_without(tool.moves, state) for state in (before, bench.state())]
        found += [*differences(*states), *tool.check(bench)]
        if not found and not tool.moves:
            benches.append(bench)
    if found:  # so that this trial does not affect the next one
        torch.set_grad_enabled(True)
        while torch.overrides._get_current_function_mode_stack():
            torch.overrides._pop_mode()
    return found


def _run(bench, trial, lines):
    """Do the work of a bench; give what it raises."""

    def begin():
        lines.is_on = True

    error = None if trial.call is None else ERRORS[trial.errors[0]]("injected")
    bench.calls.arm(trial.call, error, begin)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about what a hook has raised
            lines.run(bench.work)
    except BaseException as raised:  # noqa: BLE001 - whatever was injected, and what it became
        return raised.with_traceback(None)
    finally:
        bench.calls.arm()
    return None


def _swallowed(trial, lines, raised):
    """Report if Ctrl-C was swallowed, or an exception was replaced by an unexpected one."""
    last = trial.errors[1] if lines.hit else None if trial.call is None else trial.errors[0]
    if last not in (None, "RuntimeError", type(raised).__name__):
        yield f"{last} has become {raised!r}"
    if raised is not None and not isinstance(raised, (*ERRORS.values(), NormError)):
        yield f"it raised {raised!r}"


def _without(moves, state):
    return {k: v for k, v in state.items() if not any(part in k for part in moves)}
