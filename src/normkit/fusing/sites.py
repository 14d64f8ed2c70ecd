"""Places in a module's own forward where a sum or an activation follows a norm."""

from __future__ import annotations

import dis
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx, nn

from normkit.convert.bytecode import methods_of, read_by_forward
from normkit.convert.placement.own_forward import WholeChildren
from normkit.fusing.known import IN_PLACE_SUMS, SUMS, Known, of_node
from normkit.layers.base import is_watched
from normkit.text import shortened
from normkit.tracing.kinds import is_norm
from normkit.tracing.symbolic import fx_graph

WRITTEN_IN_PLACE = frozenset(("add", "sub", "mul", "truediv"))
"""Operators that ``torch.fx`` records alike as ``x + y`` and as ``x += y``."""
IN_PLACE = frozenset(("iadd", "isub", "imul", "itruediv", "setitem"))


@dataclass(frozen=True, slots=True)
class Site:
    """The call of a norm, and those of the sum and the activation after it.

    Args:
        norm: The call of the norm.
        between: Calls of ``nn.Identity`` and of the sum, in their order.
        residual: The other term of the sum; None without a sum.
        end: The call of the activation.
        activation: The activation.
    """

    norm: fx.Node
    between: tuple[fx.Node, ...]
    residual: fx.Node | None
    end: fx.Node
    activation: Known


@dataclass(frozen=True, slots=True)
class Own:
    """A module's own forward, traced by ``torch.fx`` if that is possible.

    Args:
        name: The module's name in the model.
        module: The module.
        graph: The forward traced in evaluation mode; None if it cannot be traced.
        why_not: Why the forward cannot be traced or rewritten; empty if both are possible.
        in_training: The forward traced in training mode.
        is_certain: Whether every call does what was traced in its mode.
    """

    name: str
    module: nn.Module
    graph: fx.Graph | None
    why_not: str
    in_training: fx.Graph | None = None
    is_certain: bool = True

    def child(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self.module.get_submodule(str(node.target))

    def calls(self) -> Iterator[fx.Node]:
        """The nodes that call modules."""
        nodes = [] if self.graph is None else self.graph.nodes
        return (node for node in nodes if node.op == "call_module")

    def times_called(self) -> Counter[int]:
        """How often the forward calls each module, in the mode in which that is more often."""
        both = (self, replace(self, graph=self.in_training))
        first, second = (Counter(id(own.child(node)) for node in own.calls()) for own in both)
        return first | second

    def always_leads(self, norm: str, place: str) -> bool:
        """Whether in both modes the norm's result goes to this activation, and nowhere else."""
        if not self.is_certain:
            return False
        found = sites(replace(self, graph=self.in_training))
        wanted = norm, place, None
        ends = [(s.norm.target, s.end.target, s.residual) for s in found if isinstance(s, Site)]
        return wanted in ends


def follow(name: str, module: nn.Module) -> Own | None:
    """Trace a module's own forward; None if it has none."""
    if type(module).forward is nn.Module.forward or is_norm(module):
        return None
    try:
        graphs = [fx_graph(WholeChildren(), module, training=mode) for mode in (False, True)]
    except Exception as error:  # noqa: BLE001 - the module's own code runs on proxies
        return Own(name, module, None, f"torch.fx cannot trace its forward: {shortened(error)}")
    texts = [graph.python_code("self").src for graph in graphs]
    uncertain = _why_uncertain(module)
    differs = "its forward differs between training and evaluation" if texts[0] != texts[1] else ""
    why_not = uncertain or differs or _why_not(module) or _why_aliased(module, graphs[0])
    return Own(name, module, graphs[0], why_not, graphs[1], not uncertain)


def _why_uncertain(module: nn.Module) -> str:
    """Why a call may do something else than what was traced; empty if it cannot."""
    kind = type(module)
    given = list(inspect.signature(kind.forward).parameters.values())[1:]
    plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if any(p.kind is not plain or p.default is not p.empty for p in given):
        return "its forward has optional arguments"
    code = methods_of(kind).get("forward")
    if code is not None and {"isinstance", "type", "hasattr"} & set(code.co_names):
        return "its forward depends on the types of its inputs"
    return ""


def _why_not(module: nn.Module) -> str:
    """Why a module's forward cannot be rewritten; empty if it can."""
    kind = type(module)
    if "forward" in vars(module):
        return "its forward is an attribute of the module, not a method of its class"
    methods = methods_of(kind).keys() - {"forward"}
    called = {path[0] for path in read_by_forward(kind) if path} & methods
    return f"its forward calls its own {', '.join(sorted(called))}()" if called else ""


def _why_aliased(module: nn.Module, graph: fx.Graph) -> str:
    """Why the traced graph may compute something else than the forward; empty if it does not.

    ``torch.fx`` records ``x += y`` as ``x + y``. The results differ if ``x`` is used again, or is
    an input, which the caller may use.
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
                return "its forward may change, in place, a map that is used elsewhere"
    return ""


def _is_in_place(instruction: dis.Instruction) -> bool:
    in_place = instruction.opname == "BINARY_OP" and instruction.argrepr.endswith("=")
    return in_place or instruction.opname.startswith("INPLACE_")


def sites(own: Own) -> Iterator[Site | tuple[fx.Node, str]]:
    """Find what can be fused; for a norm that cannot, its node and the reason."""
    for node in own.calls():
        if is_norm(own.child(node)):
            found = _site(own, node)
            if found is not None:
                yield found if isinstance(found, Site) else (node, found)


def _site(own: Own, norm: fx.Node) -> Site | str | None:  # noqa: PLR0911 - a reason each
    if len(norm.args) != 1 or norm.kwargs:
        return None  # the call has a residual already, or a mask
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
        return "its activation has forward or backward hooks"
    site = Site(norm, passed, residual, user, activation)
    return _disturbed(own, site) or site


def _behind(own: Own, user: fx.Node) -> str | None:
    """Name a module that stands between a norm and an activation; None if there is none."""
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
    """The node that a sum adds to ``own``, or why the sum cannot be fused."""
    first, second = node.args
    other = second if first is own else first
    if not isinstance(other, fx.Node) or other is own:
        return "a number, or the result itself, is added to its result"
    if other.op == "get_attr":
        return "a parameter is added to its result"
    if first is not own and _sum_name(node) in IN_PLACE_SUMS:
        return "its result is added in place to another map"
    return other


def _disturbed(own: Own, site: Site) -> str:
    """Why the norm's call cannot be moved to the activation's place; empty if it can."""
    order = list(site.end.graph.nodes)
    last = order.index(site.end)
    mine = {site.norm, site.end, *site.between}
    begin = order.index(site.norm)
    for needed in (site.norm.args[0], site.residual):
        for user in needed.users if isinstance(needed, fx.Node) else ():
            between = begin < order.index(user) < last and user not in mine
            if between and _may_write(own, user):
                return f"{user.name} may write to a map that the norm reads"
    return ""


def _may_write(own: Own, node: fx.Node) -> bool:
    """Whether a call between a norm and its activation may change its arguments in place."""
    if node.op == "call_module":
        return any(getattr(m, "inplace", False) for m in own.child(node).modules())
    name = str(node.target) if node.op == "call_method" else plain_operator(node)
    return name.endswith("_") or name in IN_PLACE or bool(node.kwargs.get("inplace"))


def plain_operator(node: fx.Node) -> str:
    """Name of the function that a node calls."""
    return str(getattr(node.target, "__name__", node.target))
