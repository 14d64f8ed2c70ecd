"""Which convolution or linear layer feeds which norm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from normkit.tracing.graph import Graph
from normkit.tracing.kinds import is_norm, is_producer
from normkit.tracing.trace import trace


@dataclass(frozen=True, slots=True)
class Pair:
    """A layer whose output a norm takes.

    Args:
        producer: Name of the convolution or linear layer.
        norm: Name of the norm.
        through: Operations in between, which only move values; empty if there are none.
        exclusive: Whether nothing but this norm uses the producer's output.
    """

    producer: str
    norm: str
    through: tuple[str, ...] = ()
    exclusive: bool = True


@dataclass(frozen=True, slots=True)
class Feeds:
    """Who feeds whom in a model, and what could not be followed.

    Args:
        pairs: Producers with the norms that take their outputs, in the order of the forward.
        destinations: Where the output of each producer goes, by name.
        calls: How often each producer and norm is called in one forward.
        unseen: Producers and norms that the forward does not call.
        how: How the model was followed.
    """

    pairs: tuple[Pair, ...]
    destinations: Mapping[str, tuple[str, ...]]
    calls: Mapping[str, int]
    unseen: tuple[str, ...]
    how: str


def trace_feeds(model: nn.Module, example_input: Any = None) -> Feeds:  # noqa: ANN401
    """Find the norms of a model and the convolutions and linear layers that feed them.

    A layer feeds a norm if its values reach it as they are: directly, or through operations that
    only move, cast or drop them (reshape, concatenation, identity, dropout). A shared module has
    its first name.

    Args:
        model: The model, which is left as it was.
        example_input: Sent through the model once if ``torch.fx`` cannot follow it.

    Returns:
        The pairs, and for every layer where its output goes.

    Raises:
        TraceError: If the model cannot be followed either way.

    Example:
        >>> found = trace_feeds(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
        >>> found.pairs
        (Pair(producer='0', norm='1', through=(), exclusive=True),)
    """
    graph = trace(model, example_input)
    goes_to: dict[str, dict[str, None]] = {}
    pairs: dict[tuple[str, str], tuple[str, ...]] = {}
    for index in graph.of_kind("producer"):
        name = graph.calls[index].name
        for at, through in graph.destinations(index).items():
            user = graph.calls[at]
            goes_to.setdefault(name, {})[user.name] = None
            if user.kind == "norm":
                pairs.setdefault((name, user.name), through)
    calls = _counted(graph)
    return Feeds(
        tuple(Pair(p, n, through, len(goes_to[p]) == 1) for (p, n), through in pairs.items()),
        {name: tuple(users) for name, users in goes_to.items()},
        calls,
        tuple(name for name, m in model.named_modules() if _counts(m) and name not in calls),
        graph.how,
    )


def _counts(module: nn.Module) -> bool:
    return is_norm(module) or is_producer(module)


def _counted(graph: Graph) -> Counter[str]:
    return Counter(call.name for call in graph.calls if call.kind in ("producer", "norm"))
