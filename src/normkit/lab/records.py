"""Records of runs, one line of JSON each, and the search for runs without a record."""

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
from normkit.lab.own_norms import reference_in
from normkit.lab.spec import Protocol, RunSpec, TrainingSpec
from normkit.lab.task import parse_task
from normkit.lab.user_code import source_hash

RECORDS_NAME = "records.jsonl"

S = TypeVar("S", bound=RunSpec)
Change = Literal["data", "files", "normkit"]
"""What decides a run besides its spec: data, a user's files, and normkit's code."""


class Sources(Frozen):
    """Hashes of what decides a run besides its spec, twelve hexadecimal digits each.

    Args:
        code_hash: Hash of normkit's code.
        data_hash: Hash of the data set; older records do not have it.
        model_hash: Hash of the user's Python files that the spec names and of the files they
            import from the same folder, then of the weights that runs start from,
            and of the files that the task's options name.
    """

    code_hash: str
    data_hash: str | None = None
    model_hash: str | None = None

    @property
    def key(self) -> str:
        """Twelve digits that identify all three hashes together."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]

    def made(self, record: "Record") -> bool:
        """Whether a record has these hashes; a record without a data hash may have any data."""
        return not self.changes(record)

    def changes(self, record: "Record") -> tuple[Change, ...]:
        """What has changed since a record was made."""
        same: dict[Change, bool] = {
            "data": record.data_hash in (None, self.data_hash),
            "files": record.model_hash == self.model_hash,
            "normkit": record.code_hash == self.code_hash,
        }
        return tuple(name for name, is_same in same.items() if not is_same)


def sources_of(protocol: Protocol, data_hash: str | None) -> Sources:
    """Hash the present code, data and weights of a sweep's runs."""
    norms = [reference_in(text) for text in protocol.own_norms]
    found = source_hash(protocol.model, protocol.train, protocol.data, *norms)
    started_from = [] if protocol.weights is None else [Path(protocol.weights)]
    for path in (*started_from, *parse_task(protocol.task).files()):
        require_file(path)
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        found = f"{found or ''}{content[:12]}"
    return Sources(code_hash=code_hash(), data_hash=data_hash, model_hash=found)


class Record(Frozen, Generic[S]):
    """One run: its spec, its environment, and the hashes of its code and data."""

    spec: S
    environment: Environment
    code_hash: str
    data_hash: str | None = None
    model_hash: str | None = None

    @property
    def is_final(self) -> bool:
        """Whether the run need not be repeated."""
        return True


R = TypeVar("R", bound=Record)


Scores = Mapping[str, float | None]
"""Scores of a network by name; None for a score that is not finite."""


class Epoch(Frozen):
    """The results of one epoch.

    Args:
        learning_rate: Learning rate of the first step.
        train_loss: Mean loss of the training examples, each with the weights of its step.
        train_accuracy: Share of them that was right then; None if the task does not count them.
        validation_scores: The task's scores on the validation examples after the epoch.
        test_scores: The same scores on the test examples; empty for epochs that are not tested.
    """

    learning_rate: float
    train_loss: float
    train_accuracy: float | None = None
    validation_scores: Scores = Field(default_factory=dict)
    test_scores: Scores = Field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """Every number that is not None, by name, such as ``test_accuracy``."""
        found = self.model_dump(exclude={"validation_scores", "test_scores"})
        found |= {f"validation_{name}": value for name, value in self.validation_scores.items()}
        found |= {f"test_{name}": value for name, value in self.test_scores.items()}
        return {name: value for name, value in found.items() if value is not None}


class Outcome(Frozen):
    """The outcome of a run, which is exactly the same for equal specs on one machine.

    A diverged run ends at ``diverged_step``, counted from 1, whose loss was not finite. ``scores``
    are the task's scores on the test examples after the last epoch, or the values that a user's
    own training function returned; the first one is judged. ``median_of_5`` is the median of that
    one over the last five epochs.
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
    """The record of one trained network: its outcome and its cost."""

    outcome: Outcome
    step_time_s: float | None
    duration_s: float

    @property
    def is_final(self) -> bool:
        """Whether the run finished or diverged; a failed run is repeated."""
        return self.outcome.status != "failed"

    @property
    def score(self) -> float | None:
        """The value that is judged: the first of the scores; None if there is none."""
        return next(iter(self.outcome.scores.values()), None)


def append_record(folder: Path, record: Record) -> None:
    """Append a record, completely or not at all, and wait until it is on the disk.

    Raises:
        DataError: If the record cannot be written.
    """
    append_line(folder / RECORDS_NAME, record)


def read_records(folder: Path, kind: type[R]) -> Contents[R]:
    """Read every record of a kind; if there is no file, there are no records.

    Raises:
        DataError: If the file cannot be read.
    """
    return read_lines(folder / RECORDS_NAME, kind)


def latest(specs: Iterable[RunSpec], records: Iterable[R]) -> tuple[R, ...]:
    """The latest record of each run that has one, in the order of the specs."""
    found = {record.spec.key: record for record in records}
    return tuple(found[spec.key] for spec in specs if spec.key in found)


def missing_runs(specs: Iterable[S], records: Iterable[Record]) -> tuple[S, ...]:
    """Runs that have no record yet, or only the record of a failure."""
    done = {record.spec.key for record in records if record.is_final}
    return tuple(spec for spec in specs if spec.key not in done)


def changed_runs(
    specs: Iterable[RunSpec], records: Iterable[Record], sources: Sources
) -> dict[str, tuple[Change, ...]]:
    """Runs with a record that is left out, by key, and what has changed since the latest one."""
    left_out = {r.spec.key: sources.changes(r) for r in records if not sources.made(r)}
    return {spec.key: left_out[spec.key] for spec in specs if spec.key in left_out}


def run_in_turn(specs: Iterable[S], folder: Path, work: Callable[[S], R]) -> Iterator[R]:
    """Run one spec after the other; each record is on the disk before it is yielded."""
    for spec in specs:
        record = work(spec)
        append_record(folder, record)
        yield record
