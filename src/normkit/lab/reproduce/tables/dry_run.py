"""What a table would take: every arm built as the scale says, and a step of each on random data."""

from __future__ import annotations

import math
from pathlib import Path

from normkit.lab.dry_run import Estimate, Measured, estimate
from normkit.lab.frozen import Frozen
from normkit.lab.reproduce.preset import Scale
from normkit.lab.reproduce.tables.table import Part, Table
from normkit.lab.spec import Protocol
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

    Networks that are not trained are counted as if each batch of an evaluation were a step, which
    it is less than.

    Raises:
        NormError: If an arm cannot be built.
    """
    measured: Measured = {}
    return [_estimate(part, measured) for part in table.parts(scale, device)]


def _estimate(part: Part, measured: Measured) -> PartEstimate:
    protocol = part.sweep.protocol
    data, files = parse_task(protocol.task).sample(protocol)
    plain = protocol.model_copy(update={"weights": None})  # random weights take as long
    sweep = part.sweep.model_copy(update={"protocol": plain})
    cells = estimate(sweep, data, MOST_EXAMPLES, measured)
    if not part.trained:
        num_examples = len(part.states) * (len(data.validation) + len(data.test))
        cells = [
            cell.model_copy(update={"num_steps": math.ceil(num_examples / cell.batch_size)})
            for cell in cells
        ]
    missing = [words for words in (files, _missing_weights(protocol)) if words]
    return PartEstimate(
        part=part.name,
        data=protocol.data,
        missing="; ".join(missing) or None,
        cells=tuple(cells),
    )


def _missing_weights(protocol: Protocol) -> str | None:
    if protocol.weights is None or Path(protocol.weights).exists():
        return None
    return f"{protocol.weights} is not there: weights of {protocol.model} that was trained"
