"""Tracing a model with ``torch.fx``, which runs its code on proxies instead of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from normkit.passes import Snapshot, call_with_cleanup
from normkit.tracing.graph import Call, Graph
from normkit.tracing.kinds import (
    VALUE_ATTRIBUTES,
    is_norm,
    is_producer,
    kind_of_module,
    kind_of_operation,
    plain_name,
    value_arguments,
)


class _Tracer(fx.Tracer):
    """Records norms, convolutions and linear layers of any library as one call each."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the module's forward without its hooks, because users' hooks expect tensors."""
        return super().call_module(m, m.forward, args, kwargs)


def _is_leaf(module: nn.Module) -> bool:
    return is_norm(module) or is_producer(module) or parametrize.is_parametrized(module)


def fx_graph(tracer: fx.Tracer, module: nn.Module, *, training: bool | None = None) -> fx.Graph:
    """Trace a module with ``torch.fx``, then restore the module and torch's settings.

    Arguments of the forward that have a default get that value.

    Args:
        tracer: What follows the forward.
        module: The module.
        training: Mode of all its modules meanwhile; None keeps each module's mode.

    Raises:
        Exception: Whatever the module's code raises on proxies.
    """
    before = Snapshot(module)
    parameters = inspect.signature(module.forward).parameters
    empty = inspect.Parameter.empty
    defaults = {n: p.default for n, p in parameters.items() if p.default is not empty}

    def traced() -> fx.Graph:
        if training is not None:
            for each in module.modules():
                each.training = training
        return tracer.trace(module, concrete_args=defaults)

    return call_with_cleanup(traced, before.put_back)


def trace_symbolically(model: nn.Module) -> Graph:
    """Trace a model with ``torch.fx``.

    Raises:
        Exception: Whatever the model's code raises on proxies.
    """
    if _is_leaf(model):  # a graph of one call, which torch.fx would not record
        kind = kind_of_module(model)
        calls = (Call("input", "input"), Call("", kind, (0,)), Call("the output", "output", (1,)))
        return Graph(calls, "torch.fx")
    graph = fx_graph(_Tracer(), model)
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
        if node.target is getattr and node.args[1] in VALUE_ATTRIBUTES:
            name = str(node.args[1])
        return Call(name, kind_of_operation(name), tuple(value_arguments(name, inputs)))
    if node.op == "output":
        return Call("the output", "output", inputs)
    return Call(str(node.target), "input" if node.op == "placeholder" else "constant", inputs)
