"""A layer as one node of a graph that ``torch.fx`` records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy, Tracer

from normkit.errors import InputTypeError, TraceError


def record_call(
    layer: nn.Module, inputs: tuple[object, ...], base_forward: Callable[..., Tensor] | None
) -> Proxy:
    """Record a call on a ``torch.fx.Proxy`` as one node, and refuse anything else.

    The tracer cannot trace into a layer, whose computation depends on the values of the shape. So
    the layer becomes a leaf, as torch's own norms are.

    Args:
        layer: The layer that is called.
        inputs: The input, the mask and the residual; the last two may be None.
        base_forward: None records a call of the whole layer. If a subclass overrides ``forward``,
            the tracer has already recorded its code before ``super().forward(x)``; the node then
            calls this function with the layer and the inputs in place of ``super().forward``.

    Raises:
        InputTypeError: If ``x`` is not a proxy.
        TraceError: If the layer is the whole model.
    """
    name, (x, mask, residual) = type(layer).__name__, inputs
    if not isinstance(x, Proxy):
        raise InputTypeError(f"{name} was given a {type(x).__name__}; it takes a torch.Tensor")
    path = x.tracer.path_of_module(layer) if isinstance(x.tracer, Tracer) else ""
    if not path:
        raise TraceError(
            f"torch.fx was asked to trace {name} itself, which it can record only as one call; "
            f"trace a model that holds the layer, for instance nn.Sequential(layer)"
        )
    given: tuple[Any, ...] = (x,) if mask is None else (x, mask)
    named = {} if residual is None else {"residual": residual}
    if base_forward is None:
        return x.tracer.create_proxy("call_module", path, given, named)
    itself = x.tracer.create_proxy("get_attr", path, (), {})
    return x.tracer.create_proxy("call_function", base_forward, (itself, *given), named)
