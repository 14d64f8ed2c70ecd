"""The short way for composite norms: moments, the algebra on tables and apply in one operator.

What it computes is ``normalize`` with an algebra of ``composite``, whose dozens of operations on
tiny tables cost more than the passes over a small map; second derivatives are taken of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from normkit.core.composite import Composite
from normkit.core.moments import Moments
from normkit.core.normalize import differentiable_gradient, plain
from normkit.core.running import (
    Running,
    RunningEstimates,
    RunningStatistics,
    are_still,
)
from normkit.core.trace import Source, batch_rule, followed
from normkit.kernels import nodes
from normkit.kernels.calls import Buffers, Slots
from normkit.kernels.reference import table_dtype
from normkit.typing import FeatureMap


def normalize_fused(  # noqa: PLR0913, PLR0917 - everything that the method mixes
    kernels: nodes.Kernels,
    x: FeatureMap,
    composite: Composite,
    running: Running | None,
    training: bool,
    parameters: tuple[Tensor | None, ...],
    kernels_move: bool,
) -> FeatureMap:
    """Normalise by one operator; ``running`` follows what the batch stage saw."""
    statistics = _statistics(running, training, kernels_move)
    source, share, buffers, follower = statistics
    first, second, third, fourth = (*parameters, None)[:4]
    sizes = tuple([None if p is None else p.numel() for p in parameters])
    programs = followed(composite, x.shape[1], sizes, source)
    differentiable = _differentiable(composite, source, share, len(parameters))
    slots = first, second, third, fourth
    y, table = nodes.normalize_composite(
        kernels, x, slots, (programs, share), buffers, differentiable
    )
    if follower is not None:
        size, num_cells = programs.kept_columns, x.shape[0] * x.shape[1]
        batch = Moments(table[:1, -size:], table[1:, -size:])
        if isinstance(follower, RunningStatistics):
            num_values = x.shape[0] * math.prod(x.shape[2:])
            follower.follow_(Moments(batch.mean[0], batch.var[0]), num_values)
        else:
            follower.remember(table[0, :num_cells].view(x.shape[0], -1), batch)
            if torch.compiler.is_compiling():
                follower.follow_(batch)
    return y


class _Statistics(NamedTuple):
    """Where the batch stage's statistics come from, and what follows them."""

    source: Source
    share: float = 0.0  # of what the input says, in what is moved or mixed
    buffers: Buffers = Buffers()
    follower: Running | None = None  # of what the operator does not do to the buffers


def _statistics(running: Running | None, training: bool, kernels_move: bool) -> _Statistics:
    if running is None or (training and isinstance(running, RunningStatistics) and are_still()):
        return _Statistics("own")
    given = Buffers(running.mean, running.var)
    if not training:
        return _given(float(running.example_weight), given)
    moved = Buffers(None, None, running.mean, running.var, running.num_batches_tracked)
    is_traced = torch.compiler.is_compiling()  # a traced node must not change its inputs
    if isinstance(running, RunningEstimates):
        if running.update_rate == 0:  # during checkpoint recomputation, or not tracking
            return _Statistics("given", buffers=given)
        buffers = given if is_traced else moved
        return _Statistics("estimates", running.update_rate, buffers, running)
    if running.momentum is None or is_traced or not kernels_move:
        return _Statistics("own", follower=running)
    return _Statistics("own", running.momentum, moved)


def _given(example_weight: float, given: Buffers) -> _Statistics:
    if example_weight in (0.0, 1.0):
        return _Statistics("given" if example_weight == 0 else "example", buffers=given)
    return _Statistics("mixed", example_weight, given)


def _differentiable(
    composite: Composite, source: Source, share: float, num_parameters: int
) -> Callable[..., list[Tensor | None]]:
    """Gradients that can be differentiated again, of the algebra in plain operators."""

    def gradients(
        grad: Tensor, x: Tensor, table: Tensor, slots: Slots, wanted: tuple[bool, ...]
    ) -> list[Tensor | None]:
        size = composite.num_batch_channels(x.shape[1])
        kept = table[:, None, table.shape[1] - size :].to(table_dtype(x.dtype))
        given = () if source == "own" else (kept[0], kept[1])
        rule = batch_rule("given" if source == "estimates" else source, composite, size, share)
        formula = composite.algebra(rule)

        def call(x: Tensor, *parameters: Tensor | None) -> Tensor:
            used = (*parameters[:num_parameters], *given)
            return plain(x, math.prod(x.shape[2:]), formula, used)[0]

        return differentiable_gradient(call, (x, *slots), wanted, grad)

    return gradients
