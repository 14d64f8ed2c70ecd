"""The number that decides a claim about a table, written as in ``"BGN(2) - BN(2)"``."""

from __future__ import annotations

import ast
import math
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from normkit.errors import SpecError
from normkit.text import listed


def ratio(left: float, right: float) -> float:
    """A quotient; NaN if the divisor is 0."""
    return left / right if right else math.nan


OPERATORS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: ratio,
}


def spread(values: Sequence[float]) -> float:
    """The largest value minus the smallest."""
    return max(values) - min(values)


FUNCTIONS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "max": max,
    "mean": statistics.fmean,
    "spread": spread,
}
DIVERGED = "diverged"
SIZES: Mapping[str, Callable[[Sequence[int]], Sequence[int]]] = {
    "smallest": lambda sizes: [min(sizes)],
    "largest": lambda sizes: [max(sizes)],
    "all": list,
}


EACH = "each"  # stands for every reading


class At(NamedTuple):
    """A cell of a table: an arm, a part of the table, a batch size, and a reading or none."""

    arm: str
    part: str
    batch_size: int
    reading: str = ""


@dataclass(frozen=True, slots=True)
class Cells:
    """Which cells a table has.

    Args:
        arms: Labels of the arms of each part.
        batch_sizes: Batch sizes of each part.
        readings: Names of the readings of each part.
    """

    arms: Mapping[str, Sequence[str]]
    batch_sizes: Mapping[str, Sequence[int]]
    readings: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """Names of the parts; one without a name if the table has no parts."""
        return list(self.batch_sizes)

    @property
    def every_reading(self) -> list[str]:
        """Names of all readings."""
        names = (name for names in self.readings.values() for name in names)
        return list(dict.fromkeys(names))

    @property
    def every_arm(self) -> set[str]:
        """Labels of all arms."""
        return {arm for arms in self.arms.values() for arm in arms}


class Quantity:
    """A number of a table.

    It is arithmetic on cells. ``BN(8)`` is the score of the arm ``BN`` at batch size 8;
    ``BN(r50)`` that of the part ``r50``, and ``BN(r50, 8)`` both. ``smallest``, ``largest`` and
    ``all`` stand for batch sizes. ``BN(8, tuned)`` is the reading ``tuned`` in place of the score,
    and ``each`` stands for all readings. ``min``, ``max``, ``mean`` and ``spread`` take several
    cells, and ``diverged(BN(8))`` is the share of cells whose run diverged.

    Args:
        text: The expression.
        cells: What the table has.

    Raises:
        SpecError: If it is no such expression, or names what the table does not have.

    Example:
        >>> cells = Cells({"": ["BN", "GN"]}, {"": [2, 8]})
        >>> scores = {At("BN", "", 2): 70.0, At("BN", "", 8): 80.0, At("GN", "", 2): 75.0}
        >>> Quantity("GN(smallest) - BN(2)", cells)(scores)
        5.0
    """

    def __init__(self, text: str, cells: Cells) -> None:
        self.text, self._cells = text, cells
        try:
            self._tree = ast.parse(text, mode="eval").body
        except SyntaxError as error:
            raise self._error(f"is no arithmetic ({error.msg})") from error
        self(dict.fromkeys(self._every(), 1.0))

    def __call__(self, scores: Mapping[At, float | None]) -> float:
        """Compute it from scores; NaN where a score that it needs is None or missing."""
        found = self._value(self._tree, scores)
        if isinstance(found, list):
            raise self._error("gives several numbers; take their mean(...)")
        return found

    def _value(self, node: ast.expr, scores: Mapping[At, float | None]) -> float | list[float]:
        match node:
            case ast.Constant(value=int() | float() as number):
                return float(number)
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -self._number(inner, scores)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                sides = self._number(left, scores), self._number(right, scores)
                return OPERATORS[type(op)](*sides)
            case ast.Call(func=ast.Name(id=name), args=arguments):
                return self._call(name, arguments, scores)
        raise self._error(f"has {ast.unparse(node)!r}, which is neither a number nor a cell")

    def _number(self, node: ast.expr, scores: Mapping[At, float | None]) -> float:
        found = self._value(node, scores)
        if isinstance(found, list):
            raise self._error(f"takes {ast.unparse(node)!r}, which is several numbers, as one")
        return found

    def _call(
        self, name: str, arguments: Sequence[ast.expr], scores: Mapping[At, float | None]
    ) -> float | list[float]:
        if name in FUNCTIONS:
            values = self._several(arguments, scores)
            return math.nan if any(map(math.isnan, values)) else FUNCTIONS[name](values)
        if name == DIVERGED:
            values = self._several(arguments, scores)
            return statistics.fmean(math.isnan(value) for value in values)
        values = [_score(scores.get(at)) for at in self._cells_of(name, arguments)]
        return values[0] if len(values) == 1 else values

    def _several(
        self, arguments: Sequence[ast.expr], scores: Mapping[At, float | None]
    ) -> list[float]:
        found: list[float] = []
        for argument in arguments:
            value = self._value(argument, scores)
            found += value if isinstance(value, list) else [value]
        if not found:
            raise self._error("calls a function without cells")
        return found

    def _cells_of(self, arm: str, arguments: Sequence[ast.expr]) -> list[At]:
        parts, readings, sizes = list[str](), list[str](), list[ast.expr]()
        for argument in arguments:
            name = argument.id if isinstance(argument, ast.Name) else ""
            if name in self._cells.parts and name:
                parts.append(name)
            elif name in self._cells.every_reading:
                readings.append(name)
            elif name == EACH:
                readings += self._cells.every_reading
            else:
                sizes.append(argument)
        found = [
            At(arm, part, size, reading)
            for part in parts or self._cells.parts
            if arm in self._cells.arms[part]
            for size in self._sizes(part, sizes)
            for reading in readings or [""]
            if not reading or reading in self._cells.readings[part]
        ]
        if not found:
            arms, there = listed(sorted(self._cells.every_arm)), self._cells.every_reading
            raise self._error(
                f"names {arm}({', '.join(map(ast.unparse, arguments))}), which the table does not "
                f"have; its arms are {arms}, its parts {self._cells.parts}"
                + (f", its readings {there}" if there else "")
            )
        return found

    def _sizes(self, part: str, given: Sequence[ast.expr]) -> list[int]:
        there = self._cells.batch_sizes[part]
        found: list[int] = []
        for node in given:
            if isinstance(node, ast.Name) and node.id in SIZES:
                found += SIZES[node.id](there)
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, int)
                and node.value in there
            ):
                found.append(next(size for size in there if size == node.value))
            else:
                raise self._error(
                    f"asks for {ast.unparse(node)}; the batch sizes are {list(there)}, smallest, "
                    f"largest and all"
                )
        return found if given else list(there)

    def _every(self) -> list[At]:
        return [
            At(arm, part, size, reading)
            for part, sizes in self._cells.batch_sizes.items()
            for arm in self._cells.arms[part]
            for size in sizes
            for reading in ("", *self._cells.readings.get(part, ()))
        ]

    def _error(self, what: str) -> SpecError:
        return SpecError(f"the quantity {self.text!r} of a claim {what}")


def _score(value: float | None) -> float:
    return math.nan if value is None else value
