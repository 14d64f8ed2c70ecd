"""Which example weights are tried: dense where the layers' own weights are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from normkit.core.check import require_share
from normkit.errors import OptionError

GRID = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 1.0)
"""Dense at both ends: batch norms want a little of the example, norms of examples nearly all."""
NEXT_TO_ONE = (0.99, 0.995, 0.998)
"""Tried as well where a layer has the weight 1: a little of the running statistics."""


def grid_for(own: Iterable[float]) -> tuple[float, ...]:
    """Weights to try for layers that have these, in rising order.

    Example:
        >>> grid_for([0.0]) == GRID, grid_for([0.0, 1.0])[-4:]
        (True, (0.99, 0.995, 0.998, 1.0))
    """
    return tuple(sorted({*GRID, *(NEXT_TO_ONE if 1.0 in set(own) else ())}))


def read_grid(grid: Sequence[float]) -> tuple[float, ...]:
    """Weights in rising order.

    Raises:
        OptionError: If one is no share, or there is none.
    """
    for alpha in grid:
        require_share("grid", alpha)
    if not grid:
        raise OptionError("grid=() was given; give at least one weight, such as (0.1, 0.3)")
    return tuple(sorted(set(map(float, grid))))
