"""The calls of one forward, and who takes whose output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from normkit.tracing.kinds import Kind


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module or an operation.

    Args:
        name: The module's name in the model, else the operation's.
        kind: What it is to somebody who follows the model.
        inputs: Indices of the calls whose outputs it takes, in order; not of those that it only
            asks for a shape.
    """

    name: str
    kind: Kind
    inputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Graph:
    """All calls of a forward in their order.

    Args:
        calls: The calls; ``inputs`` point to earlier ones.
        how: How they were found.
    """

    calls: tuple[Call, ...]
    how: str

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the calls that take the output of each."""
        found: list[list[int]] = [[] for _ in self.calls]
        for index, call in enumerate(self.calls):
            for source in dict.fromkeys(call.inputs):
                found[source].append(index)
        return tuple(map(tuple, found))

    def of_kind(self, kind: Kind) -> Iterator[int]:
        """Indices of the calls of a kind."""
        return (index for index, call in enumerate(self.calls) if call.kind == kind)

    def destinations(self, index: int) -> dict[int, tuple[str, ...]]:
        """Which calls use the values of a call, and through which moves they come there."""
        found: dict[int, tuple[str, ...]] = {}
        open_: list[tuple[int, tuple[str, ...]]] = [(index, ())]
        while open_:
            at, through = open_.pop()
            for user in self.users[at]:
                call = self.calls[user]
                if call.kind == "move":
                    open_.append((user, (*through, call.name)))
                elif call.kind != "ask":
                    found.setdefault(user, through)
        return found

    def ends(self, index: int) -> set[Kind]:
        """What a call's output meets first on its ways on: norms, sums with others, the output."""
        found: set[Kind] = set()
        seen: set[int] = set()
        open_ = list(self.users[index])
        while open_:
            at = open_.pop()
            if at in seen:
                continue
            seen.add(at)
            kind = self.calls[at].kind
            if kind in ("norm", "output") or self._joins(at):
                found.add(kind)
            else:
                open_.extend(self.users[at])
        return found

    def _joins(self, index: int) -> bool:
        """Whether this adds two things that the model computed."""
        call = self.calls[index]
        computed = {i for i in call.inputs if self.calls[i].kind != "constant"}
        return call.kind == "sum" and len(computed) > 1
