"""What is recorded of each run of a preset, in a file that several presets share."""

import math
from typing import Any

from normkit.lab.records import Record
from normkit.lab.spec import RunSpec

DIGITS = 4  # significant digits of a recorded measurement

Values = dict[str, Any]


class PresetSpec(RunSpec):
    """One arm of a preset's task, with one seed.

    Args:
        task: What is run.
        settings: Of the task, those that are not its defaults.
        arm: What is compared: a norm, a size of the training set.
        seed: Of weights, data and order.
        device: Where it computes.
    """

    task: str
    settings: dict[str, Any]
    arm: str
    seed: int
    device: str = "cpu"

    @property
    def uses_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self.device.startswith("cuda")


class PresetRecord(Record[PresetSpec]):
    """One run of a preset: what was measured, and what it took.

    The time is that of the processor, which other work on the machine does not lengthen. A run
    that failed has no values and a message that says why.
    """

    values: Values
    cpu_time_s: float
    message: str | None = None

    @property
    def is_final(self) -> bool:
        """Whether it ended as it should; a failed run is tried again."""
        return self.message is None


def rounded(value: Any) -> Any:
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
