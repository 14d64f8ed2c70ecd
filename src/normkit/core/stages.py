"""Composite norms, start to end: choose the batch stage's statistics, normalise, follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from normkit.core.algebra import (
    EstimatedStatistics,
    GroupStatistics,
    Rule,
    WeighedStatistics,
)
from normkit.core.composite import (
    BatchThenGroup,
    GroupAndBatch,
    InstanceBesideBatch,
    Order,
    SwitchedStatistics,
)
from normkit.core.moments import Moments
from normkit.core.normalize import normalize
from normkit.core.parameters import Parameters
from normkit.core.partition import Partition
from normkit.core.running import Running, RunningEstimates, RunningStatistics
from normkit.kernels.reference import table_dtype
from normkit.typing import FeatureMap


class BatchStage(NamedTuple):
    """Where a channel's statistics over the batch come from, and the tables it needs for that."""

    rule: Rule
    given: tuple[Tensor, ...]


def batch_stage(
    x: FeatureMap, num_channels: int, running: Running | None, training: bool, eps: float
) -> BatchStage:
    """The input's own statistics or moving estimates in training, afterwards the running ones."""
    partition = Partition(num_groups=num_channels)
    if running is None or (training and isinstance(running, RunningStatistics)):
        return BatchStage(GroupStatistics(partition=partition, eps=eps), ())
    given = tables(x, running.mean, running.var)
    if training and isinstance(running, RunningEstimates):
        rate = running.rate_now()
        return BatchStage(
            EstimatedStatistics(partition=partition, eps=eps, update_rate=rate), given
        )
    own = Partition(num_groups=num_channels, examples_per_group=1)
    weight = running.example_weight
    return BatchStage(WeighedStatistics(partition=own, eps=eps, example_weight=weight), given)


def follow_(
    running: Running | None, stage: BatchStage, table: Moments, shape: Sequence[int]
) -> None:
    """Keep what a training batch of this shape has taught; ``table`` is what the stage saw."""
    if isinstance(running, RunningEstimates):
        running.follow_(stage.rule.groups(table, *stage.given))
    elif running is not None:
        running.update_(table, shape)


def tables(x: FeatureMap, *values: Tensor) -> tuple[Tensor, ...]:
    """Buffers ``(C,)`` as rows ``(1, C)``: copies, since backward must not see later updates."""
    return tuple(value.to(table_dtype(x.dtype), copy=True)[None] for value in values)


def normalize_estimated(
    x: FeatureMap, running: Running | None, training: bool, parameters: Parameters
) -> FeatureMap:
    """A batch stage alone."""
    weight, bias, eps = parameters
    stage = batch_stage(x, x.shape[1], running, training, eps)
    y, table = normalize(x, positions(x), stage.rule, weight, bias, *stage.given)
    if training:
        follow_(running, stage, table, x.shape)
    return y


def normalize_batch_then_group(
    x: FeatureMap,
    num_groups: int,
    running: Running | None,
    training: bool,
    batch: Parameters,
    group: Parameters,
) -> FeatureMap:
    """A group norm of the batch stage's output; ``running`` follows ``x``."""
    stage = batch_stage(x, x.shape[1], running, training, batch.eps)
    algebra = BatchThenGroup(batch=stage.rule, group=own_groups(num_groups, group.eps))
    affine = (*batch[:2], *group[:2])
    y, table = normalize(x, positions(x), algebra, *affine, *stage.given)
    if training:
        follow_(running, stage, table, x.shape)
    return y


def normalize_group_and_batch(  # noqa: PLR0913, PLR0917 - everything that the method mixes
    x: FeatureMap,
    num_groups: int,
    order: Order,
    running: Running | None,
    training: bool,
    parameters: Parameters,
    mix_logit: Tensor,
) -> FeatureMap:
    """Group norm and batch norm, mixed; ``running`` follows what the batch norm sees."""
    weight, bias, eps = parameters
    stage = batch_stage(x, x.shape[1], running, training, eps)
    group = own_groups(num_groups, eps)
    algebra = GroupAndBatch(group=group, batch=stage.rule, order=order)
    y, table = normalize(x, positions(x), algebra, weight, bias, mix_logit, *stage.given)
    if training and running is not None:
        follow_(running, stage, algebra.batch_input(table), x.shape)
    return y


def normalize_switched(
    x: FeatureMap,
    running: Running | None,
    training: bool,
    parameters: Parameters,
    mean_logits: Tensor,
    var_logits: Tensor,
) -> FeatureMap:
    """Statistics of instance, layer and, with three logits, batch norm, mixed."""
    weight, bias, eps = parameters
    stage = batch_stage(x, x.shape[1], running, training, eps)
    rule, given = stage if mean_logits.numel() == 3 else (None, ())
    algebra = SwitchedStatistics(layer=own_groups(1, eps), batch=rule, eps=eps)
    y, table = normalize(x, positions(x), algebra, weight, bias, mean_logits, var_logits, *given)
    if training:
        follow_(running, stage, table, x.shape)
    return y


def normalize_halves(
    x: FeatureMap,
    num_instance: int,
    running: Running | None,
    training: bool,
    instance: Parameters,
    batch: Parameters,
) -> FeatureMap:
    """Instance norm on the first channels, batch norm on the others, which ``running`` follows."""
    num_batch = x.shape[1] - num_instance
    stage = batch_stage(x, num_batch, running, training, batch.eps)
    rule = own_groups(num_instance, instance.eps)
    algebra = InstanceBesideBatch(instance=rule, batch=stage.rule)
    affine = (*instance[:2], *batch[:2])
    y, table = normalize(x, positions(x), algebra, *affine, *stage.given)
    if training:
        follow_(running, stage, algebra.split(table)[1], (x.shape[0], num_batch, *x.shape[2:]))
    return y


def own_groups(num_groups: int, eps: float) -> GroupStatistics:
    """Statistics of runs of each example's channels."""
    return GroupStatistics(
        partition=Partition(num_groups=num_groups, examples_per_group=1), eps=eps
    )


def positions(x: FeatureMap) -> int:
    """Elements of a channel's plane: a segment of every composite."""
    return math.prod(x.shape[2:])
