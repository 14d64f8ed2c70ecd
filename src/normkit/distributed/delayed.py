"""One layer's running statistics, updated once for several forwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.core.ranks import active_group
from normkit.core.running import RunningStatistics
from normkit.inference.population import Population, Sums
from normkit.inference.tracked import STATISTICS
from normkit.layers.base import BUFFERS, TrackingLayer

Layer = _BatchNorm | TrackingLayer


class CallStatistics(NamedTuple):
    """The statistics of one call of a layer.

    Args:
        mean: Mean of the batch, over all processes that share it.
        var: Unbiased variance of the same batch.
        num_positions: Positions of this process's part of the batch.
    """

    mean: Tensor
    var: Tensor
    num_positions: int


class _Saved(NamedTuple):
    """A layer's own buffers and momentum, while the layer uses copies."""

    buffers: dict[str, Tensor | None]
    momentum: float | None


class DelayedStatistics:
    """A layer's running statistics, which are updated when a batch of several forwards is complete.

    During a forward the layer has copies of its buffers and momentum 1, so that afterwards the
    copies hold the statistics of that call's batch. The layer needs no code for this, and the
    buffers that autograd has saved do not change.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._forward: list[CallStatistics] = []
        """Calls in the present forward of the model."""
        self._calls: list[list[CallStatistics]] = []
        """For the first, second, ... call in a forward, its statistics in each pending forward."""
        self._saved: _Saved | None = None

    def use_copies(self) -> None:
        """Replace the layer's buffers by copies, if this forward updates them."""
        self.restore_buffers()  # An earlier call may have been interrupted.
        layer = self.layer
        if layer.training:
            self._saved = _Saved({n: layer._buffers[n] for n in STATISTICS}, layer.momentum)
            layer._buffers.update(
                {n: None if b is None else b.clone() for n, b in self._saved.buffers.items()}
            )
            layer.momentum = 1.0

    def restore_buffers(self) -> tuple[Tensor, Tensor] | None:
        """Restore the layer's own buffers; return mean and variance of the copies, if any."""
        if self._saved is None:
            return None
        layer, (mean, var) = self.layer, (self.layer.get_buffer(name) for name in BUFFERS)
        layer._buffers.update(self._saved.buffers)
        layer.momentum, self._saved = self._saved.momentum, None
        return mean, var

    def record_call(self, num_positions: int) -> None:
        """Restore the buffers, and record a call whose input has so many (valid) positions."""
        found = self.restore_buffers()
        if found is not None:
            self._forward.append(CallStatistics(*found, num_positions))

    def keep_forward(self) -> bool:
        """Add the present forward's calls to the pending ones; return whether there were any."""
        for index, call in enumerate(self._forward):
            if index == len(self._calls):
                self._calls.append([])
            self._calls[index].append(call)
        return bool(self._forward)

    def discard_forward(self) -> None:
        """Discard the calls of the present forward."""
        self._forward.clear()

    def reset(self) -> None:
        """Restore the buffers, and discard all calls."""
        self.restore_buffers()
        self._forward.clear()
        self._calls.clear()

    def updates(self) -> list[tuple[Tensor, Tensor]]:
        """Compute the buffers after one update for each call in a forward; change nothing.

        Returns:
            Each buffer with its new values.
        """
        buffers = [self.layer.get_buffer(name) for name in STATISTICS]
        mean, var, count = (buffer.clone() for buffer in buffers)
        running = RunningStatistics(mean, var, count, self.layer.momentum, 0.0)
        for calls in self._calls:
            population = Population()
            for sums in _sums(calls, self.layer):
                population.merge(sums)
            if population.count:
                running.follow_(population.moments, population.count)
        return list(zip(buffers, (mean, var, count), strict=True))


def _group_of(layer: Layer) -> dist.ProcessGroup | None:
    """The processes whose batches are one batch for this layer; None for this process alone."""
    if isinstance(layer, TrackingLayer):
        return active_group(layer.process_group)
    if isinstance(layer, nn.SyncBatchNorm):
        return active_group(layer.process_group or "world")
    return None


def _sums(calls: list[CallStatistics], layer: Layer) -> Iterator[Sums]:
    """Turn each call's statistics into sums, with the counts of all processes together."""
    sizes, group = [call.num_positions for call in calls], _group_of(layer)
    if group is not None:
        total = calls[0].mean.new_tensor(sizes, dtype=torch.long)
        dist.all_reduce(total, group=group)
        sizes = total.tolist()
    for call, num_positions in zip(calls, sizes, strict=True):
        number = num_positions * layer.num_features // call.mean.numel()
        yield Sums(number, 1, call.mean.double(), call.var.double() * max(number - 1, 0))
