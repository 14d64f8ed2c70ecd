"""The report of folding: which norms were folded into which layers, and which were not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from normkit.convert.report import Left
from normkit.text import by_reason, module_name, table_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """A norm that was folded into the weights of other layers.

    Args:
        name: Its name in the model; of a shared layer the first of its names.
        old: The norm, as in ``"BatchNorm2d(64)"``.
        into: Names of the layers into whose weights it was folded.
        stays: The modules that are in its place now, such as its activation; ``"-"`` if there is
            only an identity.
    """

    name: str
    old: str
    into: tuple[str, ...]
    stays: str


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Folding:
    """A folded copy of a model and a report of what was done; prints as a table.

    Args:
        model: The copy, in evaluation mode.
        folded: The norms that were folded, in the order of the forward.
        left: The norms that were not folded, each with the reason.
        baked: Names of the layers whose computed weights were baked first.
        difference: Largest error of the output on the example input, divided by the largest output
            value; None if the outputs cannot be compared.
    """

    model: nn.Module
    folded: tuple[Folded, ...]
    left: tuple[Left, ...]
    baked: tuple[str, ...]
    difference: float | None

    def __repr__(self) -> str:
        return f"<Folding: {self._summary()}>"

    def __str__(self) -> str:
        lines = [self._summary()]
        head = ("name", "old", "into", "in its place")
        rows = [(module_name(f.name), f.old, ", ".join(f.into), f.stays) for f in self.folded]
        lines += table_lines([head, *rows]) if rows else []
        if self.baked:
            lines.append(f"weights baked: {', '.join(self.baked)}")
        return "\n".join([*lines, *self._left()])

    def _summary(self) -> str:
        count = f"folded {len(self.folded)} of {len(self.folded) + len(self.left)} norms"
        if self.difference is None:
            return f"{count}; the outputs cannot be compared (nothing finite, or no numbers)"
        return f"{count}; the output differs by {self.difference:.1e} of its largest value"

    def _left(self) -> list[str]:
        rows = ((f"{module_name(left.name)} ({left.old})", left.why) for left in self.left)
        return [f"left: {names}: {why}" for why, names in by_reason(rows).items()]
