"""One layer's running statistics while a batch comes in several forwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.core.partition import Partition
from normkit.core.ranks import active_group
from normkit.core.running import RunningStatistics
from normkit.inference.population import Population, Sums
from normkit.inference.tracked import STATISTICS
from normkit.layers.base import BUFFERS, TrackingLayer

Layer = _BatchNorm | TrackingLayer


class Seen(NamedTuple):
    """One call of a layer: its batch's mean and unbiased variance, and this part's positions."""

    mean: Tensor
    var: Tensor
    num_positions: int


class _Before(NamedTuple):
    """What a layer has while a forward writes into something else."""

    buffers: dict[str, Tensor | None]
    momentum: float | None


class Follower:
    """A layer whose statistics wait until the batch is whole.

    In a forward its buffers are copies and its momentum is 1, so that they are the statistics of
    that call's batch afterwards. No layer has to know of it, and backward sees no buffer change.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._now: list[Seen] = []
        self._calls: list[list[Seen]] = []
        self._before: _Before | None = None

    def begin(self) -> None:
        """Put copies in the place of the buffers, if this forward moves them."""
        self.put_back()
        layer = self.layer
        if layer.training:
            self._before = _Before({n: layer._buffers[n] for n in STATISTICS}, layer.momentum)
            layer._buffers.update({n: _copy(b) for n, b in self._before.buffers.items()})
            layer.momentum = 1.0

    def put_back(self) -> tuple[Tensor, Tensor] | None:
        """Give the layer its own buffers back; what the copies have become, if there were any."""
        if self._before is None:
            return None
        layer, (mean, var) = self.layer, (self.layer.get_buffer(name) for name in BUFFERS)
        layer._buffers.update(self._before.buffers)
        layer.momentum, self._before = self._before.momentum, None
        return mean, var

    def end(self, num_positions: int) -> None:
        """Do that, and keep what this call saw of an input with so many (valid) positions."""
        found = self.put_back()
        if found is not None:
            self._now.append(Seen(*found, num_positions))

    def commit(self) -> bool:
        """Keep what the model's forward saw; whether that is anything."""
        for index, seen in enumerate(self._now):
            self._calls += [[]] if index == len(self._calls) else []
            self._calls[index].append(seen)
        return bool(self._now)

    def drop(self) -> None:
        """Forget what the model's forward saw so far."""
        self._now.clear()

    def forget(self) -> None:
        """Forget everything, and give the layer its buffers back."""
        self.put_back()
        self._now.clear()
        self._calls.clear()

    def moved(self) -> list[tuple[Tensor, Tensor]]:
        """Work out where the buffers go by what was seen: once for each of a forward's calls."""
        partition = _partition_of(self.layer)
        buffers = [self.layer.get_buffer(name) for name in STATISTICS]
        mean, var, count = (buffer.clone() for buffer in buffers)
        running = RunningStatistics(mean, var, count, self.layer.momentum, 0.0)
        for several in self._calls:
            population = Population()
            for sums in _sums(several, self.layer, partition):
                population.merge(sums)
            if population.count:
                running.follow_(population.moments, population.count)
        return list(zip(buffers, (mean, var, count), strict=True))


def _copy(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()


def _partition_of(layer: Layer) -> Partition:
    if isinstance(layer, TrackingLayer):
        return layer.running_partition
    return Partition(num_groups=layer.num_features)


def _group_of(layer: Layer) -> dist.ProcessGroup | None:
    """Processes whose batches count as one in this layer."""
    if isinstance(layer, TrackingLayer):
        return active_group(layer.process_group)
    if isinstance(layer, nn.SyncBatchNorm):
        return active_group(layer.process_group or "world")
    return None


def _sums(several: list[Seen], layer: Layer, partition: Partition) -> Iterator[Sums]:
    """Count and moments of each call's batch, of all processes."""
    sizes, group = [seen.num_positions for seen in several], _group_of(layer)
    if group is not None:
        whole = several[0].mean.new_tensor(sizes, dtype=torch.long)
        dist.all_reduce(whole, group=group)
        sizes = whole.tolist()
    for seen, num_positions in zip(several, sizes, strict=True):
        number = num_positions * layer.num_features // partition.num_groups
        yield Sums(number, 1, seen.mean.double(), seen.var.double() * max(number - 1, 0))
