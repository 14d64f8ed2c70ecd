"""Reports of which weights of a model were changed, and why the others were not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from normkit.text import by_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightReport:
    """Which layers of a model were changed; prints as a few lines.

    Args:
        done: What was done, such as ``"standardized"``.
        changed: Names of the changed layers.
        skipped: For the name of each other convolution and linear layer, why it was not changed.
        how: How the layers were chosen, such as ``"traced by torch.fx"``; may be empty.
    """

    done: str
    changed: tuple[str, ...]
    skipped: Mapping[str, str]
    how: str

    def __str__(self) -> str:
        how = f" ({self.how})" if self.how else ""
        lines = [f"{self.done} {_counted(self.changed)}{how}"]
        lines += [f"  {name}" for name in self.changed]
        if self.skipped:
            lines.append(f"left alone {_counted(tuple(self.skipped))}")
        lines += [
            f"  {reason}: {names}" for reason, names in by_reason(self.skipped.items()).items()
        ]
        return "\n".join(lines)


def _counted(names: tuple[str, ...]) -> str:
    return f"{len(names)} layer{'' if len(names) == 1 else 's'}"
