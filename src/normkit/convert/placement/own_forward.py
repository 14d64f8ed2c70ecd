"""What one module's own forward does with its children: which it calls, and where it adds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import fx, nn

from normkit.convert.selection import find_norms
from normkit.tracing.kinds import (
    CONVOLUTIONS,
    Kind,
    is_norm,
    kind_of_operation,
    plain_name,
    value_arguments,
)
from normkit.tracing.symbolic import traced


class WholeChildren(fx.Tracer):
    """Keeps every child whole: what happens inside is the child's own affair."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every child is one."""
        return True


@dataclass(frozen=True, slots=True)
class OwnForward:
    """The calls of a module's own forward.

    Args:
        module: The module.
        graph: Its calls, in the order in which they come.
        join: The last sum of two things that the module computed or was given, if there is one.
    """

    module: nn.Module
    graph: fx.Graph
    join: fx.Node | None

    def sides(self) -> tuple[list[fx.Node], list[fx.Node]]:
        """Calls of children on the way to the sum: the side with more norms, then the other.

        Without a sum all calls are on the first side.
        """
        calls = [node for node in self.graph.nodes if node.op == "call_module"]
        if self.join is None:
            return calls, []
        ways = [ancestors(node) for node in _addends(self.join)]
        sides = [[node for node in calls if node in way] for way in ways]
        sides.sort(key=lambda side: len(self.norms(side)), reverse=True)
        return sides[0], sides[1]

    def child(self, node: fx.Node) -> nn.Module:
        """The module that is called."""
        return self.module.get_submodule(str(node.target))

    def norms(self, calls: list[fx.Node]) -> list[nn.Module]:
        """Norms inside of these children, each once, in the order of the calls."""
        return list(dict.fromkeys(n for node in calls for n in find_norms(self.child(node))))

    def is_chain(self, calls: list[fx.Node]) -> bool:
        """Whether the norms follow one upon the other rather than stand side by side."""
        with_norms = [node for node in calls if find_norms(self.child(node))]
        each = all(_holds_chain(self.child(node)) for node in with_norms)
        return each and all(earlier in ancestors(later) for earlier, later in pairwise(with_norms))

    def last_layer(self, calls: list[fx.Node]) -> nn.Module | None:
        """The last norm or convolution of these children, which decides the number of channels."""
        inside = [part for node in calls for part in self.child(node).modules()]
        found = [part for part in inside if is_norm(part) or isinstance(part, CONVOLUTIONS)]
        return found[-1] if found else None


def follow(module: nn.Module) -> OwnForward | None:
    """Follow a module's own forward; None if ``torch.fx`` cannot, or it has none of its own."""
    if is_sequence(module) or type(module).forward is nn.Module.forward:
        return None
    try:
        graph = traced(WholeChildren(), module)
    except Exception:  # noqa: BLE001 - the module's own code runs on proxies
        return None
    sums = [node for node in graph.nodes if _kind(node) == "sum" and len(_addends(node)) == 2]
    return OwnForward(module, graph, sums[-1] if sums else None)


def is_sequence(module: nn.Module) -> bool:
    """Whether its forward is that of ``Sequential``, which adds nothing to its parts."""
    return type(module).forward is nn.Sequential.forward


def _holds_chain(module: nn.Module) -> bool:
    if len(find_norms(module)) < 2:
        return True
    if is_sequence(module):
        return all(map(_holds_chain, module.children()))
    own = follow(module)
    if own is None:
        return False
    return own.is_chain([node for node in own.graph.nodes if node.op == "call_module"])


def ancestors(node: fx.Node) -> set[fx.Node]:
    """A call and everything whose values come to it; asking for a shape takes none."""
    found: set[fx.Node] = set()
    open_ = [node]
    while open_:
        at = open_.pop()
        if at not in found:
            found.add(at)
            open_.extend(() if _kind(at) == "ask" else _values(at))
    return found


def _values(node: fx.Node) -> Sequence[fx.Node]:
    called = node.op in ("call_function", "call_method")
    inputs = node.all_input_nodes
    return value_arguments(plain_name(node.target), inputs) if called else inputs


def _kind(node: fx.Node) -> Kind | None:
    called = node.op in ("call_function", "call_method")
    return kind_of_operation(plain_name(node.target)) if called else None


def _addends(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if source.op != "get_attr"]


def own_forwards(model: nn.Module) -> Iterator[OwnForward]:
    """Follow, from the inside out, every module that holds two norms or more."""
    for module in reversed(list(model.modules())):
        if not is_norm(module) and len(find_norms(module)) > 1:
            own = follow(module)
            if own is not None:
                yield own
