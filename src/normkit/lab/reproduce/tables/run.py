"""The runs of a table, by the engine of ``compare``: a folder with a page for each part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from normkit.errors import DataError, SpecError
from normkit.lab.comparison import best_rates
from normkit.lab.experiment import Show, perform
from normkit.lab.launch import num_launched
from normkit.lab.records import TrainingRecord, latest, read_records
from normkit.lab.reproduce.preset import Scale
from normkit.lab.reproduce.tables.result import TableResult, conclude_table
from normkit.lab.reproduce.tables.table import Part, Table
from normkit.lab.work import Way


def run_table(  # noqa: PLR0913 - all but the first two by keyword
    table: Table,
    scale: Scale,
    *,
    folder: Path,
    way: Callable[[Path], Way],
    show: Show,
    tell: Callable[[str], None],
    device: str = "cpu",
) -> TableResult:
    """Do the runs of a table that have no record yet, and judge its claims.

    Args:
        table: What is run.
        scale: How large.
        folder: Gets a folder with the table's name, and in it one for each part, with records and
            a page as ``normkit compare`` writes them.
        way: How the runs of a folder are done.
        show: Displays progress.
        tell: Gets what the user should know before anything runs.
        device: Where each run computes.

    Raises:
        NormError: If data are missing, or something is wrong with the table.
        DataError: If runs failed.
        SpecError: If a part is trained by another number of processes than were started; parts of
            this number are done, and their records kept.
    """
    parts = table.parts(scale, device)
    ours = [part for part in parts if part.sweep.protocol.processes == num_launched()]
    if not ours:
        raise _other_processes(table, scale, parts[0])
    found: dict[str, Sequence[TrainingRecord]] = {}
    for part in ours:
        place = folder / table.name / part.name if part.name else folder / table.name
        found[part.name] = perform(part.sweep, way(place), show, tell).records
        _require_whole(found[part.name])
    for part in parts:
        if part.name not in found:
            kept = read_records(folder / table.name / part.name, TrainingRecord).records
            found[part.name] = best_rates(part.sweep, latest(part.sweep.runs(), kept))
            if not found[part.name]:
                raise _other_processes(table, scale, part)
    return conclude_table(table, scale, [(part, found[part.name]) for part in parts])


def _other_processes(table: Table, scale: Scale, part: Part) -> SpecError:
    number, name = part.sweep.protocol.processes, f" {part.name}" if part.name else ""
    command = f"normkit reproduce {table.name} --scale {scale}"
    if number > 1:
        command = f"torchrun --nproc-per-node {number} -m {command}"
    return SpecError(
        f"{table.name}{name} is trained by {number} processes together, and {num_launched()} "
        f"{'was' if num_launched() == 1 else 'were'} started; what has been done is kept; start: "
        f"{command}"
    )


def _require_whole(records: Sequence[TrainingRecord]) -> None:
    """Refuse to judge by a part of the runs."""
    failed = [record for record in records if not record.is_final]
    if failed:
        first = failed[0]
        raise DataError(
            f"{len(failed)} runs failed, the first one ({first.spec.norm}, batch size "
            f"{first.spec.batch_size}, seed {first.spec.seed}) with: {first.outcome.message}; the "
            f"others are kept, and the same command tries these again"
        )
