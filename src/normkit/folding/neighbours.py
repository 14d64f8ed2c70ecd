"""Finding the layers before and after a norm whose values it gets or gives without change."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch import nn

from normkit.layers.base import is_watched
from normkit.tracing import Graph
from normkit.tracing.kinds import MOVING_MODULES

VALUE_PRESERVING = frozenset((
    "view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze",
    "contiguous", "clone", "detach", "data", "permute", "transpose", "movedim", "moveaxis",
    "swapaxes", "swapdims", "t", "T", "mT", "roll", "flip", "channel_shuffle", "pixel_shuffle",
    "pixel_unshuffle",
))  # fmt: skip
"""Operations whose output has exactly the values of their input, in some order."""


class Connection(NamedTuple):
    """A connection between two calls, with only moves and identities in between.

    Args:
        end: Index of the call at the other end.
        through: Norms in between that are folded already and so are identities, in the order of
            the forward.
    """

    end: int
    through: tuple[int, ...] = ()


@dataclass(frozen=True)
class Neighbours:
    """The calls of a forward, and which of them pass their values on unchanged.

    Args:
        graph: The calls.
        modules: All modules, by the first of their names.
        identities: Calls of norms that are folded and so have become identities.
    """

    graph: Graph
    modules: dict[str, nn.Module]
    identities: set[int] = field(default_factory=set)

    def source(self, at: int) -> Connection | str:
        """Find the producer that feeds only this call, and is its only input, or say why not."""
        calls, through = self.graph.calls, ()
        while True:
            inputs = self._values(calls[at].inputs)
            if len(inputs) != 1:
                return f"its input comes from {len(inputs)} places"
            (before,) = inputs
            if calls[before].kind != "producer" and not self._preserves_values(before):
                return f"its input comes from {self._shown(before)}"
            others = [user for user in self.users(before) if user != at]
            if others:
                return f"{self._shown(before)} feeds {self._shown(others[0])} as well"
            if calls[before].kind == "producer":
                return Connection(before, through)
            through = (before, *through) if before in self.identities else through
            at = before

    def targets(self, at: int, through: tuple[int, ...] = ()) -> list[Connection] | str:
        """Find the producers that use a call's values, or say why other calls use them too."""
        found = []
        for user in self.users(at):
            call = self.graph.calls[user]
            if call.kind == "producer":
                found.append(Connection(user, through))
            elif self._preserves_values(user):
                passed = (*through, user) if user in self.identities else through
                further = self.targets(user, passed)
                if isinstance(further, str):
                    return further
                found += further
            else:
                return f"its result goes into {self._shown(user)}"
        return found or "nothing uses its result"

    def users(self, at: int) -> list[int]:
        """Return the calls that use the values of a call."""
        return self._values(self.graph.users[at])

    @cached_property
    def num_calls(self) -> Counter[str]:
        """Number of calls of each norm and producer."""
        return Counter(c.name for c in self.graph.calls if c.kind in ("norm", "producer"))

    @cached_property
    def read_directly(self) -> set[str]:
        """Names of the modules whose parameters the forward uses without calling the module."""
        constants = (call.name for call in self.graph.calls if call.kind == "constant")
        return {name.rpartition(".")[0] for name in constants}

    def _values(self, calls: tuple[int, ...]) -> list[int]:
        return [index for index in calls if index not in self._numbers]

    @cached_property
    def _numbers(self) -> set[int]:
        """Calls that only query a shape, dtype or device, or compute with the answers."""
        found: set[int] = set()
        for index, call in enumerate(self.graph.calls):
            if call.kind == "query" or (call.inputs and found.issuperset(call.inputs)):
                found.add(index)
        return found

    def _preserves_values(self, index: int) -> bool:
        """Whether the output of a call has exactly the values of its input."""
        call = self.graph.calls[index]
        if index in self.identities:
            return True
        module = self.modules.get(call.name) if call.kind == "move" else None
        if module is None:
            return call.kind == "move" and call.name in VALUE_PRESERVING
        return isinstance(module, MOVING_MODULES) and not is_watched(module)

    def _shown(self, index: int) -> str:
        call = self.graph.calls[index]
        module = self.modules.get(call.name) if call.name else None
        kind = f" ({type(module).__name__})" if module is not None else ""
        return call.name if call.kind in ("input", "output") else f"{call.name!r}{kind}"
