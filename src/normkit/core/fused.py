"""The short way for composite norms: moments, the algebra on tables and apply in one operator.

What it computes is ``normalize`` with an algebra of ``composite``, whose dozens of operations on
tiny tables cost more than the passes over a small map; second derivatives are taken of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from normkit.core.algebra import GroupStatistics, Rule, WeighedStatistics
from normkit.core.composite import CompositeAlgebra, Order
from normkit.core.moments import Moments
from normkit.core.normalize import differentiable_gradient, plain
from normkit.core.partition import Partition
from normkit.core.running import Recent, Running, RunningEstimates, RunningStatistics, are_still
from normkit.kernels import cpu
from normkit.kernels.cpu import BatchSource, Buffers, Composite, Kind
from normkit.kernels.reference import table_dtype
from normkit.kernels.select import takes_cpu
from normkit.typing import FeatureMap

FusedKind = Order | Literal["batch-then-group", "switched", "switched-without-batch", "halves"]

_KINDS: dict[FusedKind, Kind] = {
    "batch-then-group": Kind.BATCH_THEN_GROUP,
    "group-first": Kind.GROUP_FIRST,
    "batch-first": Kind.BATCH_FIRST,
    "parallel": Kind.PARALLEL,
    "switched": Kind.SWITCHED,
    "switched-without-batch": Kind.SWITCHED_WITHOUT_BATCH,
    "halves": Kind.HALVES,
}


class Plan(NamedTuple):
    """Which composite, apart from where its batch stage takes its statistics.

    Args:
        kind: How the norms are put together.
        num_groups: Groups of the group norm; of halves, the instance norm's channels.
        batch_eps: Added to the batch stage's variances.
        group_eps: Added to the other norm's.
    """

    kind: FusedKind
    num_groups: int
    batch_eps: float
    group_eps: float

    def num_batch_channels(self, x: FeatureMap) -> int:
        """Channels that the batch stage sees."""
        return x.shape[1] - self.num_groups if self.kind == "halves" else x.shape[1]


def can_fuse(x: FeatureMap, running: Running | None) -> bool:
    """Whether the operator computes a call on ``x`` and can move its estimates in place."""
    if torch.compiler.is_compiling() or not takes_cpu(x):
        return False
    return not isinstance(running, RunningEstimates) or _is_movable(running)


def normalize_fused(
    x: FeatureMap,
    plan: Plan,
    algebra: Callable[[Rule], CompositeAlgebra],
    running: Running | None,
    training: bool,
    parameters: tuple[Tensor | None, ...],
) -> FeatureMap:
    """Normalise by one operator; ``running`` follows what the batch stage saw."""
    statistics = _statistics(running, training)
    composite = Composite(_KINDS[plan.kind], *plan[1:], statistics.source, statistics.rate)
    first, second, third, fourth = (*parameters, None)[:4]
    differentiable = _differentiable(plan, algebra, statistics, len(parameters))
    y, table = cpu.normalize_composite(
        x, (first, second, third, fourth), composite, statistics.buffers, differentiable
    )
    if statistics.recent is not None:
        statistics.recent.append(table)
    if statistics.follower is not None:
        size = plan.num_batch_channels(x)
        batch = Moments(table[0, -size:], table[1, -size:])
        statistics.follower.follow_(batch, (x.shape[0], size, *x.shape[2:]))
    return y


class _Statistics(NamedTuple):
    """Where the batch stage's statistics come from, and what follows them."""

    source: BatchSource
    rate: float = 0.0
    buffers: Buffers = Buffers()
    follower: RunningStatistics | None = None  # where the operator cannot move the buffers
    recent: Recent | None = None  # keeps account of moved estimates


def _statistics(running: Running | None, training: bool) -> _Statistics:
    if running is None or (training and isinstance(running, RunningStatistics) and are_still()):
        return _Statistics(BatchSource.OWN)
    if not training:
        return _Statistics(
            BatchSource.GIVEN, running.example_weight, Buffers(running.mean, running.var)
        )
    moved = Buffers(None, None, running.mean, running.var, running.num_batches_tracked)
    if isinstance(running, RunningEstimates):
        if running.update_rate == 0:  # a checkpoint's second look
            return _Statistics(BatchSource.GIVEN, 0.0, Buffers(running.mean, running.var))
        rate, recent = running.update_rate, running.recent
        return _Statistics(BatchSource.ESTIMATES, rate, moved, recent=recent)
    if running.momentum is None or not _is_movable(running):
        return _Statistics(BatchSource.OWN, follower=running)
    return _Statistics(BatchSource.OWN, running.momentum, moved)


def _is_movable(running: Running) -> bool:
    mean, var = running.mean, running.var
    wide = (torch.float32, torch.float64)
    return mean.dtype in wide and var.dtype in wide and mean.is_contiguous() and var.is_contiguous()


def _differentiable(
    plan: Plan,
    algebra: Callable[[Rule], CompositeAlgebra],
    statistics: _Statistics,
    num_parameters: int,
) -> Callable[..., list[Tensor | None]]:
    """Gradients that can be differentiated again, of the algebra in plain operators."""

    def gradients(
        grad: Tensor, x: Tensor, table: Tensor, slots: cpu.Slots, wanted: tuple[bool, ...]
    ) -> list[Tensor | None]:
        size = plan.num_batch_channels(x)
        kept = table[:, None, -size:].to(table_dtype(x.dtype))
        rule, given = _kept_rule(statistics, plan.batch_eps, kept)
        formula = algebra(rule)

        def call(x: Tensor, *parameters: Tensor | None) -> Tensor:
            used = (*parameters[:num_parameters], *given)
            return plain(x, math.prod(x.shape[2:]), formula, used)[0]

        return differentiable_gradient(call, (x, *slots), wanted, grad)

    return gradients


def _kept_rule(
    statistics: _Statistics, eps: float, kept: Tensor
) -> tuple[Rule, tuple[Tensor, ...]]:
    """The batch stage as it was: its own statistics, or those that it kept ``(2, 1, C)``."""
    if statistics.source == BatchSource.OWN:
        return GroupStatistics(partition=Partition(num_groups=kept.shape[2]), eps=eps), ()
    own = Partition(num_groups=kept.shape[2], examples_per_group=1)
    share = statistics.rate if statistics.source == BatchSource.GIVEN else 0.0
    mean, var = kept
    return WeighedStatistics(partition=own, eps=eps, example_weight=share), (mean, var)
