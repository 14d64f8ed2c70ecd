"""Tracing one module's own forward: which children it calls, and where it adds two branches."""

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
from normkit.tracing.symbolic import fx_graph


class _Tracer(fx.Tracer):
    """Records each child as one call, without the calls inside it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class OwnForward:
    """The calls of a module's own forward.

    Args:
        module: The module.
        graph: The calls, in order.
        join: The last sum of two tensors that the module computed or got as input, if any.
    """

    module: nn.Module
    graph: fx.Graph
    join: fx.Node | None

    def sides(self) -> tuple[list[fx.Node], list[fx.Node]]:
        """Return the calls of children in the two branches before the sum.

        The branch with more norms comes first. Without a sum, it has all calls.
        """
        calls = [node for node in self.graph.nodes if node.op == "call_module"]
        if self.join is None:
            return calls, []
        branches = [ancestors(node) for node in _addends(self.join)]
        sides = [[node for node in calls if node in branch] for branch in branches]
        sides.sort(key=lambda side: len(self.norms(side)), reverse=True)
        return sides[0], sides[1]

    def child(self, node: fx.Node) -> nn.Module:
        """Return the module that a node calls."""
        return self.module.get_submodule(str(node.target))

    def norms(self, calls: list[fx.Node]) -> list[nn.Module]:
        """Return the norms inside these children, each once, in the order of the calls."""
        return list(dict.fromkeys(n for node in calls for n in find_norms(self.child(node))))

    def is_chain(self, calls: list[fx.Node]) -> bool:
        """Whether each norm comes after the one before, rather than in a parallel branch."""
        with_norms = [node for node in calls if find_norms(self.child(node))]
        each = all(_holds_chain(self.child(node)) for node in with_norms)
        return each and all(earlier in ancestors(later) for earlier, later in pairwise(with_norms))

    def last_layer(self, calls: list[fx.Node]) -> nn.Module | None:
        """Return the last norm or convolution inside these children, if any."""
        inside = [part for node in calls for part in self.child(node).modules()]
        found = [part for part in inside if is_norm(part) or isinstance(part, CONVOLUTIONS)]
        return found[-1] if found else None


def trace_own_forward(module: nn.Module) -> OwnForward | None:
    """Trace a module's own forward; None if it has none, or if ``torch.fx`` cannot trace it."""
    if is_sequence(module) or type(module).forward is nn.Module.forward:
        return None
    try:
        graph = fx_graph(_Tracer(), module)
    except Exception:  # noqa: BLE001 - the module's own code runs on proxies
        return None
    sums = [node for node in graph.nodes if _kind(node) == "sum" and len(_addends(node)) == 2]
    return OwnForward(module, graph, sums[-1] if sums else None)


def is_sequence(module: nn.Module) -> bool:
    """Whether the module's forward is that of ``Sequential``."""
    return type(module).forward is nn.Sequential.forward


def _holds_chain(module: nn.Module) -> bool:
    if len(find_norms(module)) < 2:
        return True
    if is_sequence(module):
        return all(map(_holds_chain, module.children()))
    own = trace_own_forward(module)
    if own is None:
        return False
    return own.is_chain([node for node in own.graph.nodes if node.op == "call_module"])


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Return a call and all calls whose values it depends on; queries for a shape do not count."""
    found: set[fx.Node] = set()
    open_ = [node]
    while open_:
        at = open_.pop()
        if at not in found:
            found.add(at)
            open_.extend(() if _kind(at) == "query" else _values(at))
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
    """Trace the own forward of every module with at least two norms, inner modules first."""
    for module in reversed(list(model.modules())):
        if not is_norm(module) and len(find_norms(module)) > 1:
            own = trace_own_forward(module)
            if own is not None:
                yield own
