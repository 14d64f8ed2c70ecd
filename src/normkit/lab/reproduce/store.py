"""Runs of presets, one line of JSON each, in a file that several presets share."""

import hashlib
import json
import math
from typing import Any

from normkit.lab.environment import Environment
from normkit.lab.spec import Frozen

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
    """One run: what was asked for, what was measured, what it took, where it ran, on which data.

    The time is that of the processor, which other work on the machine does not lengthen.
    ``data_hash`` is the data set's fingerprint; older records do not have it.
    """

    spec: RunSpec
    values: Values
    cpu_time_s: float
    environment: Environment
    code_hash: str
    data_hash: str | None = None


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
