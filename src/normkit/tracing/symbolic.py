"""The calls of a forward without running it, by ``torch.fx``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from normkit.passes import Snapshot, call_with_cleanup
from normkit.tracing.graph import Call, Graph
from normkit.tracing.kinds import (
    VALUES,
    is_norm,
    is_producer,
    kind_of_module,
    kind_of_operation,
    plain_name,
    value_arguments,
)


class _Tracer(fx.Tracer):
    """Keeps norms, convolutions and linear layers of any library whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_whole(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Run the module's own code alone: the user's hooks are not for proxies."""
        return super().call_module(m, m.forward, args, kwargs)


def _is_whole(module: nn.Module) -> bool:
    return is_norm(module) or is_producer(module) or parametrize.is_parametrized(module)


def traced(tracer: fx.Tracer, module: nn.Module) -> fx.Graph:
    """Run a module's code on proxies; the module and torch are then what they were before.

    Raises:
        Exception: Whatever the module's code raises on proxies.
    """
    before = Snapshot(module)
    return call_with_cleanup(
        lambda: tracer.trace(module, concrete_args=defaults_of(module)), before.put_back
    )


def trace_symbolically(model: nn.Module) -> Graph:
    """Follow a model by running its code on proxies.

    Raises:
        Exception: Whatever the model's code raises on proxies.
    """
    if _is_whole(model):
        kind = kind_of_module(model)
        calls = (Call("input", "input"), Call("", kind, (0,)), Call("the output", "output", (1,)))
        return Graph(calls, "torch.fx")
    graph = traced(_Tracer(), model)
    names = {module: name for name, module in model.named_modules()}
    index = {node: i for i, node in enumerate(graph.nodes)}
    calls = tuple(_call(node, index, model, names) for node in graph.nodes)
    return Graph(calls, "torch.fx")


def _call(
    node: fx.Node, index: dict[fx.Node, int], model: nn.Module, names: dict[nn.Module, str]
) -> Call:
    inputs = tuple(index[source] for source in node.all_input_nodes)
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return Call(names[module], kind_of_module(module), inputs)
    if node.op in ("call_function", "call_method"):
        name = plain_name(node.target)
        if node.target is getattr and node.args[1] in VALUES:
            name = str(node.args[1])
        return Call(name, kind_of_operation(name), tuple(value_arguments(name, inputs)))
    if node.op == "output":
        return Call("the output", "output", inputs)
    return Call(str(node.target), "input" if node.op == "placeholder" else "constant", inputs)


def defaults_of(model: nn.Module) -> dict[str, Any]:
    """Arguments that a caller may leave out, as they are then."""
    parameters = inspect.signature(model.forward).parameters
    return {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
