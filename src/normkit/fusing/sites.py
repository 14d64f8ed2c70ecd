"""Places in a module's own forward where a norm's result goes to a sum, to an activation."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from normkit.convert.bytecode import methods_of, read_by_forward
from normkit.convert.placement.own_forward import WholeChildren
from normkit.fusing.known import IN_PLACE_SUMS, SUMS, Known, of_node
from normkit.layers.base import is_watched
from normkit.passes import untouched
from normkit.text import shortened
from normkit.tracing.kinds import is_norm
from normkit.tracing.symbolic import fx_graph

WRITTEN_IN_PLACE = frozenset(("add", "sub", "mul", "truediv"))
"""Operations of Python that are recorded alike whether they write to their first argument."""
IN_PLACE = frozenset(("iadd", "isub", "imul", "itruediv", "setitem"))


@dataclass(frozen=True, slots=True)
class Site:
    """A norm, what is added to its result, and the activation behind that.

    Args:
        norm: The call of the norm.
        between: Calls of ``nn.Identity`` and the sum, in their order.
        residual: What is added, or None.
        end: The call of the activation.
        activation: Which it is.
    """

    norm: fx.Node
    between: tuple[fx.Node, ...]
    residual: fx.Node | None
    end: fx.Node
    activation: Known


@dataclass(frozen=True, slots=True)
class Own:
    """A module's own forward, as far as it can be followed.

    Args:
        name: The module's name in the model.
        module: The module.
        graph: The calls of its forward; None if it cannot be followed.
        why_not: Why it cannot, or why its forward must stay as it is; empty if neither.
    """

    name: str
    module: nn.Module
    graph: fx.Graph | None
    why_not: str

    def child(self, node: fx.Node) -> nn.Module:
        """The module that is called."""
        return self.module.get_submodule(str(node.target))

    def calls(self) -> Iterator[fx.Node]:
        """Calls of modules."""
        nodes = [] if self.graph is None else self.graph.nodes
        return (node for node in nodes if node.op == "call_module")


def follow(name: str, module: nn.Module) -> Own | None:
    """Follow a module's own forward; None if it has none."""
    if type(module).forward is nn.Module.forward or is_norm(module):
        return None
    try:
        graphs = [_graph(module, training) for training in (False, True)]
    except Exception as error:  # noqa: BLE001 - the module's own code runs on proxies
        return Own(name, module, None, f"its forward cannot be followed: {shortened(error)}")
    texts = [graph.python_code("self").src for graph in graphs]
    is_one = texts[0] == texts[1]
    return Own(name, module, graphs[0], _why_not(module, is_one) or _why_aliased(module, graphs[0]))


def _graph(module: nn.Module, training: bool) -> fx.Graph:
    with untouched(module, training=training):
        return fx_graph(WholeChildren(), module)


def _why_not(module: nn.Module, is_one: bool) -> str:
    """Why a module's forward must stay as it is; empty if another may stand for it."""
    kind = type(module)
    if not is_one:
        return "its forward differs between training and evaluation"
    if "forward" in vars(module):
        return "its forward was replaced on this very module"
    given = list(inspect.signature(kind.forward).parameters.values())[1:]
    plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if any(p.kind is not plain or p.default is not p.empty for p in given):
        return "its forward has optional arguments"
    methods = methods_of(kind).keys() - {"forward"}
    called = {path[0] for path in read_by_forward(kind) if path} & methods
    if called:
        return f"its forward calls its own {', '.join(sorted(called))}()"
    code = methods_of(kind)["forward"]
    if {"isinstance", "type", "hasattr"} & set(code.co_names):
        return "its forward asks what it was given"
    return ""


def _why_aliased(module: nn.Module, graph: fx.Graph) -> str:
    """Why a graph may say less than the forward does; empty if it says all.

    ``torch.fx`` records ``x += y`` as ``x + y``, which is another thing where ``x`` is used again,
    or is the caller's.
    """
    code = methods_of(type(module)).get("forward")
    if code is None or not any(map(_is_in_place, dis.get_instructions(code))):
        return ""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        first = node.args[0] if node.op == "call_function" and node.args else None
        if isinstance(first, fx.Node) and plain_operator(node) in WRITTEN_IN_PLACE:
            is_again = any(order[user] > order[node] for user in first.users)
            if is_again or first.op == "placeholder":
                return "its forward may change a map in place that is used elsewhere"
    return ""


