"""Example weights that differ from example to example, or want a gradient."""

from __future__ import annotations

from torch import Tensor


class ExampleWeights:
    """Stands where a layer has a number: tables ``(N, G)`` are multiplied row by row.

    It equals no number, so that a layer takes the way of a mixture, which is right for 0 and 1 too.

    Args:
        column: Weight of every example, ``(N, 1)``, or ``(1, 1)`` for all of them.
    """

    def __init__(self, column: Tensor) -> None:
        self.column = column

    def __mul__(self, table: Tensor) -> Tensor:
        return self.column * table

    def __rsub__(self, number: float) -> Tensor:
        return number - self.column
