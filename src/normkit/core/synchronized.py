"""Single-partition layers on a batch that several processes have parts of."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from normkit.core.algebra import GroupStatistics, SynchronizedRuns, SynchronizedStatistics
from normkit.core.mask import Valid
from normkit.core.moments import Moments
from normkit.core.normalize import Algebra, measure, normalize
from normkit.core.parameters import Parameters
from normkit.core.partition import Partition, has_single_values, require_counted_variance
from normkit.core.ranks import gather, gather_examples, merge
from normkit.core.routes import batch_route
from normkit.core.running import RunningStatistics, buffers_are_frozen
from normkit.kernels.select import decide
from normkit.typing import FeatureMap


class _Exchanged(NamedTuple):
    """The statistics that the processes have exchanged, and the algebra that uses them.

    Args:
        algebra: Normalises by the exchanged statistics.
        given: The tables that the algebra takes.
        batch: Counted moments ``(1, G)`` that update running statistics; None if there are none.
        groups: Counted statistics of every group.
    """

    algebra: Algebra
    given: tuple[Tensor, ...]
    batch: Moments | None
    groups: Moments


def normalize_part(
    x: FeatureMap,
    partition: Partition,
    running: RunningStatistics | None,
    parameters: Parameters,
    ranks: dist.ProcessGroup,
    valid: Valid | None = None,
) -> FeatureMap:
    """Normalise this process's part of a batch by the statistics of the whole batch.

    The whole batch consists of the parts in the order of the processes; a part may be empty, and
    maps of different parts may have different sizes. Outputs, gradients (of the sum of all
    processes' losses) and buffers are the same as in one process with the whole batch. Either all
    processes have a mask, or none.
    """
    size = partition.segment_size(x.shape)
    table = measure(x, size, valid).counted(size)
    followed = None if running is None else running.partition
    found = _exchange(table, partition, followed, parameters.eps, ranks)
    if has_single_values(x):
        require_counted_variance(partition, x.shape, found.groups, "a norm over several processes")
    given, known = (*parameters[:2], *found.given), (None, table)
    way = decide(x, batch_route(running, True, valid is not None)).way
    y, _ = normalize(x, size, found.algebra, *given, known=known, valid=valid, way=way)
    if running is not None and found.batch is not None and not buffers_are_frozen():
        follow_all_(running, found.batch)
    return y


def follow_all_(running: RunningStatistics, batch: Moments) -> None:
    """Update running statistics with the counted moments ``(1, G)`` of all processes' values."""
    mean, var, count = batch.mean[0], batch.var[0], batch.count
    running.follow_(Moments(mean, var), torch.ones_like(mean) if count is None else count[0])


def _exchange(
    table: Moments,
    partition: Partition,
    followed: Partition | None,
    eps: float,
    ranks: dist.ProcessGroup,
) -> _Exchanged:
    """Exchange the moments that the groups and the running statistics need from all parts."""
    if partition.examples_per_group is None:
        gathered = followed or partition
        rows = gather(gathered.pool(table), ranks)
        whole = SynchronizedStatistics(partition=partition, gathered=gathered, eps=eps, ranks=ranks)
        merged = merge(rows)
        return _Exchanged(whole, (rows,), merged, partition.pool(merged))
    if partition.examples_per_group == 1:
        own = GroupStatistics(partition=partition, eps=eps)
        batch = None if followed is None else merge(gather(followed.pool(table), ranks))
        return _Exchanged(own, (), batch, partition.pool(table))
    examples, place = gather_examples(table, ranks)
    runs = SynchronizedRuns(partition=partition, eps=eps, ranks=ranks, place=place)
    given = tuple(t for t in (examples.mean, examples.var, examples.count) if t is not None)
    batch = None if followed is None else followed.pool(examples)
    return _Exchanged(runs, given, batch, partition.pool(examples))