def _is_in_place(instruction: dis.Instruction) -> bool:
    in_place = instruction.opname == "BINARY_OP" and instruction.argrepr.endswith("=")
    return in_place or instruction.opname.startswith("INPLACE_")


def sites(own: Own) -> Iterator[Site | tuple[fx.Node, str]]:
    """Find what can be put together; a norm whose result goes elsewhere, with the reason."""
    for node in own.calls():
        if is_norm(own.child(node)):
            found = _site(own, node)
            if found is not None:
                yield found if isinstance(found, Site) else (node, found)


def _site(own: Own, norm: fx.Node) -> Site | str | None:  # noqa: PLR0911 - a reason each
    if len(norm.args) != 1 or norm.kwargs:
        return None  # it ends with a sum already, or has a mask
    passed, last = _through_identities(own, norm)
    if len(last.users) != 1:
        ends = [of_node(user, own.module) or _is_sum(user) for user in last.users]
        return f"its result is used in {len(ends)} places" if any(ends) else None
    user = next(iter(last.users))
    residual = None
    if _is_sum(user):
        residual = _addend(user, last)
        if isinstance(residual, str):
            return residual if _ends_with_activation(own, user) else None
        more, last = _through_identities(own, user)
        passed += (user, *more)
        if len(last.users) != 1:
            return None
        user = next(iter(last.users))
    activation = of_node(user, own.module)
    if activation is None or user.args[:1] != (last,):
        return _behind(own, user)
    if user.op == "call_module" and is_watched(own.child(user)):
        return "hooks look at the activation"
    site = Site(norm, passed, residual, user, activation)
    return _disturbed(own, site) or site


def _behind(own: Own, user: fx.Node) -> str | None:
    """Say so where an activation comes after something that is neither a sum nor nothing."""
    if user.op == "call_module" and _ends_with_activation(own, user):
        return f"{type(own.child(user)).__name__} comes between it and the activation"
    return None


def _ends_with_activation(own: Own, node: fx.Node) -> bool:
    return any(of_node(user, own.module) for user in node.users)


def _through_identities(own: Own, node: fx.Node) -> tuple[tuple[fx.Node, ...], fx.Node]:
    passed: list[fx.Node] = []
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op != "call_module" or type(own.child(user)) is not nn.Identity:
            break
        if is_watched(own.child(user)):
            break
        passed.append(user)
        node = user
    return tuple(passed), node


def _is_sum(node: fx.Node) -> bool:
    called = node.op in ("call_function", "call_method")
    return called and len(node.args) == 2 and not node.kwargs and _sum_name(node) in SUMS


def _sum_name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else plain_operator(node)


def _addend(node: fx.Node, own: fx.Node) -> fx.Node | str:
    """What is added to ``own`` in a sum, or why the two cannot be put together."""
    first, second = node.args
    other = second if first is own else first
    if not isinstance(other, fx.Node) or other is own:
        return "a number is added to its result, or its result to itself"
    if other.op == "get_attr":
        return "a parameter is added to its result"
    if first is not own and _sum_name(node) in IN_PLACE_SUMS:
        return "its result is added in place to another map"
    return other


def _disturbed(own: Own, site: Site) -> str:
    """Why the norm cannot be computed where the activation is; empty if it can."""
    order = list(site.end.graph.nodes)
    last = order.index(site.end)
    mine = {site.norm, site.end, *site.between}
    begin = order.index(site.norm)
    for needed in (site.norm.args[0], site.residual):
        for user in needed.users if isinstance(needed, fx.Node) else ():
            between = begin < order.index(user) < last and user not in mine
            if between and _may_write(own, user):
                return f"{user.name} may write to a map that is needed later"
    return ""


def _may_write(own: Own, node: fx.Node) -> bool:
    """Whether a call between a norm and its activation may change what it is given."""
    if node.op == "call_module":
        return any(getattr(m, "inplace", False) for m in own.child(node).modules())
    name = str(node.target) if node.op == "call_method" else plain_operator(node)
    return name.endswith("_") or name in IN_PLACE or bool(node.kwargs.get("inplace"))


def plain_operator(node: fx.Node) -> str:
    """Name of the function that is called."""
    return str(getattr(node.target, "__name__", node.target))
