"""What is recorded of each run, a line of JSON each, and which runs have no record yet."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Generic, Literal, TypeVar

from pydantic import Field

from normkit.lab.environment import Environment, code_hash
from normkit.lab.files import require_file
from normkit.lab.frozen import Frozen
from normkit.lab.lines import Contents, append_line, read_lines
from normkit.lab.models import PlacedNorm
from normkit.lab.spec import Protocol, RunSpec, TrainingSpec
from normkit.lab.user_code import source_hash

RECORDS_NAME = "records.jsonl"

S = TypeVar("S", bound=RunSpec)


class Sources(Frozen):
    """What decides a run besides its spec: twelve digits each, which change with what they name.

    Args:
        code_hash: Of normkit's code.
        data_hash: The data set's fingerprint; older records do not have it.
        model_hash: Of the user's Python files that the spec names, and what they import beside;
            then of the weights that runs start from.
    """

    code_hash: str
    data_hash: str | None = None
    model_hash: str | None = None

    @property
    def key(self) -> str:
        """Twelve digits over all of them."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]

    def made(self, record: "Record") -> bool:
        """Whether a record is of these sources; one that does not name its data may be."""
        return (
            record.data_hash in (None, self.data_hash)
            and record.model_hash == self.model_hash
            and record.code_hash == self.code_hash
        )


def sources_of(protocol: Protocol, data_hash: str | None) -> Sources:
    """What decides the runs of a sweep besides their specs, as it is now."""
    found = source_hash(protocol.model, protocol.train, protocol.data)
    if protocol.weights is not None:
        require_file(Path(protocol.weights))
        with Path(protocol.weights).open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        found = f"{found or ''}{content[:12]}"
    return Sources(code_hash=code_hash(), data_hash=data_hash, model_hash=found)


class Record(Frozen, Generic[S]):
    """One run: what was asked for, where it ran, by which code and on which data."""

    spec: S
    environment: Environment
    code_hash: str
    data_hash: str | None = None
    model_hash: str | None = None

    @property
    def is_final(self) -> bool:
        """Whether the run need not be tried again."""
        return True


R = TypeVar("R", bound=Record)


Scores = Mapping[str, float | None]
"""What a network is judged by, by name; None for what is not finite."""


class Epoch(Frozen):
    """What one epoch came to.

    Args:
        learning_rate: Of its first step.
        train_loss: Mean loss of the training examples, from the weights of every step.
        train_accuracy: Share of them that was right then; None where the task does not count them.
        validation_scores: The task's scores on the validation examples after the epoch.
        test_scores: The same on the test examples; empty for epochs that are not tested.
    """

    learning_rate: float
    train_loss: float
    train_accuracy: float | None = None
    validation_scores: Scores = Field(default_factory=dict)
    test_scores: Scores = Field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """Every number by name, such as ``test_accuracy``; those that there are not left out."""
        found = self.model_dump(exclude={"validation_scores", "test_scores"})
        found |= {f"validation_{name}": value for name, value in self.validation_scores.items()}
        found |= {f"test_{name}": value for name, value in self.test_scores.items()}
        return {name: value for name, value in found.items() if value is not None}


class Outcome(Frozen):
    """What a run came to: the part of a record that equal specs repeat exactly.

    A diverged run ends at ``diverged_step``, counted from 1, whose loss was not finite. ``scores``
    are the task's scores on the test examples after the last epoch, or what a user's own training
    function returned, the one to be judged first; ``median_of_5`` is the median of that one over
    the last five epochs.
    """

    status: Literal["finished", "diverged", "failed"]
    message: str | None = None
    diverged_step: int | None = None
    epochs: tuple[Epoch, ...] = ()
    scores: Scores = Field(default_factory=dict)
    median_of_5: float | None = None
    norms: tuple[PlacedNorm, ...] = ()
    num_parameters: int | None = None
    num_steps: int = 0
    num_dropped: int = 0
    peak_bytes: int | None = None


class TrainingRecord(Record[TrainingSpec]):
    """One network that was trained: what came out, and what it took."""

    outcome: Outcome
    step_time_s: float | None
    duration_s: float

    @property
    def is_final(self) -> bool:
        """Whether it finished or diverged; a failed run is tried again."""
        return self.outcome.status != "failed"

    @property
    def score(self) -> float | None:
        """What it is judged by: the first of its scores; None if it has none."""
        return next(iter(self.outcome.scores.values()), None)


def append_record(folder: Path, record: Record) -> None:
    """Add a record, whole or not at all, and wait until it is on the disk.

    Raises:
        DataError: If it cannot be written.
    """
    append_line(folder / RECORDS_NAME, record)


def read_records(folder: Path, kind: type[R]) -> Contents[R]:
    """Read every record of a kind; without a file there are none.

    Raises:
        DataError: If the file cannot be read.
    """
    return read_lines(folder / RECORDS_NAME, kind)


def latest(specs: Iterable[RunSpec], records: Iterable[R]) -> tuple[R, ...]:
    """The latest record of each run that has one, in the order of the specs."""
    found = {record.spec.key: record for record in records}
    return tuple(found[spec.key] for spec in specs if spec.key in found)


def missing_runs(specs: Iterable[S], records: Iterable[Record]) -> tuple[S, ...]:
    """Runs that have no record yet, or only one of a failure."""
    done = {record.spec.key for record in records if record.is_final}
    return tuple(spec for spec in specs if spec.key not in done)


def run_in_turn(specs: Iterable[S], folder: Path, work: Callable[[S], R]) -> Iterator[R]:
    """Do one run after the other; each record is on the disk before it is given."""
    for spec in specs:
        record = work(spec)
        append_record(folder, record)
        yield record
