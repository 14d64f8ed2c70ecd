"""The findings of checks: where, what, why it matters, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from normkit.text import listed

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
"""The worst first; ``Finding`` explains them."""

SHOWN = 4  # findings of one kind that are printed in full


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One problem, or remarkable fact, about a norm.

    Args:
        name: The module's name; empty for the model itself.
        what: What was found, with its numbers.
        why: The effect on training or evaluation.
        fix: How to mend it.
        severity: ``"error"``: the model fails, or the layer's output is constant or not finite.
            ``"warning"``: probably a mistake. ``"note"``: good to know, and often intended.
        check: The name of the check.
    """

    name: str
    what: str
    why: str
    fix: str
    severity: Severity
    check: str = ""

    def __str__(self) -> str:
        return "\n".join(_lines([self]))

    def as_dict(self) -> dict[str, str]:
        """The fields as plain values, for JSON."""
        return asdict(self)


class Findings(list[Finding]):
    """Findings, worst first; findings of one kind are printed together."""

    def __str__(self) -> str:
        if not self:
            return "nothing found"
        kinds: dict[tuple[str, ...], list[Finding]] = {}
        for found in self:
            kinds.setdefault((found.severity, found.check, found.why), []).append(found)
        lines = [line for kind in kinds.values() for line in _lines(kind)]
        return "\n".join([*lines, self.summary])

    @property
    def summary(self) -> str:
        """The number of findings of each severity, in one line."""
        counts = [sum(found.severity == severity for found in self) for severity in SEVERITIES]
        return ", ".join(
            f"{count} {severity}{'' if count == 1 else 's'}"
            for count, severity in zip(counts, SEVERITIES, strict=True)
        )

    def as_list(self) -> list[dict[str, str]]:
        """The findings as plain values, for JSON."""
        return [found.as_dict() for found in self]


def _lines(found: list[Finding]) -> Iterator[str]:
    """Format findings of one kind: ``what`` of each, then ``why`` and the first ``fix`` once."""
    first = found[0]
    count = f" ({len(found)} layers)" if len(found) > 1 else ""
    yield f"{first.severity}{f': {first.check}' if first.check else ''}{count}"
    for each in found[:SHOWN]:
        yield f"  {each.name or 'the model itself'}: {each.what}"
    if rest := found[SHOWN:]:
        yield f"  and {len(rest)} more: {listed((each.name for each in rest), 6)}"
    yield f"  why: {first.why}"
    several = " (the first one's)" if len({each.fix for each in found}) > 1 else ""
    yield f"  fix{several}: {first.fix}"
