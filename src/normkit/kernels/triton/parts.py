"""How a program on tables is split into launches.

Usually one launch is enough: each instance of the kernel takes some groups of channels of all
examples, and needs no other channels. If groups are too wide for that, launches alternate: in one,
each instance takes some channels and sums over examples; in the next, each takes some examples and
sums over channels. Sums are stored between launches; all other steps are computed again.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from normkit.kernels.program import OVER_COLUMNS, OVER_EXAMPLES, TABLES, Program, parsed
from normkit.kernels.shapes import shapes_of


class Part(NamedTuple):
    """One launch of a program on tables.

    Args:
        axes: The axes that an instance of the kernel sums over: ``"both"``, ``"examples"`` or
            ``"columns"``.
        sums: Lines of the sums that it computes.
        results: The results of the program that it stores.
        stored: Lines that it stores for later launches.
    """

    axes: str
    sums: tuple[int, ...]
    results: tuple[str, ...]
    stored: tuple[int, ...]


@lru_cache(maxsize=1024)
def parts_of(text: str, is_wide: bool) -> tuple[Part, ...]:
    """The launches of a program: one, or as few as possible if groups are too wide."""
    program = parsed(text)
    if not is_wide:
        everything = range(len(program.steps))
        return (Part("both", tuple(_sums(program, everything)), tuple(program.results), ()),)
    ways = [_alternating(program, axes) for axes in (OVER_EXAMPLES, OVER_COLUMNS)]
    return min(ways, key=len)


def _sums(program: Program, lines: Iterable[int]) -> list[int]:
    return [i for i in lines if _is_sum(program, i)]


def _is_sum(program: Program, line: int) -> bool:
    step = program.steps[line]
    is_vector = step.name in OVER_COLUMNS and shapes_of(program)[step.tables[0]].kind == "vector"
    return step.name in OVER_EXAMPLES + OVER_COLUMNS and not is_vector


def _alternating(program: Program, first: tuple[str, ...]) -> tuple[Part, ...]:
    """Launches that sum over one axis, then over the other, and so on."""
    place: list[int] = []
    for line, step in enumerate(program.steps):
        at = max((place[t] for t in step.tables), default=0)
        if _is_sum(program, line):
            at += (at % 2 == 0) != (step.name in first)
        place.append(at)
    last = max(place)
    found = list[Part]()
    for i in range(last + 1):
        sums = tuple(line for line in _sums(program, range(len(place))) if place[line] == i)
        results = tuple(
            name
            for name, line in program.results.items()
            if (last if name in TABLES else place[line]) == i
        )
        is_first = i % 2 == 0
        axes = "examples" if (first == OVER_EXAMPLES) == is_first else "columns"
        found.append(Part(axes, sums, results, sums if i < last else ()))
    return tuple(part for part in found if part.sums or part.results)
