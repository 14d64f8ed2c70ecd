"""Runs of presets, one line of JSON each, in a file that several presets share."""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from normkit.lab.environment import Environment
from normkit.lab.records import file_errors
from normkit.lab.spec import Frozen

RECORDS_NAME = "records.jsonl"
DIGITS = 4  # significant digits of a recorded measurement

Values = dict[str, Any]


class RunSpec(Frozen):
    """Everything that decides a run; equal specs on one machine give equal values.

    Args:
        task: What is run.
        settings: Of the task.
        arm: What is compared: a norm, a size of the training set.
        seed: Of weights, data and order.
    """

    task: str
    settings: dict[str, Any]
    arm: str
    seed: int

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that differ wherever the spec differs."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class RunRecord(Frozen):
    """One run: what was asked for, what was measured, what it took, and where it ran.

    The time is that of the processor, which other work on the machine does not lengthen.
    """

    spec: RunSpec
    values: Values
    cpu_time_s: float
    environment: Environment
    code_hash: str


def rounded(value: Any) -> Any:  # noqa: ANN401 - whatever a task measures
    """The value with four significant digits; what is not finite becomes None.

    Example:
        >>> rounded({"loss": [1.23456, float("nan")], "steps": 12345})
        {'loss': [1.235, None], 'steps': 12345}
    """
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def append_run(path: Path, record: RunRecord) -> None:
    """Add a record; a line that an earlier run broke off is ended first.

    Raises:
        DataError: If it cannot be written.
    """
    with file_errors(path), path.open("ab+") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        start = b"" if file.read(1) in (b"\n", b"") else b"\n"
        file.write(start + record.model_dump_json().encode() + b"\n")


def read_runs(path: Path) -> dict[str, RunRecord]:
    """Records by the keys of their specs; lines that are none are left out, the last one counts.

    Raises:
        DataError: If the file cannot be read.
    """
    if not path.exists():
        return {}
    with file_errors(path):
        lines = path.read_bytes().splitlines()
    return {record.spec.key: record for record in _parsed(lines)}


def _parsed(lines: Iterable[bytes]) -> Iterable[RunRecord]:
    for line in lines:
        try:
            yield RunRecord.model_validate_json(line)
        except ValidationError:
            continue  # broken off by a kill: the run is done again
