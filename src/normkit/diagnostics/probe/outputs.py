"""Write records while training runs: into a file of JSON lines, TensorBoard or a logger."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from normkit.diagnostics.probe.record import NUMBERS, ProbedStep
from normkit.errors import DataError


class Writer(Protocol):
    """The method of ``torch.utils.tensorboard.SummaryWriter`` that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number."""
        ...


class Logger(Protocol):
    """The method of a logger of Fabric, Lightning or the lab that is used."""

    def log_metrics(self, metrics: Mapping[str, float], step: int, /) -> Any:
        """Write all numbers of a step."""
        ...


class Outputs:
    """The file and the writer that an open probe writes to.

    Args:
        path: File to which JSON lines are appended.
        log_dir: Folder for a new ``SummaryWriter``.
        writer: The caller's writer or logger, which ``close`` leaves open.
    """

    def __init__(
        self, path: str | Path | None, log_dir: str | Path | None, writer: Writer | Logger | None
    ) -> None:
        self._opened_writer = None if log_dir is None else summary_writer(log_dir)
        self._writer = self._opened_writer or writer
        self._file = None if path is None else open_lines(Path(path))

    def write(self, record: ProbedStep) -> None:
        """Write a record, and flush the file so that a crash cannot lose it."""
        if self._file is not None:
            self._file.write(record.to_json() + "\n")
            self._file.flush()
        if self._writer is not None:
            _send(self._writer, record)

    def close(self) -> None:
        """Close the file and the writer that were opened here; flush the caller's writer."""
        if self._file is not None:
            self._file.close()
        if self._opened_writer is not None:
            self._opened_writer.close()
        else:
            for name in ("flush", "save"):  # ``flush`` of a SummaryWriter, ``save`` of a logger
                getattr(self._writer, name, lambda: None)()


def _send(writer: Writer | Logger, record: ProbedStep) -> None:
    if (log := getattr(writer, "log_metrics", None)) is not None:
        log(dict(scalars(record)), record.step)
        return
    for tag, value in scalars(record):
        writer.add_scalar(tag, value, record.step)  # type: ignore[union-attr]


def scalars(record: ProbedStep) -> Iterator[tuple[str, float]]:
    """Yield every number of a record as ``normkit/COLUMN`` or ``normkit/COLUMN/LAYER``."""
    totals = ("loss", "stat_diff", "num_dead", "gradient_norm", "gradient_change")
    for name in totals:
        if (value := getattr(record, name)) is not None:
            yield f"normkit/{name}", value
    for row in record.layers:
        for column in NUMBERS:
            if (value := getattr(row, column)) is not None:
                yield f"normkit/{column}/{row.name}", value


def open_lines(path: Path, *, overwrite: bool = False) -> IO[str]:
    """Open a file to append lines; if its last line is incomplete, start a new line.

    Raises:
        DataError: If its folder does not exist, or the file cannot be written.
    """
    try:
        is_torn = not overwrite and path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        file = path.open("w" if overwrite else "a", encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"path={str(path)!r} cannot be written ({error.strerror}); give a file in a folder "
            f"that exists"
        ) from error
    if is_torn:
        file.write("\n")
    return file


def write_lines(path: Path, records: Iterable[ProbedStep]) -> None:
    """Write all records, one a line, and overwrite the file."""
    with open_lines(path, overwrite=True) as file:
        file.writelines(record.to_json() + "\n" for record in records)


def summary_writer(log_dir: str | Path) -> Any:
    """Make a writer for TensorBoard.

    Raises:
        DataError: If TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # an optional package
    except ImportError as error:
        raise DataError(
            f"log_dir={str(log_dir)!r} was given, and TensorBoard is not installed; install it "
            f"(pip install tensorboard), or give path= for JSON lines"
        ) from error
    return SummaryWriter(str(log_dir))
