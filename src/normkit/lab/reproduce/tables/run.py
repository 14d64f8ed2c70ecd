"""The runs of a table, by the engine of ``compare``: a folder with a page for each part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from normkit.errors import SpecError
from normkit.lab.comparison import best_rates
from normkit.lab.experiment import Show, perform
from normkit.lab.launch import num_launched
from normkit.lab.records import (
    TrainingRecord,
    latest,
    missing_runs,
    read_records,
    sources_of,
)
from normkit.lab.reproduce.preset import Scale
from normkit.lab.reproduce.run import require_whole
from normkit.lab.reproduce.tables.result import TableResult, conclude_table
from normkit.lab.reproduce.tables.table import Part, Table
from normkit.lab.task import parse_task
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
        records = found[part.name] = perform(part.sweep, way(place), show, tell).records
        require_whole((_name(r), r.outcome.message) for r in records if not r.is_final)
    for part in parts:
        if part.name not in found:
            kept = _kept(part, folder / table.name / part.name)
            if missing_runs(part.sweep.runs(), kept):
                raise _other_processes(table, scale, part)
            found[part.name] = best_rates(part.sweep, latest(part.sweep.runs(), kept))
    return conclude_table(table, scale, [(part, found[part.name]) for part in parts])


def _kept(part: Part, folder: Path) -> list[TrainingRecord]:
    """Records of a part that was trained by other processes, of the data and code as they are."""
    protocol = part.sweep.protocol
    sources = sources_of(protocol, parse_task(protocol.task).data(protocol).fingerprint)
    return [r for r in read_records(folder, TrainingRecord).records if sources.made(r)]


def _name(record: TrainingRecord) -> str:
    spec = record.spec
    return f"{spec.norm}, batch size {spec.batch_size}, seed {spec.seed}"


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
