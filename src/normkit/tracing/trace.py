"""One forward of a model as a graph of calls, by whichever way works."""

from __future__ import annotations

from typing import Any

from torch import nn

from normkit.errors import TraceError
from normkit.tracing.graph import Graph
from normkit.tracing.kinds import is_norm
from normkit.tracing.running import trace_by_running
from normkit.tracing.symbolic import trace_symbolically


def trace(model: nn.Module, example_input: Any = None) -> Graph:  # noqa: ANN401
    """Follow one forward of a model, by ``torch.fx``, else on an example input.

    ``torch.fx`` follows the model in the mode it is in; the example input is sent through in
    evaluation mode. The model is left as it was.

    Args:
        model: The model.
        example_input: What the model is called with if ``torch.fx`` cannot follow it: a tuple of
            arguments, a dict of named ones, or the only one.

    Returns:
        The calls, with norms, convolutions and linear layers as wholes.

    Raises:
        TraceError: If neither way works, with the reasons.

    Example:
        >>> graph = trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> [call.name for call in graph.calls if call.kind == "norm"], graph.how
        (['1'], 'torch.fx')
    """
    try:
        return trace_symbolically(model)
    except Exception as error:  # noqa: BLE001 - the model's own code runs on proxies
        why = _shortened(error)
    if not has_forward(model):
        raise TraceError(f"{type(model).__name__} cannot be followed: {without_forward(model)}")
    if example_input is None:
        raise TraceError(
            f"torch.fx cannot follow {type(model).__name__} ({why}); pass example_input=, a tuple "
            f"of arguments, a dict of named ones or the only one, which is then sent through once"
        )
    try:
        return trace_by_running(model, example_input)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be followed: torch.fx says {why}, and the example "
            f"input {_shortened(error)}"
        ) from error


def has_forward(model: nn.Module) -> bool:
    """Whether calling the model itself means something; containers leave that to others."""
    forward = type(model).forward
    lightning = getattr(forward, "__qualname__", "") == "LightningModule.forward"
    return "forward" in vars(model) or not (lightning or forward is nn.Module.forward)


def without_forward(model: nn.Module) -> str:
    """Say which part of a model without a forward to pass instead."""
    parts = [name for name, child in model.named_children() if any(map(is_norm, child.modules()))]
    named = f", such as model.{parts[0]}" if parts else ""
    return f"it has no forward of its own; pass the part that has one{named}"


def _shortened(error: Exception, at_most: int = 120) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= at_most else f"{text[:at_most]}..."
