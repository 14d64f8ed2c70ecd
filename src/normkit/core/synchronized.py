"""Single-partition layers on a batch that several processes have parts of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from normkit.core.algebra import GroupStatistics, SynchronizedRuns, SynchronizedStatistics
from normkit.core.moments import Moments
from normkit.core.normalize import Algebra, measure, normalize
from normkit.core.parameters import Parameters
from normkit.core.partition import Partition, has_single_values, require_variance
from normkit.core.ranks import count_of, gather, gather_examples, merge
from normkit.core.running import RunningStatistics, are_still
from normkit.typing import FeatureMap


class _Exchanged(NamedTuple):
    """What the processes have told each other of a batch.

    Args:
        algebra: What normalises by it.
        given: The tables that the algebra needs.
        batch: What running statistics follow, ``(1, G)``; None if there are none.
        num_examples: Of all processes, ``()``.
    """

    algebra: Algebra
    given: tuple[Tensor, ...]
    batch: Moments | None
    num_examples: Tensor


def normalize_part(
    x: FeatureMap,
    partition: Partition,
    running: RunningStatistics | None,
    parameters: Parameters,
    ranks: dist.ProcessGroup,
) -> FeatureMap:
    """Normalise this process's part of a batch by the statistics of the whole of it.

    The whole batch is the parts in the order of the processes; any of them may be empty. Outputs,
    gradients (of the sum of all processes' losses) and buffers are those of one process that has
    the whole batch.
    """
    size = partition.segment_size(x.shape)
    table = measure(x, size)
    followed = None if running is None else running.partition
    found = _exchange(table, partition, followed, parameters.eps, ranks)
    if has_single_values(x):
        shape = (int(found.num_examples), *x.shape[1:])
        require_variance(partition, shape, "a norm over several processes")
    weight, bias, _ = parameters
    y, _ = normalize(x, size, found.algebra, weight, bias, *found.given, known=(None, table))
    if running is not None and found.batch is not None and not are_still():
        follow_all_(running, found.batch, found.num_examples, x.shape)
    return y


def follow_all_(
    running: RunningStatistics, batch: Moments, num_examples: Tensor, shape: Sequence[int]
) -> None:
    """Let running statistics follow a batch of so many examples, of the shape of this part's."""
    per_example, _ = running.partition.group_sizes((1, *shape[1:]))
    running.follow_(Moments(batch.mean[0], batch.var[0]), num_examples * per_example)


def _exchange(
    table: Moments,
    partition: Partition,
    followed: Partition | None,
    eps: float,
    ranks: dist.ProcessGroup,
) -> _Exchanged:
    """Exchange what the groups, and the running statistics, need to know of all parts."""
    if partition.examples_per_group is None:
        gathered = followed or partition
        rows = _gather(table, gathered, ranks)
        whole = SynchronizedStatistics(partition=partition, gathered=gathered, eps=eps, ranks=ranks)
        return _Exchanged(whole, (rows,), merge(rows), count_of(rows))
    if partition.examples_per_group == 1:
        own = GroupStatistics(partition=partition, eps=eps)
        if followed is None:
            return _Exchanged(own, (), None, table.mean.new_tensor(table.mean.shape[0]))
        rows = _gather(table, followed, ranks)
        return _Exchanged(own, (), merge(rows), count_of(rows))
    examples, place = gather_examples(table, ranks)
    runs = SynchronizedRuns(partition=partition, eps=eps, ranks=ranks, place=place)
    number = examples.mean.shape[0]
    batch = followed.pool(examples) if followed is not None and number else None
    return _Exchanged(runs, (examples.mean, examples.var), batch, examples.mean.new_tensor(number))


def _gather(table: Moments, partition: Partition, ranks: dist.ProcessGroup) -> Tensor:
    return gather(partition.pool(table), table.mean.shape[0], ranks)
