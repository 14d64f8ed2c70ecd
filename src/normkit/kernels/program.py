"""Programs on tables: what a composite does to the moments of a map's channels, step by step.

A program is text that C++ runs on the CPU (``csrc/table_program.cpp``) and that Triton kernels are
written from (``triton/generated.py``); ``core.trace`` makes it from a composite's formula and
``kernels.transpose`` its gradient. Each line is a step and makes one table::

    N 256 multiply 4 7

A table has a row for each example (``N``) or one row for all (``1``); here 256 columns; then the
step's name, and the numbers of the lines whose tables it takes, or plain numbers. A table of one
row, or of one value, is used with every row, or with every value, of another. Before the steps the
text says for how many channels it is, after them which tables come out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

STEPS = {
    # what is given: the moments of the map's channels and, for a gradient, sums over each segment
    "mean": "", "var": "", "grad_scale": "", "grad_center": "",
    # a parameter, statistics that somebody gives or that the forward pass kept (mean 0, var 1)
    "parameter": "i", "given": "i", "kept": "i",
    # numbers: the share of what the input says, 1 / examples, 1 / positions, and constants
    "share": "", "inverse_examples": "", "inverse_size": "", "number": "f",
    # value by value
    "add": "tt", "subtract": "tt", "multiply": "tt", "rsqrt": "t", "sigmoid": "t",
    # along rows: softmax of a row; each value several times; sums and means of runs of values
    "softmax": "t", "repeat": "ti", "sum_runs": "ti", "mean_runs": "ti",
    # mean of v + (m - M)^2 over runs of columns, or over examples; takes v, m and M, the mean of m
    "spread_runs": "ttti", "spread_examples": "ttt",
    "sum_examples": "t", "mean_examples": "t",
    # columns from the first on, as many as the table has; among as many zeros; one beside another
    "slice": "ti", "pad": "ti", "join": "tt",
    # the same table: without a gradient; a row of all examples as a row for each
    "detach": "t", "each_example": "t",
}  # fmt: skip
"""What each step takes: tables (t), whole numbers (i), numbers (f)."""
OVER_EXAMPLES = ("sum_examples", "mean_examples", "spread_examples")
OVER_COLUMNS = ("sum_runs", "mean_runs", "spread_runs")
TABLES = ("scale", "center", "k1", "k2", "k3")
"""Results for each channel of each example, also where all examples have the same."""
PER_EXAMPLE = ("mean", "var", "grad_scale", "grad_center", "each_example")


class Step(NamedTuple):
    """One line of a program.

    Args:
        name: One of ``STEPS``.
        tables: Which lines it takes.
        numbers: Plain numbers that it takes.
        per_example: Whether its table has a row for each example.
        columns: Of its table.
    """

    name: str
    tables: tuple[int, ...]
    numbers: tuple[float, ...]
    per_example: bool
    columns: int

    def __str__(self) -> str:
        """The line."""
        rows = "N" if self.per_example else "1"
        return " ".join([rows, str(self.columns), self.name, *map(str, self.tables + self.numbers)])


@dataclass
class Steps:
    """A program in the making; the same step is never made twice."""

    channels: int
    made: list[Step] = field(default_factory=list)
    _known: dict[Step, int] = field(default_factory=dict)

    def add(
        self, name: str, *tables: int, numbers: tuple[float, ...] = (), columns: int = 0
    ) -> int:
        """Add a step and return its number; ``columns`` where they are not those of its tables."""
        if name in ("multiply", "add") and tables[0] > tables[1]:
            tables = tables[1], tables[0]  # the same step, however it is written
        shapes = [self.made[t] for t in tables]
        columns = columns or max(s.columns for s in shapes)
        per_example = any(s.per_example for s in shapes) and name not in OVER_EXAMPLES
        if not tables or name == "each_example":
            per_example = name in PER_EXAMPLE
        return self._keep(Step(name, tables, numbers, per_example, columns))

    def number(self, value: float) -> int:
        """A constant."""
        return self._keep(Step("number", (), (float(value),), False, 1))

    def scaled(self, table: int, factor: float) -> int:
        """A table times a constant."""
        return table if factor == 1 else self.add("multiply", table, self.number(factor))

    def _keep(self, step: Step) -> int:
        number = self._known.setdefault(step, len(self.made))
        if number == len(self.made):
            self.made.append(step)
        return number


class Program(NamedTuple):
    """A program that is finished.

    Args:
        channels: Of the map.
        moves: What running statistics do: ``"average"``, ``"estimates"`` or ``"nothing"``.
        given_from: First of the channels whose own moments have no say, which are written around
            the given mean; their number where there are none such.
        kept_columns: Of the statistics that the forward pass keeps for the other.
        steps: The lines.
        results: Names of what comes out, and the line of each.
    """

    channels: int
    moves: str
    given_from: int
    kept_columns: int
    steps: tuple[Step, ...]
    results: dict[str, int]

    def __str__(self) -> str:
        """The text; of the same program always the same."""
        head = f"{self.channels} {self.moves} {self.given_from} {self.kept_columns}"
        results = (f"= {name} {line}" for name, line in self.results.items())
        return "\n".join((head, *map(str, self.steps), *results))

    def needed(self, lines: Iterable[int], leaves: Iterable[int] = ()) -> list[int]:
        """These lines and what they are computed from, in order; not what ``leaves`` are."""
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
    """The program that computes these results, without the steps that none needs."""
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
    """The program of a text."""
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
