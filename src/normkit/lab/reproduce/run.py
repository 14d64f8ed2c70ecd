"""The runs of a preset that have no record yet."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from normkit.lab.device import CPU, seeded, threads_of
from normkit.lab.environment import code_hash, describe_environment
from normkit.lab.lock import only_user
from normkit.lab.records import latest, missing_runs, of_data, read_records, run_in_turn
from normkit.lab.reproduce.preset import Preset, Scale
from normkit.lab.reproduce.records import PresetRecord, PresetSpec, Values, rounded

NUM_THREADS = 1
FOLDER = "lab/reproduce/"  # its code decides these runs and no others

# the record, how many are done, how many there are
OnRun = Callable[[PresetRecord, int, int], object]


def run_missing(
    preset: Preset, scale: Scale, folder: Path, on_run: OnRun = lambda *_: None
) -> tuple[PresetRecord, ...]:
    """Run what has no record in the folder, and give the records of all runs.

    Args:
        preset: What to run.
        scale: How large.
        folder: Holds ``records.jsonl``, which presets share; a run that two presets need is done
            once, and anew where the data set's files have changed.
        on_run: Is told of each run that ends.

    Returns:
        Records in the order of the specs.

    Raises:
        SpecError: If the preset has no such scale.
        DataError: If data or records cannot be read or written, or another process works in the
            folder.
    """
    specs = preset.specs(scale)
    with only_user(folder):
        data_hash = preset.at(scale).settings.fingerprint()
        known = [*of_data(read_records(folder, PresetRecord).records, data_hash)]
        missing = missing_runs(specs, known)
        done = run_in_turn(missing, folder, lambda spec: run_one(preset, scale, spec))
        for number, record in enumerate(done, start=1):
            known.append(record)
            on_run(record, number, len(missing))
    return latest(specs, known)


def run_one(preset: Preset, scale: Scale, spec: PresetSpec) -> PresetRecord:
    """Do one run; torch's random state is given back."""
    settings = preset.at(scale).settings
    environment = describe_environment(CPU, NUM_THREADS)
    started = time.process_time()
    with threads_of(NUM_THREADS), seeded(spec.seed):
        values = preset.task.measure(settings, spec.arm, spec.seed)
    return PresetRecord(
        spec=spec,
        values=rounded(values),
        cpu_time_s=round(time.process_time() - started, 2),
        environment=environment,
        code_hash=code_hash(FOLDER),
        data_hash=settings.fingerprint(),
    )


def measured(records: Iterable[PresetRecord]) -> dict[int, dict[str, Values]]:
    """What was measured, by seed and arm."""
    found: dict[int, dict[str, Values]] = {}
    for record in records:
        found.setdefault(record.spec.seed, {})[record.spec.arm] = record.values
    return found
