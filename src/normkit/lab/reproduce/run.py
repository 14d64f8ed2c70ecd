"""The runs of a preset that have no record yet, and what they have measured."""

from collections.abc import Callable, Iterable
from pathlib import Path
from shutil import rmtree

from normkit.errors import DataError, SpecError
from normkit.lab.check import check_kernels
from normkit.lab.launch import num_launched
from normkit.lab.lock import only_user
from normkit.lab.records import Sources, latest, missing_runs, read_records
from normkit.lab.reproduce.preset import Preset, Scale
from normkit.lab.reproduce.tasks.records import PresetRecord, PresetSpec, Values
from normkit.lab.reproduce.tasks.run import RUNS, sources_of
from normkit.lab.resume import FOLDER
from normkit.lab.sweep import carry_out, prepare
from normkit.lab.work import Upkeep, Watcher, Way

Show = Callable[[tuple[PresetSpec, ...]], Watcher[PresetSpec, PresetRecord]]


class Silent:
    """A watcher that tells nobody."""

    def __init__(self, _specs: tuple[PresetSpec, ...]) -> None: ...

    def on_steps(self, spec: PresetSpec, num_steps: int) -> None:
        """Say nothing."""

    def on_record(self, record: PresetRecord) -> None:
        """Say nothing."""


def run_missing(
    preset: Preset,
    scale: Scale,
    folder: Path,
    show: Show = Silent,
    way: Way | None = None,
    device: str = "cpu",
) -> tuple[PresetRecord, ...]:
    """Run what has no record in the folder, and give the records of all runs.

    Args:
        preset: What to run.
        scale: How large.
        folder: Holds ``records.jsonl``, which presets share; a run that two presets need is done
            once, and anew where the data, or the code that decides it, have changed.
        show: Gives the watcher of the runs that are missing.
        way: How they are done; by default one after the other in this process.
        device: Where each computes.

    Returns:
        Records in the order of the specs.

    Raises:
        SpecError: If several processes were started together.
        DataError: If data or records cannot be read or written, another process works in the
            folder, or runs failed.
    """
    specs = preset.specs(scale, device)
    check_kernels()
    if num_launched() > 1:
        raise SpecError(
            f"{num_launched()} processes were started together, and presets train each network on "
            f"one; leave out torchrun, and give --workers or --cluster"
        )
    way = way or Way(out=folder, num_workers=1, upkeep=Upkeep(folder=folder))
    prepare(specs, way)
    with only_user(folder):
        sources = sources_of(preset.at(scale).settings)
        missing = missing_runs(specs, _known(folder, sources))
        carry_out(missing, way, RUNS, show(missing))
        rmtree(folder / FOLDER, ignore_errors=True)  # also drafts that a kill has left
        records = latest(specs, _known(folder, sources))
    require_whole(
        (f"{r.spec.arm}, seed {r.spec.seed}", r.message) for r in records if not r.is_final
    )
    return records


def _known(folder: Path, sources: Sources) -> list[PresetRecord]:
    found = read_records(folder, PresetRecord).records
    return [record for record in found if sources.made(record)]


def require_whole(failed: Iterable[tuple[str, str | None]]) -> None:
    """Refuse to judge by a part of the runs.

    Args:
        failed: Which runs failed, in words, and their messages.

    Raises:
        DataError: If there are any.
    """
    found = list(failed)
    if found:
        name, message = found[0]
        raise DataError(
            f"{len(found)} runs failed, the first one ({name}) with: {message}; the others are "
            f"kept, and the same command tries these again"
        )


def measured(records: Iterable[PresetRecord]) -> dict[int, dict[str, Values]]:
    """What was measured, by seed and arm."""
    found: dict[int, dict[str, Values]] = {}
    for record in records:
        found.setdefault(record.spec.seed, {})[record.spec.arm] = record.values
    return found
