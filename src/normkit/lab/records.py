"""One line of JSON for each run, in a file that survives being killed."""

import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from normkit.errors import DataError
from normkit.lab.environment import Environment
from normkit.lab.models import PlacedNorm
from normkit.lab.spec import Frozen, RunSpec
from normkit.text import printable

RECORDS_NAME = "records.jsonl"
CORRUPT_NAME = "records.corrupt.jsonl"


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
    """One run: what was asked for, what came out, what it took, and where it ran."""

    spec: RunSpec
    outcome: Outcome
    step_time_s: float | None
    duration_s: float
    environment: Environment
    code_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CorruptLine:
    """A line of the records file that is no record, and why."""

    number: int
    text: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a records file holds."""

    records: tuple[Record, ...] = ()
    corrupt: tuple[CorruptLine, ...] = ()


def append_record(folder: Path, record: Record) -> None:
    """Add a record in one write, and wait until it is on the disk.

    Raises:
        DataError: If it cannot be written.
    """
    line = record.model_dump_json().encode() + b"\n"
    path = folder / RECORDS_NAME
    with file_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def complete_records(folder: Path, records: Iterable[Record]) -> None:
    """Add those records that are not in the folder: other machines may have written elsewhere.

    Raises:
        DataError: If they cannot be read or written.
    """
    known = {record.model_dump_json() for record in read_records(folder).records}
    for record in records:
        if record.model_dump_json() not in known:
            append_record(folder, record)


def read_records(folder: Path) -> Contents:
    """Read every record, and set lines that are none aside in a file beside it.

    Args:
        folder: Where the records file is; without one there are no records.

    Returns:
        The records and what was set aside.

    Raises:
        DataError: If the file cannot be read, or corrupt lines cannot be set aside.
    """
    path = folder / RECORDS_NAME
    if not path.exists():
        return Contents()
    with file_errors(path):
        lines = path.read_bytes().splitlines(keepends=True)
    parsed = [_parse(number, line) for number, line in enumerate(lines, start=1)]
    corrupt = [item for item in parsed if isinstance(item, CorruptLine)]
    if corrupt:
        with file_errors(path):
            _set_aside(path, lines, corrupt)
    records = [item for item in parsed if isinstance(item, Record)]
    return Contents(records=tuple(records), corrupt=tuple(corrupt))


def _parse(number: int, line: bytes) -> Record | CorruptLine:
    text = line.decode(errors="replace").rstrip("\n")
    if not line.endswith(b"\n"):
        return CorruptLine(number=number, text=text, reason="it breaks off")
    try:
        return Record.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        return CorruptLine(number=number, text=text, reason=reason)


def _set_aside(path: Path, lines: Sequence[bytes], corrupt: Sequence[CorruptLine]) -> None:
    with (path.parent / CORRUPT_NAME).open("a", encoding="utf-8") as file:
        file.writelines(f"{line.text}\n" for line in corrupt)
    numbers = {line.number for line in corrupt}
    kept = [line for number, line in enumerate(lines, start=1) if number not in numbers]
    replacement = path.with_suffix(".tmp")
    replacement.write_bytes(b"".join(kept))
    replacement.replace(path)


def usable_folder(folder: Path, *names: str) -> Path:
    """Make the folder if needed and make sure that files can be written in it.

    Args:
        folder: The folder.
        names: Files that will be written in it; those that are there must be writable files.

    Raises:
        DataError: If the folder cannot be made or written to, or one of the files cannot.
    """
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(
            f"the output folder {printable(folder)} cannot be written to ({error.strerror}); "
            f"give another one with --out"
        ) from error
    for name in names:
        _require_writable(folder / name)
    return folder


def _require_writable(path: Path) -> None:
    with file_errors(path):
        if not path.exists():
            return
        if path.is_file():
            path.open("ab").close()
            return
    raise DataError(f"{printable(path)} is no file; move it away or give another folder with --out")


@contextmanager
def file_errors(path: Path) -> Generator[None]:
    """Turn what the system says about a file into a ``DataError`` that names it."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{printable(path)} cannot be read or written ({error.strerror}); "
            f"make room and permission for it, or give another folder with --out"
        ) from error
