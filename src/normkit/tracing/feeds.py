"""Which convolution or linear layer feeds which norm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from normkit.tracing.kinds import is_norm, is_producer
from normkit.tracing.trace import trace


@dataclass(frozen=True, slots=True)
class Pair:
    """A convolution or linear layer, and a norm that takes its output.

    Args:
        producer: Name of the convolution or linear layer.
        norm: Name of the norm.
        through: Names of the operations in between, all of which only move values.
        exclusive: Whether this norm is the only user of the producer's output.
    """

    producer: str
    norm: str
    through: tuple[str, ...] = ()
    exclusive: bool = True


@dataclass(frozen=True, slots=True)
class Feeds:
    """Which convolutions and linear layers (producers) feed which norms in a model.

    Args:
        pairs: Producers with the norms that take their outputs, in the order of the forward.
        destinations: For the name of each producer, the names of the calls that use its output.
        calls: How often each producer and norm is called in one forward.
        uncalled: Names of the producers and norms that the forward does not call.
        how: What traced the model: ``"torch.fx"`` or ``"the example input"``.
    """

    pairs: tuple[Pair, ...]
    destinations: Mapping[str, tuple[str, ...]]
    calls: Mapping[str, int]
    uncalled: tuple[str, ...]
    how: str


def trace_feeds(model: nn.Module, example_input: Any = None) -> Feeds:
    """Find the norms of a model and the convolutions and linear layers that feed them.

    A layer feeds a norm if its output reaches the norm directly, or through operations that only
    move, cast or drop values (reshape, concatenation, identity, dropout). A module that is shared
    appears under the first of its names.

    Args:
        model: The model; it is not changed.
        example_input: Sent through the model once if ``torch.fx`` cannot trace it.

    Returns:
        The pairs, and where the output of each layer goes.

    Raises:
        TraceError: If neither ``torch.fx`` nor the example input can trace the model.

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
        for user_index, through in graph.destinations(index).items():
            user = graph.calls[user_index]
            goes_to.setdefault(name, {})[user.name] = None
            if user.kind == "norm":
                pairs.setdefault((name, user.name), through)
    calls = Counter(call.name for call in graph.calls if call.kind in ("producer", "norm"))
    layers = (name for name, m in model.named_modules() if is_norm(m) or is_producer(m))
    return Feeds(
        pairs=tuple(Pair(p, n, through, len(goes_to[p]) == 1) for (p, n), through in pairs.items()),
        destinations={name: tuple(users) for name, users in goes_to.items()},
        calls=calls,
        uncalled=tuple(name for name in layers if name not in calls),
        how=graph.how,
    )
