"""A layer as one node of a graph that ``torch.fx`` records."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy, Tracer

from normkit.errors import InputTypeError, TraceError


def record_call(
    layer: nn.Module, x: object, mask: object, residual: object, overridden: bool
) -> Proxy:
    """Record a call on a ``torch.fx.Proxy`` as one node, and refuse anything else.

    The tracer cannot look inside: what a layer computes depends on the values of the shape. So the
    layer becomes a leaf, as torch's own norms are.

    Args:
        layer: The layer that is called.
        x: What it is called with; not a tensor.
        mask: Likewise, or None.
        residual: Likewise, or None.
        overridden: Whether a subclass has a ``forward`` of its own, which called this one. The node
            then stands for the part below it alone: ``normalize_below``.

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
    named = {} if residual is None else {"residual": residual}
    if not overridden:
        return x.tracer.create_proxy("call_module", path, given, named)
    itself = x.tracer.create_proxy("get_attr", path, (), {})
    return x.tracer.create_proxy("call_function", normalize_below, (itself, *given), named)


def normalize_below(
    layer: nn.Module, x: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Do what ``super().forward(x)`` does in a subclass of a layer that has its own ``forward``."""
    from normkit.layers.base import NormLayer  # noqa: PLC0415 - it imports this module

    return NormLayer.forward(layer, x, mask, residual)  # type: ignore[arg-type]
