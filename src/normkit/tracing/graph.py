"""The calls of one forward as a graph: each call refers to the calls whose outputs it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from normkit.tracing.kinds import Kind


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module or an operation.

    Args:
        name: Name of the module in the model, or of the operation.
        kind: The role of the call, such as ``"norm"``; see ``normkit.tracing.kinds``.
        inputs: Indices of the calls whose output values it uses, in order. Calls whose output it
            only asks for its shape or dtype are not included.
    """

    name: str
    kind: Kind
    inputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Graph:
    """All calls of a forward, in order.

    Args:
        calls: The calls; their ``inputs`` refer to earlier ones.
        how: What traced the model: ``"torch.fx"`` or ``"the example input"``.
    """

    calls: tuple[Call, ...]
    how: str

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """For each call, the indices of the calls that take its output."""
        found: list[list[int]] = [[] for _ in self.calls]
        for index, call in enumerate(self.calls):
            for source in dict.fromkeys(call.inputs):
                found[source].append(index)
        return tuple(map(tuple, found))

    def of_kind(self, kind: Kind) -> Iterator[int]:
        """Indices of the calls of a kind."""
        return (index for index, call in enumerate(self.calls) if call.kind == kind)

    def destinations(self, index: int) -> dict[int, tuple[str, ...]]:
        """Find the calls that use the values of a call, directly or through moves.

        Returns:
            For the index of each such call, the names of the moves on the way to it.
        """
        found: dict[int, tuple[str, ...]] = {}
        open_: list[tuple[int, tuple[str, ...]]] = [(index, ())]
        while open_:
            at, through = open_.pop()
            for user in self.users[at]:
                call = self.calls[user]
                if call.kind == "move":
                    open_.append((user, (*through, call.name)))
                elif call.kind != "query":
                    found.setdefault(user, through)
        return found

    def ends(self, index: int) -> set[Kind]:
        """Follow a call's output along every path, up to the first call that matters there.

        Returns:
            The kinds of these calls: ``"norm"``, ``"sum"`` with another branch, or ``"output"``.
        """
        found: set[Kind] = set()
        seen: set[int] = set()
        open_ = list(self.users[index])
        while open_:
            at = open_.pop()
            if at in seen:
                continue
            seen.add(at)
            kind = self.calls[at].kind
            if kind in ("norm", "output") or self._joins_branches(at):
                found.add(kind)
            else:
                open_.extend(self.users[at])
        return found

    def _joins_branches(self, index: int) -> bool:
        """Whether this call adds two tensors that the model computed, rather than a constant."""
        call = self.calls[index]
        computed = {i for i in call.inputs if self.calls[i].kind != "constant"}
        return call.kind == "sum" and len(computed) > 1
