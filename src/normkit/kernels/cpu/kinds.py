"""Names for the numbers that the composites' operators take."""

from __future__ import annotations

from enum import IntEnum


class Kind(IntEnum):
    """Which composite; the numbers are those of csrc/composites.h."""

    BATCH_THEN_GROUP = 0
    GROUP_FIRST = 1
    BATCH_FIRST = 2
    PARALLEL = 3
    SWITCHED = 4
    SWITCHED_WITHOUT_BATCH = 5
    HALVES = 6


class BatchSource(IntEnum):
    """Where a batch stage's statistics come from; as in csrc/composite_operators.cpp."""

    OWN = 0
    ESTIMATES = 1
    GIVEN = 2
