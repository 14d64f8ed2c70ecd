"""Tracing one forward of a model: with ``torch.fx``, or else by running it."""

from __future__ import annotations

from typing import Any

from torch import nn

from normkit.errors import TraceError
from normkit.text import shortened
from normkit.tracing.by_running import trace_by_running
from normkit.tracing.graph import Graph
from normkit.tracing.kinds import is_norm
from normkit.tracing.symbolic import trace_symbolically


def trace(model: nn.Module, example_input: Any = None) -> Graph:
    """Trace one forward of a model with ``torch.fx``, or else by running it on an example input.

    ``torch.fx`` traces the model in its current mode; the example input is sent through the model
    in evaluation mode. The model is not changed.

    Args:
        model: The model.
        example_input: Sent through the model if ``torch.fx`` cannot trace it: a tuple of
            arguments, a dict of keyword arguments, or a single argument.

    Returns:
        The calls; each norm, convolution and linear layer is one call.

    Raises:
        TraceError: If neither way works; the error says why for each.

    Example:
        >>> graph = trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> [call.name for call in graph.calls if call.kind == "norm"], graph.how
        (['1'], 'torch.fx')
    """
    try:
        return trace_symbolically(model)
    except Exception as error:  # noqa: BLE001 - the model's own code runs on proxies
        why = _summary(error)
    if not has_forward(model):
        raise TraceError(f"{type(model).__name__} cannot be traced: {no_forward_advice(model)}")
    if example_input is None:
        raise TraceError(
            f"torch.fx cannot trace {type(model).__name__} ({why}); pass example_input=, a tuple "
            f"of arguments, a dict of keyword arguments or a single argument, which is then sent "
            f"through the model once"
        )
    try:
        return trace_by_running(model, example_input)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be traced: torch.fx raised {why}, and running it on "
            f"the example input raised {_summary(error)}"
        ) from error


def has_forward(model: nn.Module) -> bool:
    """Whether the model defines a forward, unlike an ``nn.ModuleList`` or ``nn.ModuleDict``."""
    forward = type(model).forward
    lightning = getattr(forward, "__qualname__", "") == "LightningModule.forward"
    return "forward" in vars(model) or not (lightning or forward is nn.Module.forward)


def no_forward_advice(model: nn.Module) -> str:
    """Say that a model has no forward, and which part of it to pass instead."""
    parts = [name for name, child in model.named_children() if any(map(is_norm, child.modules()))]
    named = f", such as model.{parts[0]}" if parts else ""
    return f"it has no forward of its own; pass the part that has one{named}"


def _summary(error: Exception) -> str:
    return shortened(f"{type(error).__name__}: {error}", at_most=120)
