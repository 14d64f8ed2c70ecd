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

from normkit.core.algebra import GroupStatistics, Rule, WeighedStatistics
from normkit.core.composite import CompositeAlgebra
from normkit.core.moments import Moments
from normkit.core.normalize import differentiable_gradient, plain
from normkit.core.partition import Partition
from normkit.core.running import (
    Running,
    RunningEstimates,
    RunningStatistics,
    are_still,
)
from normkit.kernels import nodes
from normkit.kernels.calls import Batch, BatchSource, Buffers, Composite, Slots
from normkit.kernels.reference import table_dtype
from normkit.typing import FeatureMap


def normalize_fused(  # noqa: PLR0913, PLR0917 - everything that the method mixes
    kernels: nodes.Kernels,
    x: FeatureMap,
    composite: Composite,
    algebra: Callable[[Rule], CompositeAlgebra],
    running: Running | None,
    training: bool,
    parameters: tuple[Tensor | None, ...],
    kernels_move: bool,
) -> FeatureMap:
    """Normalise by one operator; ``running`` follows what the batch stage saw."""
    statistics = _statistics(running, training, kernels_move)
    first, second, third, fourth = (*parameters, None)[:4]
    differentiable = _differentiable(composite, algebra, statistics.batch, len(parameters))
    slots, options = (first, second, third, fourth), (composite, statistics.batch)
    y, table = nodes.normalize_composite(
        kernels, x, slots, options, statistics.buffers, differentiable
    )
    follower = statistics.follower
    if follower is not None:
        size, num_cells = composite.num_batch_channels(x), x.shape[0] * x.shape[1]
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

    batch: Batch
    buffers: Buffers = Buffers()
    follower: Running | None = None  # of what the operator does not do to the buffers


def _statistics(running: Running | None, training: bool, kernels_move: bool) -> _Statistics:
    if running is None or (training and isinstance(running, RunningStatistics) and are_still()):
        return _Statistics(Batch(BatchSource.OWN))
    given = Buffers(running.mean, running.var)
    if not training:
        return _Statistics(Batch(BatchSource.GIVEN, float(running.example_weight)), given)
    moved = Buffers(None, None, running.mean, running.var, running.num_batches_tracked)
    is_traced = torch.compiler.is_compiling()  # a traced node must not change its inputs
    if isinstance(running, RunningEstimates):
        if running.update_rate == 0:  # during checkpoint recomputation, or not tracking
            return _Statistics(Batch(BatchSource.GIVEN), given)
        estimates = Batch(BatchSource.ESTIMATES, running.update_rate)
        return _Statistics(estimates, given if is_traced else moved, running)
    if running.momentum is None or is_traced or not kernels_move:
        return _Statistics(Batch(BatchSource.OWN), follower=running)
    return _Statistics(Batch(BatchSource.OWN, running.momentum), moved)


def _differentiable(
    composite: Composite,
    algebra: Callable[[Rule], CompositeAlgebra],
    batch: Batch,
    num_parameters: int,
) -> Callable[..., list[Tensor | None]]:
    """Gradients that can be differentiated again, of the algebra in plain operators."""

    def gradients(
        grad: Tensor, x: Tensor, table: Tensor, slots: Slots, wanted: tuple[bool, ...]
    ) -> list[Tensor | None]:
        size = composite.num_batch_channels(x)
        kept = table[:, None, table.shape[1] - size :].to(table_dtype(x.dtype))
        rule, given = _kept_rule(batch, composite.batch_eps, kept)
        formula = algebra(rule)

        def call(x: Tensor, *parameters: Tensor | None) -> Tensor:
            used = (*parameters[:num_parameters], *given)
            return plain(x, math.prod(x.shape[2:]), formula, used)[0]

        return differentiable_gradient(call, (x, *slots), wanted, grad)

    return gradients


def _kept_rule(batch: Batch, eps: float, kept: Tensor) -> tuple[Rule, tuple[Tensor, ...]]:
    """The batch stage as it was: its own statistics, or those that it kept ``(2, 1, C)``."""
    if batch.source == BatchSource.OWN:
        return GroupStatistics(partition=Partition(num_groups=kept.shape[2]), eps=eps), ()
    own = Partition(num_groups=kept.shape[2], examples_per_group=1)
    share = batch.rate if batch.source == BatchSource.GIVEN else 0.0
    mean, var = kept
    return WeighedStatistics(partition=own, eps=eps, example_weight=share), (mean, var)
