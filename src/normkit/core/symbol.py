"""Symbols, which stand for tables while a composite's formula is traced: see ``core.trace``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from normkit.errors import InputError, PartitionError
from normkit.kernels.program import Steps

EXAMPLES = None
"""Number of rows of a table with one row per example, which is unknown in a program."""


class UnsupportedStepError(AttributeError):
    """A formula uses an operation for which programs have no step."""


class Symbol:
    """A table ``(N, K)`` of a program; each tensor operation on it adds a step to the program.

    A parameter is a table of one row; a number is one row of one column.
    """

    __slots__ = ("line", "steps")
    dtype = torch.float64

    def __init__(self, steps: Steps, line: int) -> None:
        self.steps, self.line = steps, line

    @property
    def shape(self) -> tuple[int | None, int]:
        """Rows and columns."""
        step = self.steps.made[self.line]
        return (EXAMPLES if step.per_example else 1, step.columns)

    def to(self, dtype: torch.dtype) -> Symbol:
        """Return itself, because programs compute in float64."""
        return self

    def expand_as(self, other: Symbol) -> Symbol:
        """Return itself, because steps broadcast a row to every row of another table."""
        return self

    def detach(self) -> Symbol:
        """The same table without a gradient."""
        return self._new("detach", self)

    def square(self) -> Symbol:
        """The square of each value."""
        return self * self

    def repeat_columns(self, width: int) -> Any:
        """The table with each column repeated ``width`` times."""
        return self._resized("repeat", self.shape[1] * width, width) if width > 1 else self

    def pooled(self, var: Any, num_groups: int, over_examples: bool) -> tuple[Any, Any]:
        """Mean and variance of equal runs of columns, of each example or of all together.

        ``self`` holds the means that are pooled, ``var`` the variances.
        """
        if self.shape[1] % num_groups:
            raise PartitionError(f"{num_groups} groups do not divide {self.shape[1]} channels")
        mean, width = self, self.shape[1] // num_groups
        if width > 1:
            mean = self._resized("mean_runs", num_groups, width)
            var = var._new("spread_runs", var, self, mean, numbers=(width,), columns=num_groups)
        if not over_examples:
            return mean, var
        whole = mean._new("mean_examples", mean)
        return whole, var._new("spread_examples", var, mean, whole)

    def __add__(self, other: Symbol | float) -> Symbol:
        return self._with("add", self, other)

    def __sub__(self, other: Symbol | float) -> Symbol:
        return self._with("subtract", self, other)

    def __rsub__(self, other: float) -> Symbol:
        return self._with("subtract", other, self)

    def __mul__(self, other: Symbol | float) -> Symbol:
        return self._with("multiply", self, other)

    def __neg__(self) -> Symbol:
        return self * -1.0

    def __truediv__(self, other: Symbol | float) -> Symbol:
        if isinstance(other, Symbol):
            raise UnsupportedStepError("no program divides tables: multiply by a torch.rsqrt")
        return self * (1.0 / other)

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedStepError(f"no program has a step for a tensor's {name}")

    __radd__, __rmul__ = __add__, __mul__

    def __getitem__(self, index: tuple[slice, slice]) -> Symbol:
        """The columns of ``table[:, first:stop]``."""
        start, stop, _ = index[1].indices(self.shape[1])
        return self._resized("slice", stop - start, start)

    def __iter__(self) -> Iterator[Symbol]:
        """The values of a row."""
        return (self._resized("slice", 1, i) for i in range(self.shape[1]))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Symbol:
        """Add the step of a torch function."""
        if func not in _FUNCTIONS:
            raise UnsupportedStepError(f"no program has a step for torch's {func.__name__}")
        return _FUNCTIONS[func](*args, **(kwargs or {}))

    def _with(self, name: str, *pair: Symbol | float) -> Symbol:
        """Add an elementwise step; one value per example is repeated over the other's columns."""
        sizes = {t.shape[1] for t in pair if isinstance(t, Symbol)}
        columns = max(sizes)
        if sizes - {1, columns}:
            text = " and ".join(str(size) for size in sorted(sizes))
            raise InputError(f"tables or parameters of {text} channels do not fit each other")
        given = [
            t.repeat_columns(columns) if isinstance(t, Symbol) and t.shape == (EXAMPLES, 1) else t
            for t in pair
        ]
        return self._new(name, *given)

    def _new(
        self, name: str, *given: Symbol | float, numbers: tuple[float, ...] = (), columns: int = 0
    ) -> Symbol:
        lines = [g.line if isinstance(g, Symbol) else self.steps.number(g) for g in given]
        return Symbol(self.steps, self.steps.add(name, *lines, numbers=numbers, columns=columns))

    def _resized(self, name: str, columns: int, *numbers: int) -> Symbol:
        return self._new(name, self, numbers=numbers, columns=columns)


def _lerp(start: Symbol, end: Symbol, weight: Symbol | float) -> Symbol:
    return start + weight * (end - start)


def _softmax(values: Symbol, dim: int) -> Symbol:
    return values._new("softmax", values)


def _join(tables: list[Symbol], dim: int) -> Symbol:
    first, *rest = tables
    for table in rest:
        first = first._new("join", first, table, columns=first.shape[1] + table.shape[1])
    return first


_FUNCTIONS: dict[Callable[..., Any], Callable[..., Symbol]] = {
    torch.rsqrt: lambda t: t._new("rsqrt", t),
    torch.sigmoid: lambda t: t._new("sigmoid", t),
    torch.softmax: _softmax,
    torch.lerp: _lerp,
    torch.cat: _join,
}
