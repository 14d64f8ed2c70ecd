"""What a check found: where, what, why it matters, and the way out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal, get_args

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
"""The worst first: it fails or learns nothing; it is likely a mistake; it is good to know."""

SHOWN = 4  # layers of a kind that are printed one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing about a norm that its owner should know.

    Args:
        name: The module's name; empty is the model itself.
        what: What was found, with its numbers.
        why: What it does to training or evaluation.
        fix: The way out.
        severity: ``"error"``: it fails, or the layer's output is constant or not finite.
            ``"warning"``: likely a mistake. ``"note"``: good to know, and often meant so.
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
        """All of it as plain values, for JSON."""
        return asdict(self)


class Findings(list[Finding]):
    """Findings, worst first; prints those of one kind together."""

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
        """How many there are of each severity, in a line."""
        counts = [sum(found.severity == severity for found in self) for severity in SEVERITIES]
        return ", ".join(
            f"{count} {severity}{'' if count == 1 else 's'}"
            for count, severity in zip(counts, SEVERITIES, strict=True)
        )

    def as_list(self) -> list[dict[str, str]]:
        """All of them as plain values, for JSON."""
        return [found.as_dict() for found in self]


def _lines(found: list[Finding]) -> Iterator[str]:
    """Print findings of one kind: what for each, why and the first one's fix once."""
    first = found[0]
    count = f" ({len(found)} layers)" if len(found) > 1 else ""
    yield f"{first.severity}{f': {first.check}' if first.check else ''}{count}"
    for each in found[:SHOWN]:
        yield f"  {each.name or 'the model itself'}: {each.what}"
    if rest := found[SHOWN:]:
        yield f"  and {len(rest)} more: {_few([each.name for each in rest])}"
    yield f"  why: {first.why}"
    several = " (the first one's)" if len({each.fix for each in found}) > 1 else ""
    yield f"  fix{several}: {first.fix}"


def _few(names: list[str], at_most: int = 6) -> str:
    return ", ".join(names[:at_most]) + (", ..." if len(names) > at_most else "")
