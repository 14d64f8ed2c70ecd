"""Programs on tables: a composite's computation on the moments of a map's channels, as steps.

A program is a text. C++ runs it on the CPU (``csrc/table_program.cpp``);
``triton/generated.py`` writes Triton kernels from it. ``core.trace`` makes the program from a
composite's formula, ``kernels.transpose`` makes the program of its gradient. Each line is a step
that computes one table::

    N 256 multiply 4 7

The table has one row per example (``N``) or one row (``1``), and here 256 columns. The step's name
follows, then the numbers of the lines whose tables it takes, then plain numbers. A table of one row
or one value is broadcast. The first line of the text has the number of channels, its last lines
the results.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

STEPS = {
    # inputs: moments of the map's channels; in a gradient's program, sums over each segment
    "mean": "", "var": "", "grad_scale": "", "grad_center": "",
    # a parameter; statistics that the call gives or the forward pass has kept (0: mean, 1: var)
    "parameter": "i", "given": "i", "kept": "i",
    # numbers: weight of the input's statistics, 1 / examples, 1 / positions, and constants
    "share": "", "inverse_examples": "", "inverse_size": "", "number": "f",
    # elementwise
    "add": "tt", "subtract": "tt", "multiply": "tt", "rsqrt": "t", "sigmoid": "t",
    # along rows: softmax of a row; each value repeated; sums and means of runs of values
    "softmax": "t", "repeat": "ti", "sum_runs": "ti", "mean_runs": "ti",
    # mean of v + (m - M)^2 over runs of columns, or over examples; takes v, m and M, the mean of m
    "spread_runs": "ttti", "spread_examples": "ttt",
    "sum_examples": "t", "mean_examples": "t",
    # columns from the given one on; the table between zeros, from the given column on; two tables
    # beside each other
    "slice": "ti", "pad": "ti", "join": "tt",
    # the same table: without a gradient; with its one row repeated for each example
    "detach": "t", "each_example": "t",
}  # fmt: skip
"""Arguments of each step: tables (t), integers (i), floats (f)."""
OVER_EXAMPLES = ("sum_examples", "mean_examples", "spread_examples")
OVER_COLUMNS = ("sum_runs", "mean_runs", "spread_runs")
TABLES = ("scale", "center", "k1", "k2", "k3")
"""Results with one row per example, even if all examples have the same values."""
PER_EXAMPLE = ("mean", "var", "grad_scale", "grad_center", "each_example")


class Step(NamedTuple):
    """One line of a program.

    Args:
        name: One of ``STEPS``.
        tables: Lines whose tables the step takes.
        numbers: Plain numbers that the step takes.
        per_example: Whether the step's table has one row per example.
        columns: Number of columns of the step's table.
    """

    name: str
    tables: tuple[int, ...]
    numbers: tuple[float, ...]
    per_example: bool
    columns: int

    def __str__(self) -> str:
        """The step's line in the text."""
        rows = "N" if self.per_example else "1"
        return " ".join([rows, str(self.columns), self.name, *map(str, self.tables + self.numbers)])


@dataclass
class Steps:
    """Steps of a program that is being made; a step that exists already is not added twice."""

    channels: int
    made: list[Step] = field(default_factory=list)
    _known: dict[Step, int] = field(default_factory=dict)

    def add(
        self, name: str, *tables: int, numbers: tuple[float, ...] = (), columns: int = 0
    ) -> int:
        """Add a step and return its line; ``columns`` is 0 if they are those of its tables."""
        if name in ("multiply", "add") and tables[0] > tables[1]:
            tables = tables[1], tables[0]  # one order, so that equal steps are found
        shapes = [self.made[t] for t in tables]
        columns = columns or max(s.columns for s in shapes)
        per_example = any(s.per_example for s in shapes) and name not in OVER_EXAMPLES
        if not tables or name == "each_example":
            per_example = name in PER_EXAMPLE
        return self._keep(Step(name, tables, numbers, per_example, columns))

    def number(self, value: float) -> int:
        """Add a constant."""
        return self._keep(Step("number", (), (float(value),), False, 1))

    def scaled(self, table: int, factor: float) -> int:
        """Add the product of a table and a constant."""
        return table if factor == 1 else self.add("multiply", table, self.number(factor))

    def _keep(self, step: Step) -> int:
        number = self._known.setdefault(step, len(self.made))
        if number == len(self.made):
            self.made.append(step)
        return number


class Program(NamedTuple):
    """A finished program.

    Args:
        channels: Number of channels of the map.
        moves: How running statistics are updated: ``"average"``, ``"estimates"`` or ``"nothing"``.
        given_from: First of the channels that are normalised by given statistics alone and written
            around the given mean; ``channels`` if there are none.
        kept_columns: Number of columns of the statistics that forward keeps for backward.
        steps: The lines.
        results: Line of each result, by name.
    """

    channels: int
    moves: str
    given_from: int
    kept_columns: int
    steps: tuple[Step, ...]
    results: dict[str, int]

    def __str__(self) -> str:
        """The program's text; equal programs have equal texts."""
        head = f"{self.channels} {self.moves} {self.given_from} {self.kept_columns}"
        results = (f"= {name} {line}" for name, line in self.results.items())
        return "\n".join((head, *map(str, self.steps), *results))

    def needed(self, lines: Iterable[int], leaves: Iterable[int] = ()) -> list[int]:
        """These lines and all that they are computed from, in order; ``leaves`` end the search."""
        found, waiting, leaves = set[int](), list(lines), set(leaves)
        while waiting:
            line = waiting.pop()
            if line not in found:
                found.add(line)
                waiting += self.steps[line].tables if line not in leaves else ()
        return sorted(found)


def finished(
    steps: Steps, results: dict[str, int], moves: str, given_from: int, kept_columns: int
) -> Program:
    """The program that computes these results, without unused steps."""
    everything = Program(
        steps.channels, moves, given_from, kept_columns, tuple(steps.made), results
    )
    lines = everything.needed(results.values())
    place = {line: i for i, line in enumerate(lines)}
    kept = [steps.made[line] for line in lines]
    renumbered = tuple(s._replace(tables=tuple(place[t] for t in s.tables)) for s in kept)
    return everything._replace(
        steps=renumbered, results={name: place[line] for name, line in results.items()}
    )


@lru_cache(maxsize=4096)
def parsed(text: str) -> Program:
    """Read a program from its text."""
    head, *lines = text.split("\n")
    channels, moves, given_from, kept_columns = head.split()
    steps, results = [], {}
    for line in lines:
        rows, *words = line.split()
        if rows == "=":
            results[words[0]] = int(words[1])
        else:
            steps.append(_step(rows, *words))
    return Program(int(channels), moves, int(given_from), int(kept_columns), tuple(steps), results)


def _step(rows: str, columns: str, name: str, *words: str) -> Step:
    count = STEPS[name].count("t")
    read = float if STEPS[name].endswith("f") else int
    numbers = tuple(read(word) for word in words[count:])
    return Step(name, tuple(map(int, words[:count])), numbers, rows == "N", int(columns))
