"""What is recorded of each run of a sweep, a line of JSON each."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from normkit.lab.environment import Environment
from normkit.lab.lines import Contents, append_line, read_lines
from normkit.lab.models import PlacedNorm
from normkit.lab.spec import Frozen, RunSpec

RECORDS_NAME = "records.jsonl"


class Epoch(Frozen):
    """What one epoch came to; accuracies are shares, losses mean cross-entropies.

    Training figures are taken while training, so from the weights of every step; a loss that is
    not finite is ``None``.
    """

    learning_rate: float
    train_loss: float
    train_accuracy: float
    validation_loss: float | None
    validation_accuracy: float
    test_accuracy: float | None = None


class Outcome(Frozen):
    """What a run came to: the part of a record that equal specs repeat exactly.

    A diverged run ends at ``diverged_step``, counted from 1, whose loss was not finite.
    """

    status: Literal["finished", "diverged", "failed"]
    message: str | None = None
    diverged_step: int | None = None
    epochs: tuple[Epoch, ...] = ()
    test_accuracy: float | None = None
    test_accuracy_median_of_5: float | None = None
    norms: tuple[PlacedNorm, ...] = ()
    num_parameters: int | None = None
    num_steps: int = 0
    num_dropped: int = 0
    peak_bytes: int | None = None


class Record(Frozen):
    """One run: what was asked for, what came out, what it took, where it ran, and on which data.

    ``data_hash`` is the data set's fingerprint; older records do not have it.
    """

    spec: RunSpec
    outcome: Outcome
    step_time_s: float | None
    duration_s: float
    environment: Environment
    code_hash: str
    data_hash: str | None = None


def append_record(folder: Path, record: Record) -> None:
    """Add a record, whole or not at all, and wait until it is on the disk.

    Raises:
        DataError: If it cannot be written.
    """
    append_line(folder / RECORDS_NAME, record)


def complete_records(folder: Path, records: Iterable[Record]) -> None:
    """Add those records that are not in the folder: other machines may have written elsewhere.

    Raises:
        DataError: If they cannot be read or written.
    """
    known = {record.model_dump_json() for record in read_records(folder).records}
    for record in records:
        if record.model_dump_json() not in known:
            append_record(folder, record)


def read_records(folder: Path) -> Contents[Record]:
    """Read every record; without a file there are none.

    Raises:
        DataError: If the file cannot be read.
    """
    return read_lines(folder / RECORDS_NAME, Record)


def of_data(records: Iterable[Record], data_hash: str) -> tuple[Record, ...]:
    """Records of runs on data with this fingerprint, and those that do not say theirs."""
    return tuple(record for record in records if record.data_hash in (None, data_hash))
