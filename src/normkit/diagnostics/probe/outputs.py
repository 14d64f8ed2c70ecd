"""Where records go while training runs: a file of JSON lines, and TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from normkit.diagnostics.probe.record import NUMBERS, ProbedStep
from normkit.errors import DataError


class Writer(Protocol):
    """What a record needs of ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:  # noqa: ANN401
        """Take one number."""
        ...


class Logger(Protocol):
    """What a record needs of a logger of Fabric, Lightning or the lab."""

    def log_metrics(self, metrics: Mapping[str, float], step: int, /) -> Any:  # noqa: ANN401
        """Take all numbers of a step."""
        ...


class Outputs:
    """Files that are written to while a probe is open.

    Args:
        path: JSON lines are appended to it.
        log_dir: A ``SummaryWriter`` is made for this folder.
        writer: Somebody else's writer or logger, which stays open.
    """

    def __init__(
        self, path: str | Path | None, log_dir: str | Path | None, writer: Writer | Logger | None
    ) -> None:
        self._own = None if log_dir is None else summary_writer(log_dir)
        self._writer = writer if self._own is None else self._own
        self._file = None if path is None else lines_at(Path(path))

    def write(self, record: ProbedStep) -> None:
        """Write a record; it is in the file when this returns."""
        if self._file is not None:
            self._file.write(record.to_json() + "\n")
            self._file.flush()
        if self._writer is not None:
            _send(self._writer, record)

    def close(self) -> None:
        """Close what was opened here."""
        if self._file is not None:
            self._file.close()
        if self._own is not None:
            self._own.close()
        else:
            for name in ("flush", "save"):  # a SummaryWriter's, and a logger's
                getattr(self._writer, name, lambda: None)()


def _send(writer: Writer | Logger, record: ProbedStep) -> None:
    if (log := getattr(writer, "log_metrics", None)) is not None:
        log(dict(scalars(record)), record.step)
        return
    for tag, value in scalars(record):
        writer.add_scalar(tag, value, record.step)  # type: ignore[union-attr]


def scalars(record: ProbedStep) -> Iterator[tuple[str, float]]:
    """Give every number of a record as ``normkit/COLUMN`` or ``normkit/COLUMN/LAYER``."""
    totals = ("loss", "stat_diff", "num_dead", "gradient_norm", "gradient_change")
    for name in totals:
        if (value := getattr(record, name)) is not None:
            yield f"normkit/{name}", value
    for row in record.layers:
        for column in NUMBERS:
            if (value := getattr(row, column)) is not None:
                yield f"normkit/{column}/{row.name}", value


def lines_at(path: Path, *, anew: bool = False) -> IO[str]:
    """Open a file for lines; one that an interrupted line ends gets a new one.

    Raises:
        DataError: If its folder does not exist, or it cannot be written.
    """
    try:
        torn = not anew and path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        file = path.open("w" if anew else "a", encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"path={str(path)!r} cannot be written ({error.strerror}); give a file in a folder "
            f"that exists"
        ) from error
    if torn:
        file.write("\n")
    return file


def write_lines(path: Path, records: Iterable[ProbedStep]) -> None:
    """Write all records, one a line, over what the file held."""
    with lines_at(path, anew=True) as file:
        file.writelines(record.to_json() + "\n" for record in records)


def summary_writer(log_dir: str | Path) -> Any:  # noqa: ANN401 - tensorboard need not be installed
    """Make a writer for TensorBoard.

    Raises:
        DataError: If it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an optional package
    except ImportError as error:
        raise DataError(
            f"log_dir={str(log_dir)!r} was given, and TensorBoard is not installed; install it "
            f"(pip install tensorboard), or give path= for JSON lines"
        ) from error
    return SummaryWriter(str(log_dir))
