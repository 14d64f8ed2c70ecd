"""The runs of a preset that have no record yet."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from normkit.lab.environment import code_hash, describe_environment
from normkit.lab.lines import append_line, read_lines
from normkit.lab.lock import only_user
from normkit.lab.records import RECORDS_NAME
from normkit.lab.reproduce.preset import Preset, Scale
from normkit.lab.reproduce.store import RunRecord, RunSpec, Values, rounded
from normkit.lab.train import threads_of

NUM_THREADS = 1
FOLDER = "lab/reproduce/"  # its code decides these runs and no others

OnRun = Callable[[RunRecord, int, int], object]  # the record, how many are done, how many there are


def run_missing(
    preset: Preset, scale: Scale, folder: Path, on_run: OnRun = lambda *_: None
) -> tuple[RunRecord, ...]:
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
    specs, path = preset.specs(scale), folder / RECORDS_NAME
    with only_user(folder):
        data_hash = preset.at(scale).settings.fingerprint()
        records = read_lines(path, RunRecord).records
        known = {r.spec.key: r for r in records if r.data_hash in (None, data_hash)}
        missing = [spec for spec in specs if spec.key not in known]
        for number, spec in enumerate(missing, start=1):
            record = run_one(preset, scale, spec)
            append_line(path, record)
            known[spec.key] = record
            on_run(record, number, len(missing))
    return tuple(known[spec.key] for spec in specs)


def run_one(preset: Preset, scale: Scale, spec: RunSpec) -> RunRecord:
    """Do one run; torch's random state is given back."""
    settings = preset.at(scale).settings
    environment = describe_environment(torch.device("cpu"), NUM_THREADS)
    started = time.process_time()
    with threads_of(NUM_THREADS), torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        values = preset.task.measure(settings, spec.arm, spec.seed)
    return RunRecord(
        spec=spec,
        values=rounded(values),
        cpu_time_s=round(time.process_time() - started, 2),
        environment=environment,
        code_hash=code_hash(FOLDER),
        data_hash=settings.fingerprint(),
    )


def measured(records: Iterable[RunRecord]) -> dict[int, dict[str, Values]]:
    """What was measured, by seed and arm."""
    found: dict[int, dict[str, Values]] = {}
    for record in records:
        found.setdefault(record.spec.seed, {})[record.spec.arm] = record.values
    return found
