"""What a table would take: every arm built as the scale says, and a step of each on random data."""

from __future__ import annotations

from normkit.lab.dry_run import Estimate, estimate
from normkit.lab.frozen import Frozen
from normkit.lab.reproduce.preset import Scale
from normkit.lab.reproduce.tables.table import Table
from normkit.lab.task import parse_task

MOST_EXAMPLES = 16
"""A step of a larger batch is measured with so many examples, and its time and memory scaled."""


class PartEstimate(Frozen):
    """What a part of a table would take.

    Args:
        part: Its name; empty if the table has no parts.
        data: Name of its data set.
        missing: Which files are missing, and what they hold; None if they are there.
        cells: What each arm at each batch size would take.
    """

    part: str
    data: str
    missing: str | None
    cells: tuple[Estimate, ...]


def estimate_table(table: Table, scale: Scale, device: str = "cpu") -> list[PartEstimate]:
    """Build every arm of a table at a scale, and take a step of each.

    Raises:
        NormError: If an arm cannot be built.
    """
    found = []
    for part in table.parts(scale, device):
        protocol = part.sweep.protocol
        data, missing = parse_task(protocol.task).sample(protocol)
        found.append(
            PartEstimate(
                part=part.name,
                data=protocol.data,
                missing=missing,
                cells=tuple(estimate(part.sweep, data, most_examples=MOST_EXAMPLES)),
            )
        )
    return found
