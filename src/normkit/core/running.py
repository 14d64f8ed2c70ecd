"""Running statistics: the one place that knows momentum and Bessel's correction."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normkit.core.moments import Moments
from normkit.core.partition import Partition
from normkit.errors import InputError
from normkit.kernels.select import functorch_is_active
from normkit.typing import SegmentTable


class RunningStatistics(NamedTuple):
    """Buffers that follow the statistics of the training batches.

    Args:
        mean: Running mean over the whole batch, a value for each channel or each BGN group.
        var: Running unbiased variance, likewise.
        num_batches_tracked: Counts the updates; None counts nothing.
        momentum: Weight of the new value; None averages all batches counted so far equally (without
            a count nothing moves, as in torch).
        example_weight: Share of the example's own statistics at evaluation, from 0 to 1; a tensor
            ``(N, 1)`` has one for each example.
    """

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    momentum: float | None
    example_weight: float | Tensor

    @property
    def partition(self) -> Partition:
        """Which elements of a batch stand behind one value of the buffers."""
        return Partition(num_groups=self.mean.shape[0])

    def update_(self, table: Moments, shape: Sequence[int]) -> None:
        """Follow the statistics of a batch of this shape, from its segments' ``(N, K)``."""
        if are_still():
            return
        batch = self.partition.pool(table)
        sizes = self.partition.group_sizes(shape)[0] if batch.count is None else batch.count[0]
        self.follow_(Moments(batch.mean[0], batch.var[0]), sizes)

    def follow_(self, batch: Moments, num_values: int | Tensor) -> None:
        r"""Move towards the statistics of one batch, in place and without a gradient.

        .. math::  m \leftarrow (1 - r) m + r \mu, \quad
                   V \leftarrow (1 - r) V + r \frac{n}{n-1} \sigma^2

        Args:
            batch: Moments in the shape of the buffers, biased.
            num_values: How many values ``n`` stand behind each, as a number or as a tensor that
                broadcasts to the buffers. Where a tensor has 0, nothing moves.
        """
        with torch.no_grad():
            if isinstance(num_values, Tensor):
                counted = num_values > 0
                correction = num_values / (num_values - 1).clamp(min=1)
                rate = self._count(counted.any()) * counted.to(self.mean.dtype)
            else:
                correction = num_values / max(num_values - 1, 1)  # one value: its variance, 0
                rate = self._count(1)
            self.mean.lerp_(batch.mean.to(self.mean.dtype), rate)
            self.var.lerp_((batch.var * correction).to(self.var.dtype), rate)

    def groups(self, partition: Partition, dtype: torch.dtype) -> Moments:
        """Pool the buffers into the groups of ``partition``, ``(1, G)``.

        A copy: a backward pass must not see what later updates write into the buffers.
        """
        mean, var = (t.to(dtype, copy=True)[None] for t in (self.mean, self.var))
        if mean.shape[1] == partition.num_groups:
            return Moments(mean, var)
        return Partition(num_groups=partition.num_groups).pool(Moments(mean, var))

    def _count(self, increment: int | Tensor) -> float | Tensor:
        """Count the batch, and return the weight of its statistics."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(increment)
        if self.momentum is not None:
            return self.momentum
        if self.num_batches_tracked is None:
            return 0.0
        # In the dtype of the buffers: torch divides integers in float32.
        return self.num_batches_tracked.to(self.mean.dtype).reciprocal()


Recent = deque[tuple[Tensor, Moments]]
"""The latest batches: the sum of each channel's means, which tells them apart, and the estimates
that normalised them. A checkpoint looks again when the buffers may have moved on."""


class RunningEstimates(NamedTuple):
    """Buffers that are moved first and then normalise: Algorithm 1 of batch-channel normalization.

    Args:
        mean: Estimated mean, ``(C,)``, 0 at first.
        var: Estimated biased variance, ``(C,)``, 1 at first.
        num_batches_tracked: Counts the updates; None counts nothing.
        update_rate: Weight of the new value; at 0 the estimates stand still.
        example_weight: Share of the example's own statistics at evaluation, from 0 to 1; a tensor
            ``(N, 1)`` has one for each example.
        recent: What has been normalised lately; None keeps no account.
    """

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    update_rate: float
    example_weight: float | Tensor
    recent: Recent | None = None

    def as_they_were(self, means: SegmentTable) -> RunningEstimates:
        """The estimates that normalised a batch with these means at its first look, to stay.

        Raises:
            InputError: If none of the latest batches had them.
        """
        if self.recent is None:
            return self._replace(update_rate=0.0)
        sums = means.sum(dim=0)
        for seen, moved in reversed(self.recent):
            if _is_same(seen, sums):
                return self._replace(mean=moved.mean, var=moved.var, update_rate=0.0)
        raise InputError(
            f"a layer with moving estimates was called during a backward pass on an input that "
            f"none of its last {self.recent.maxlen} training forwards has seen; what a checkpoint "
            f"computes again must be the same (preserve_rng_state=True), or leave the layer outside"
        )

    def remember(self, means: SegmentTable, moved: Moments) -> None:
        """Keep account of a batch's means ``(N, C)`` and of the estimates that normalised it."""
        if self.recent is None or are_still() or torch.compiler.is_compiling():
            return
        mean, var = (t.detach().flatten().clone() for t in (moved.mean, moved.var))
        self.recent.append((means.detach().sum(dim=0), Moments(mean, var)))

    def follow_(self, moved: Moments) -> None:
        """Keep the estimates ``(1, C)`` that have just normalised a batch."""
        if are_still() or self.update_rate == 0:
            return
        with torch.no_grad():
            self.mean.copy_(moved.mean[0])
            self.var.copy_(moved.var[0])
            if self.num_batches_tracked is not None:
                counted = 1 if moved.count is None else (moved.count > 0).any()
                self.num_batches_tracked.add_(counted)


def _is_same(seen: Tensor, sums: Tensor) -> bool:
    """Whether two batches have the same sums; NaN is equal to NaN here."""
    if seen.shape != sums.shape or seen.dtype != sums.dtype or seen.device != sums.device:
        return False
    return torch.allclose(seen, sums, rtol=0, atol=0, equal_nan=True)


Running = RunningStatistics | RunningEstimates
"""Buffers of a layer, and how they move."""


def are_still() -> bool:
    """Whether a forward must leave the buffers alone.

    A checkpoint's second look is no new batch, nor are the inputs inside a ``torch.func``
    transform.
    """
    return functorch_is_active() or is_second_look()


def is_second_look() -> bool:
    """Whether a backward pass runs: a forward is then a checkpoint's, of the same step again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
