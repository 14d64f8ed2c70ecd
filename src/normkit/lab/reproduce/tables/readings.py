"""Readings of trained networks as runs of their own: specs, records, and how one is done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from normkit.errors import DataError, NormError, SpecError
from normkit.lab.checkpoints import load_weights_, restored
from normkit.lab.course import nothing
from normkit.lab.device import parse_device, seeded, threads_of
from normkit.lab.environment import code_hash, describe_environment
from normkit.lab.models import apply_arm, build_model
from normkit.lab.records import Record, Sources, TrainingRecord, sources_of
from normkit.lab.reproduce.tables.reading import Taken, take
from normkit.lab.reproduce.tables.subject import Subject, Values
from normkit.lab.spec import RunSpec, TrainingSpec
from normkit.lab.task import parse_task
from normkit.lab.tasks.classification import Classification
from normkit.lab.train import train
from normkit.lab.user_code import told
from normkit.lab.work import OnStep, Upkeep, Work

FOLDER = "readings"  # beside the records of the trainings
WEIGHTS = "weights"
INVOLVED = "lab/reproduce/tables/"  # code that decides readings and no trainings


class ReadingSpec(RunSpec):
    """A network that is evaluated in several states.

    Args:
        training: How it was trained.
        is_trained: Whether it was; otherwise it has the weights that its protocol names.
        states: As ``Reading`` has them.
    """

    training: TrainingSpec
    is_trained: bool = True
    states: tuple[str, ...]

    @property
    def uses_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self.training.uses_gpu

    @property
    def num_threads(self) -> int:
        """CPU threads of the run."""
        return self.training.num_threads


class ReadingRecord(Record[ReadingSpec]):
    """What was read: numbers by state and split; or a message that says why there are none."""

    values: Mapping[str, Mapping[str, Values]]
    duration_s: float
    message: str | None = None

    @property
    def is_final(self) -> bool:
        """Whether it ended as it should; a failed reading is tried again."""
        return self.message is None


def sources_of_readings(spec: ReadingSpec) -> Sources:
    """What decides a reading besides its spec, as it is now."""
    protocol = spec.training.protocol
    found = sources_of(protocol, parse_task(protocol.task).data(protocol).fingerprint)
    return found.model_copy(update={"code_hash": code_hash(INVOLVED)})


def read_off(
    spec: ReadingSpec, on_step: OnStep = nothing, upkeep: Upkeep | None = None
) -> ReadingRecord:
    """Evaluate a network in each state; what goes wrong is recorded.

    Args:
        spec: Which network, and which states.
        on_step: Called after each training step, if the network has to be trained again.
        upkeep: Its folder lies in the one that has the weights.

    Raises:
        DataError: If the data set's files are missing.
    """
    started, training = time.perf_counter(), spec.training
    device, subject = parse_device(training.protocol.device), Subject.of(training)
    folder = None if upkeep is None or upkeep.folder is None else upkeep.folder.parent
    with threads_of(spec.num_threads), seeded(training.seed, device):
        try:
            network = _network(spec, subject, folder, on_step).to(device).eval()
            values, message = {state: take(network, subject, state) for state in spec.states}, None
        except Exception as error:  # noqa: BLE001 - its record says so
            values, message = {}, str(error) if isinstance(error, NormError) else told(error)
    return _record(spec, values, message, time.perf_counter() - started)


def _network(
    spec: ReadingSpec, subject: Subject, folder: Path | None, on_step: OnStep
) -> nn.Module:
    """The network from its weights; it is trained again where these are no longer there."""
    training = spec.training
    if not spec.is_trained:
        return _given(subject)
    path = (folder or Path()) / WEIGHTS / f"{training.file_name}.safetensors"
    if not path.exists():
        if training.protocol.processes > 1:
            raise DataError(
                f"{path} is not there, and what several processes trained is not trained again by "
                f"one; take {folder} away, and the same command trains and evaluates anew"
            )
        return train(training, on_step)
    network = subject.task.build(training, subject.data).model
    load_weights_(network, path)
    return network


def _given(subject: Subject) -> nn.Module:
    """A classifier with the weights of a file, whose norms are replaced by those of one kind."""
    training, data = subject.spec, subject.data
    protocol, shape = training.protocol, data.input_shape
    if not isinstance(subject.task, Classification):
        raise SpecError(
            f"weights of a file are evaluated as they are for classification only, and the task is "
            f"{subject.task}; train it, or name the file by an option of the task"
        )
    built_model = build_model(protocol.model, num_classes=data.num_classes, input_shape=shape)
    return apply_arm(
        restored(built_model.model, Path(protocol.weights or "")),
        training.norm,
        batch_size=training.batch_size,
        input_shape=shape,
        name=protocol.model,
    ).model


def failed(spec: ReadingSpec, message: str) -> ReadingRecord:
    """The record of a reading that ended without one."""
    return _record(spec, {}, message, 0.0)


def _record(
    spec: ReadingSpec, values: Mapping[str, Taken], message: str | None, duration_s: float
) -> ReadingRecord:
    protocol = spec.training.protocol
    return ReadingRecord(
        spec=spec,
        values=values,
        message=message,
        duration_s=duration_s,
        environment=describe_environment(parse_device(protocol.device), protocol.threads),
        **sources_of_readings(spec).model_dump(),
    )


READINGS = Work(run=read_off, failed=failed)


def specs_of(
    runs: Sequence[TrainingSpec], states: Sequence[str], trained: Sequence[TrainingRecord] | None
) -> tuple[ReadingSpec, ...]:
    """Readings of all networks that finished.

    Args:
        runs: All trainings.
        states: What is read.
        trained: Their records; None where nothing is trained.
    """
    if trained is not None:
        runs = [record.spec for record in trained if record.outcome.status == "finished"]
    is_trained, states = trained is not None, tuple(dict.fromkeys(states))
    return tuple(
        ReadingSpec(training=run, is_trained=is_trained, states=states) for run in runs if states
    )
