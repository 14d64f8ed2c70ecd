"""Records in a file: a line of JSON each, only ever appended, or one that is the whole file."""

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from normkit.errors import DataError
from normkit.lab.files import file_errors, require_file
from normkit.text import printable

R = TypeVar("R", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class CorruptLine:
    """A line that is no record, and why."""

    number: int
    text: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents(Generic[R]):
    """What a file of records holds."""

    records: tuple[R, ...] = ()
    corrupt: tuple[CorruptLine, ...] = ()


def append_line(path: Path, record: BaseModel) -> None:
    """Add a record, whole or not at all, and wait until it is on the disk.

    Processes that write to one file wait for one another. A line that a killed process has left
    unfinished is ended first.

    Raises:
        DataError: If it cannot be written.
    """
    line = record.model_dump_json().encode() + b"\n"
    with file_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            _append(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _append(descriptor: int, line: bytes) -> None:
    size = os.fstat(descriptor).st_size
    ends = size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"
    rest = line if ends else b"\n" + line
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except BaseException:  # the disk is full, for instance
        os.ftruncate(descriptor, size)
        raise


def read_lines(path: Path, kind: type[R]) -> Contents[R]:
    """Read every record of a file; one that is not there has none.

    Returns:
        The records, and the lines that are none.

    Raises:
        DataError: If the file cannot be read.
    """
    with file_errors(path):
        if not path.exists():
            return Contents()
        lines = path.read_bytes().split(b"\n")
    whole, unfinished = lines[:-1], lines[-1]
    parsed = [_parsed(number, line, kind) for number, line in enumerate(whole, start=1) if line]
    corrupt = [item for item in parsed if isinstance(item, CorruptLine)]
    if unfinished:
        corrupt.append(_corrupt(len(lines), unfinished, "it breaks off"))
    records = [item for item in parsed if not isinstance(item, CorruptLine)]
    return Contents(records=tuple(records), corrupt=tuple(corrupt))


def _parsed(number: int, line: bytes, kind: type[R]) -> R | CorruptLine:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        return _corrupt(number, line, first_complaint(error).removeprefix("the whole: "))


def _corrupt(number: int, line: bytes, reason: str) -> CorruptLine:
    return CorruptLine(number=number, text=line.decode(errors="replace"), reason=reason)


def read_whole(path: Path, kind: type[R], what: str, way_out: str) -> R:
    """Read the record that is a whole file.

    Args:
        path: The file.
        kind: Of the record.
        what: The file should hold, for the message.
        way_out: What to do if it does not.

    Raises:
        DataError: If it cannot be read, or holds something else.
    """
    require_file(path)
    with file_errors(path):
        text = path.read_bytes()
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        said = f"{printable(path)} holds no {what} ({first_complaint(error)}); {way_out}"
        raise DataError(said) from error


def first_complaint(error: ValidationError) -> str:
    """Where the first thing is that is wrong, and what it is."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"
