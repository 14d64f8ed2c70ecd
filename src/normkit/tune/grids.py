"""The example weights that are tried by default, and checks of those that the user gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from normkit.core.check import require_share
from normkit.errors import OptionError

GRID = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 1.0)
"""Dense at both ends: small weights are best for batch norms, large ones for norms of examples."""
NEXT_TO_ONE = (0.99, 0.995, 0.998)
"""Also tried if a layer has the weight 1; these mix in a little of the running statistics."""


def grid_for(own: Iterable[float]) -> tuple[float, ...]:
    """Return the weights to try, in rising order, for layers with these present weights.

    Example:
        >>> grid_for([0.0]) == GRID, grid_for([0.0, 1.0])[-4:]
        (True, (0.99, 0.995, 0.998, 1.0))
    """
    return tuple(sorted({*GRID, *(NEXT_TO_ONE if 1.0 in set(own) else ())}))


def read_grid(grid: Sequence[float]) -> tuple[float, ...]:
    """Check the weights to try, and sort them.

    Raises:
        OptionError: If one lies outside 0 to 1, or there is none.
    """
    for alpha in grid:
        require_share("grid", alpha)
    if not grid:
        raise OptionError("grid=() was given; give at least one weight, such as (0.1, 0.3)")
    return tuple(sorted(set(map(float, grid))))
