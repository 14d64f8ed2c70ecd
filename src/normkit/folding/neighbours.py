"""Whose values come into a norm unchanged, and where its own go unchanged."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch import nn

from normkit.layers.base import is_watched
from normkit.tracing import Call, Graph

KEEPING_MODULES = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.ChannelShuffle,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
)
KEEPING = frozenset((
    "view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze",
    "contiguous", "clone", "detach", "data", "permute", "transpose", "movedim", "moveaxis",
    "swapaxes", "swapdims", "t", "T", "mT", "roll", "flip", "channel_shuffle", "pixel_shuffle",
    "pixel_unshuffle",
))  # fmt: skip
"""Operations and modules that keep all values at evaluation, in whatever order."""


class Way(NamedTuple):
    """From one call to another, with only moves and identities in between.

    Args:
        end: The call at the other end.
        through: Norms on the way that have become identities, in the order of the forward.
    """

    end: int
    through: tuple[int, ...] = ()


@dataclass(frozen=True)
class Neighbours:
    """The calls of a forward, with what is known of values that pass unchanged.

    Args:
        graph: The calls.
        modules: All modules by their first names.
        passing: Calls that have become identities since.
    """

    graph: Graph
    modules: dict[str, nn.Module]
    passing: set[int] = field(default_factory=set)

    def source(self, at: int) -> Way | str:
        """Find the call whose values alone come to another and go nowhere else, or say why not."""
        calls, through = self.graph.calls, ()
        while True:
            inputs = self._values(calls[at].inputs)
            if len(inputs) != 1:
                return f"its input comes from {len(inputs)} places"
            (before,) = inputs
            if calls[before].kind != "producer" and not self._keeps(before):
                return f"its input comes from {self._shown(before)}"
            others = [user for user in self.users(before) if user != at]
            if others:
                return f"{self._shown(before)} feeds {self._shown(others[0])} as well"
            if calls[before].kind == "producer":
                return Way(before, through)
            through = (before, *through) if before in self.passing else through
            at = before

    def targets(self, at: int, through: tuple[int, ...] = ()) -> list[Way] | str:
        """Find all calls that take the values of one, if all have weights, or say why not."""
        found = []
        for user in self.users(at):
            call = self.graph.calls[user]
            if call.kind == "producer":
                found.append(Way(user, through))
            elif self._keeps(user):
                further = self.targets(user, (*through, user) if user in self.passing else through)
                if isinstance(further, str):
                    return further
                found += further
            else:
                return f"its result goes into {self._shown(user)}"
        return found or "nothing takes its result"

    def users(self, at: int) -> list[int]:
        """Calls that use the values of one."""
        return self._values(self.graph.users[at])

    @cached_property
    def num_calls(self) -> Counter[str]:
        """How often each norm and producer is called."""
        return Counter(c.name for c in self.graph.calls if c.kind in ("norm", "producer"))

    @cached_property
    def read_directly(self) -> set[str]:
        """Names of modules whose parameters the forward uses without calling them."""
        constants = (call.name for call in self.graph.calls if call.kind == "constant")
        return {name.rpartition(".")[0] for name in constants}

    def _values(self, calls: tuple[int, ...]) -> list[int]:
        return [index for index in calls if index not in self._numbers]

    @cached_property
    def _numbers(self) -> set[int]:
        """Calls that only ask for a shape, a dtype or a device, or calculate with those."""
        found: set[int] = set()
        for index, call in enumerate(self.graph.calls):
            if call.kind == "query" or (call.inputs and found.issuperset(call.inputs)):
                found.add(index)
        return found

    def _keeps(self, index: int) -> bool:
        """Whether a call gives all values that it takes, in the same order."""
        call = self.graph.calls[index]
        if index in self.passing:
            return True
        module = self.modules.get(call.name) if call.kind == "move" else None
        if module is None:
            return call.kind == "move" and call.name in KEEPING
        return isinstance(module, KEEPING_MODULES) and not is_watched(module)

    def _shown(self, index: int) -> str:
        call: Call = self.graph.calls[index]
        module = self.modules.get(call.name) if call.name else None
        kind = f" ({type(module).__name__})" if module is not None else ""
        return call.name if call.kind in ("input", "output") else f"{call.name!r}{kind}"
