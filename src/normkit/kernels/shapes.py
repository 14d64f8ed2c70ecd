"""Shapes of a program's tables in a Triton kernel, which holds some channels of some examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from normkit.kernels.program import OVER_COLUMNS, OVER_EXAMPLES, Program, Step

Kind = Literal["cell", "group", "total", "vector", "scalar"]
"""What a table has one value for: each channel (cell); each group of channels; each example
(total). A vector is a parameter of a few values, a scalar one value."""
_SAME = ("add", "subtract", "multiply", "rsqrt", "sigmoid", "softmax", "detach", "each_example")


class Shape(NamedTuple):
    """The shape of a table.

    Args:
        kind: What the columns are.
        start: The map's channel that the first column of cells belongs to.
        is_part: Whether each Triton program has only its own part of a sum over all channels.
            Later steps are linear in it, so the parts of the results add up.
    """

    kind: Kind
    start: int
    is_part: bool


def width_of(program: Program) -> int:
    """Number of channels in a group; 1 if the program does not pool over channels.

    Raises:
        ValueError: If groups have several widths.
    """
    widths = {
        int(step.numbers[0])
        for step in program.steps
        if step.name in ("repeat", "mean_runs", "spread_runs")
    }
    if len(widths) > 1:
        raise ValueError(f"groups of channels have several widths: {sorted(widths)}")
    return widths.pop() if widths else 1


def why_no_kernel(program: Program) -> str | None:
    """Why no Triton kernel can be written for a program, or None."""
    try:
        shapes_of(program)
    except ValueError as error:
        return str(error)
    return None


def shapes_of(program: Program) -> list[Shape]:
    """The shape of each step's table.

    Raises:
        ValueError: If no Triton kernel can be written for the program.
    """
    return _Shapes(program).found()


class _Shapes:
    def __init__(self, program: Program) -> None:
        self.steps, self.width = program.steps, width_of(program)
        self.channels = program.channels
        self.holds_all = self.width == program.channels
        # Union-find: lines whose tables have the same columns form a class, named by its root.
        self.like = list(range(len(self.steps)))
        for line, step in enumerate(self.steps):
            for other in self._alike(step):
                self.like[self._root(other)] = self._root(line)
        self.kinds: dict[int, Kind] = {}
        self.starts: dict[int, int] = {}

    def found(self) -> list[Shape]:
        for line, step in enumerate(self.steps):
            self._note(line, step)
        for _ in self.steps:  # a start may depend on others; repeat until no new one is found
            before = len(self.starts)
            for line, step in enumerate(self.steps):
                self._follow_starts(line, step)
            if len(self.starts) == before:
                break
        parts = self._parts()
        return [
            Shape(self._kind(line), self.starts.get(self._root(line), 0), parts[line])
            for line in range(len(self.steps))
        ]

    def _root(self, line: int) -> int:
        while self.like[line] != line:
            line = self.like[line]
        return line

    def _is_scalar(self, line: int) -> bool:
        return self.steps[line].columns == 1 and not self.steps[line].per_example

    def _alike(self, step: Step) -> Iterator[int]:
        """The step's tables that have the same columns as its result."""
        if step.name in (*_SAME, *OVER_EXAMPLES):
            yield from (
                t
                for t in step.tables
                if self.steps[t].columns == step.columns and not self._is_scalar(t)
            )

    def _note(self, line: int, step: Step) -> None:
        """Record what the step implies about the columns of its result and of its tables."""
        own = self._root(line)
        if step.name in ("mean", "var", "grad_scale", "grad_center"):
            self.kinds[own], self.starts[own] = "cell", 0
        elif step.name == "softmax" or (step.name == "pad" and self._is_scalar(step.tables[0])):
            self.kinds[own] = "vector"
        elif step.name == "repeat" or self._is_grouped(step):
            cells, groups = (
                (line, step.tables[0]) if step.name == "repeat" else (step.tables[0], line)
            )
            if self.steps[cells].columns != self.channels:
                raise ValueError("groups of channels are of some channels alone")
            self.starts[self._root(cells)] = 0
            if not self._is_scalar(groups):
                self.kinds[self._root(groups)] = "group"

    def _is_grouped(self, step: Step) -> bool:
        return step.name in OVER_COLUMNS and int(step.numbers[0]) == self.width > 1

    def _follow_starts(self, line: int, step: Step) -> None:
        if self._kind(line) != "cell" or step.name not in ("slice", "pad", "join"):
            return
        first = 0 if step.name == "join" else int(step.numbers[0])
        for table in step.tables:
            apart = -first if step.name == "slice" else first
            own, other = self._root(line), self._root(table)
            if own in self.starts:
                self.starts.setdefault(other, self.starts[own] + apart)
            elif other in self.starts:
                self.starts[own] = self.starts[other] - apart
            first += self.steps[table].columns if step.name == "join" else 0

    def _kind(self, line: int) -> Kind:
        step = self.steps[line]
        if self._is_scalar(line):
            return "scalar"
        kind = self.kinds.get(self._root(line))
        if kind is not None:
            return kind
        return "total" if step.columns == 1 else "cell"

    def _parts(self) -> list[bool]:
        found: list[bool] = []
        for line, step in enumerate(self.steps):
            of_tables = [found[t] for t in step.tables]
            is_total = step.name == "sum_runs" and self._kind(line) in ("total", "scalar")
            is_part = any(of_tables)
            if is_total and self._kind(step.tables[0]) == "cell" and not self.holds_all:
                is_part = True
            elif is_part and not _is_linear(step, of_tables):
                raise ValueError(f"a sum over all channels goes into a step '{step}'")
            found.append(is_part)
        return found


def _is_linear(step: Step, of_tables: list[bool]) -> bool:
    if step.name == "multiply":
        return sum(of_tables) == 1
    if step.name in ("add", "subtract"):
        return all(of_tables)
    return step.name in ("sum_examples", "sum_runs", "slice", "pad", "detach", "each_example")
