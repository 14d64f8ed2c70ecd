"""A layer as one node of a graph that ``torch.fx`` records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy, Tracer

from normkit.errors import InputTypeError, TraceError


def record_call(
    layer: nn.Module, x: object, mask: object, base_forward: Callable[..., Tensor] | None
) -> Proxy:
    """Record a call on a ``torch.fx.Proxy`` as one node, and refuse anything else.

    The tracer cannot look inside: what a layer computes depends on the values of the shape. So the
    layer becomes a leaf, as torch's own norms are.

    Args:
        layer: The layer that is called.
        x: What it is called with; not a tensor.
        mask: Likewise, or None.
        base_forward: None records a call of the whole layer. A subclass with a ``forward`` of its
            own has already run the code above ``super().forward(x)``; the node then calls this
            function of the layer and the inputs, which does what ``super().forward`` does.

    Raises:
        InputTypeError: If ``x`` is not a proxy.
        TraceError: If the layer is the whole model.
    """
    name = type(layer).__name__
    if not isinstance(x, Proxy):
        raise InputTypeError(f"{name} was given a {type(x).__name__}; it takes a torch.Tensor")
    path = x.tracer.path_of_module(layer) if isinstance(x.tracer, Tracer) else ""
    if not path:
        raise TraceError(
            f"torch.fx was asked to trace {name} itself, whose inside it cannot follow; trace a "
            f"model that holds it, for instance nn.Sequential(layer)"
        )
    given: tuple[Any, ...] = (x,) if mask is None else (x, mask)
    if base_forward is None:
        return x.tracer.create_proxy("call_module", path, given, {})
    itself = x.tracer.create_proxy("get_attr", path, (), {})
    return x.tracer.create_proxy("call_function", base_forward, (itself, *given), {})
