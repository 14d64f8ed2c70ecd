"""The runs of a table, by the engine of ``compare``: a folder with a page for each part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from normkit.errors import SpecError
from normkit.lab.comparison import best_rates, due_runs
from normkit.lab.experiment import Show, perform
from normkit.lab.files import usable_folder
from normkit.lab.launch import launched, num_launched
from normkit.lab.lock import only_user
from normkit.lab.records import (
    RECORDS_NAME,
    TrainingRecord,
    latest,
    missing_runs,
    read_records,
    sources_of,
)
from normkit.lab.reproduce.preset import Scale
from normkit.lab.reproduce.run import require_whole
from normkit.lab.reproduce.tables.readings import (
    FOLDER,
    READINGS,
    ReadingRecord,
    ReadingSpec,
    sources_of_readings,
    specs_of,
)
from normkit.lab.reproduce.tables.result import Results, TableResult, conclude_table
from normkit.lab.reproduce.tables.table import Part, Table
from normkit.lab.spec import TrainingSpec
from normkit.lab.sweep import carry_out
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
    found: dict[str, Results] = {}
    for part in ours:
        place = folder / table.name / part.name if part.name else folder / table.name
        records = _trained(part, way, place, show, tell) if part.trained else None
        found[part.name] = Results(records, _read(part, records, way(place / FOLDER), tell))
    for part in parts:
        if part.name not in found:
            kept = _kept(part, folder / table.name / part.name)
            if missing_runs(due_runs(part.sweep, kept), kept):
                raise _other_processes(table, scale, part)
            chosen = best_rates(part.sweep, latest(part.sweep.runs(), kept))
            reads = _read(part, chosen, way(folder / table.name / part.name / FOLDER), tell)
            found[part.name] = Results(chosen, reads)
    return conclude_table(table, scale, [(part, found[part.name]) for part in parts])


def _trained(
    part: Part, way: Callable[[Path], Way], place: Path, show: Show, tell: Callable[[str], None]
) -> Sequence[TrainingRecord]:
    """Train what has no record yet; weights are kept if anything is read off the networks."""
    how = way(place)
    if part.states:
        how = replace(how, upkeep=replace(how.upkeep, save_weights=True))
    records = perform(part.sweep, how, show, tell).records
    require_whole((_name(r.spec), r.outcome.message) for r in records if not r.is_final)
    return records


def _read(
    part: Part,
    trained: Sequence[TrainingRecord] | None,
    way: Way,
    tell: Callable[[str], None],
) -> Sequence[ReadingRecord]:
    """Read what has no record yet off the networks of a part; of several processes one does."""
    specs = specs_of(part.sweep.runs(), part.states, trained)
    if not specs:
        return ()
    with launched() as launch:
        way = way if launch.size == 1 else replace(way, num_workers=1)
        return launch.first(lambda: _read_missing(part, specs, way, tell))


def _read_missing(
    part: Part, specs: Sequence[ReadingSpec], way: Way, tell: Callable[[str], None]
) -> Sequence[ReadingRecord]:
    sources = sources_of_readings(specs[0])

    def known() -> list[ReadingRecord]:
        return [r for r in read_records(way.out, ReadingRecord).records if sources.made(r)]

    usable_folder(way.out, RECORDS_NAME)
    with only_user(way.out):
        missing = missing_runs(specs, known())
        if missing:
            tell(f"{len(missing)} networks are evaluated in {len(part.states)} states each")
        carry_out(missing, way, READINGS, _Silent())
        records = latest(specs, known())
    require_whole((_name(r.spec.training), r.message) for r in records if not r.is_final)
    return records


class _Silent:
    """A watcher that tells nobody."""

    def on_steps(self, spec: ReadingSpec, num_steps: int) -> None:
        """Say nothing."""

    def on_record(self, record: ReadingRecord) -> None:
        """Say nothing."""


def _kept(part: Part, folder: Path) -> list[TrainingRecord]:
    """Records of a part that was trained by other processes, of the data and code as they are."""
    protocol = part.sweep.protocol
    sources = sources_of(protocol, parse_task(protocol.task).data(protocol).fingerprint)
    return [r for r in read_records(folder, TrainingRecord).records if sources.made(r)]


def _name(spec: TrainingSpec) -> str:
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
