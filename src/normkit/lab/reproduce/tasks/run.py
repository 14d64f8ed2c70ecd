"""One run of a preset, from its spec to its record."""

import time

from normkit.errors import NormError
from normkit.lab.course import nothing
from normkit.lab.device import parse_device, seeded, threads_of
from normkit.lab.environment import code_hash, describe_environment
from normkit.lab.records import Sources
from normkit.lab.reproduce.tasks.catalog import TASKS
from normkit.lab.reproduce.tasks.records import PresetRecord, PresetSpec, Values, rounded
from normkit.lab.reproduce.tasks.settings import Data, Place
from normkit.lab.user_code import told
from normkit.lab.work import OnStep, Upkeep, Work

FOLDER = "lab/reproduce/tasks/"  # its code decides these runs and no others


def sources_of(settings: Data) -> Sources:
    """What decides the runs of a preset besides their specs, as it is now."""
    return Sources(code_hash=code_hash(FOLDER), data_hash=settings.fingerprint())


def run_one(
    spec: PresetSpec, on_step: OnStep = nothing, upkeep: Upkeep | None = None
) -> PresetRecord:
    """Do one run; torch's random state is given back, and what goes wrong is recorded.

    With a folder, a run that was killed goes on from its last checkpoint there.

    Args:
        spec: What is run.
        on_step: Called after each training step.
        upkeep: What is done beside the run.

    Raises:
        DataError: If the data set's files are missing.
    """
    task, device = TASKS[spec.task], parse_device(spec.device)
    settings = task.settings.model_validate(spec.settings)
    sources = sources_of(settings)
    checkpoint = (upkeep or Upkeep()).checkpoint(spec, sources)
    place = Place(device=device, checkpoint=checkpoint, on_step=on_step)
    started = time.process_time()
    with threads_of(spec.num_threads), seeded(spec.seed, device):
        try:
            values, message = rounded(task.measure(settings, spec.arm, spec.seed, place)), None
        except Exception as error:  # noqa: BLE001 - its record says so
            values, message = {}, str(error) if isinstance(error, NormError) else told(error)
    if checkpoint is not None:
        checkpoint.remove()
    return _record(spec, sources, values, message, time.process_time() - started)


def failed(spec: PresetSpec, message: str) -> PresetRecord:
    """The record of a run that ended without one."""
    settings = TASKS[spec.task].settings.model_validate(spec.settings)
    return _record(spec, sources_of(settings), {}, message, 0.0)


def _record(
    spec: PresetSpec, sources: Sources, values: Values, message: str | None, cpu_time_s: float
) -> PresetRecord:
    return PresetRecord(
        spec=spec,
        values=values,
        message=message,
        cpu_time_s=round(cpu_time_s, 2),
        environment=describe_environment(parse_device(spec.device), spec.num_threads),
        **sources.model_dump(),
    )


RUNS = Work(run=run_one, failed=failed)
