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
    """Buffers that training updates with the statistics of each batch.

    Args:
        mean: Running mean over the whole batch, a value for each channel or each BGN group.
        var: Running unbiased variance, of the same shape.
        num_batches_tracked: Number of updates so far; None counts none.
        momentum: Weight of the new value; None averages all counted batches equally (without a
            count the buffers stay as they are, as in torch).
        example_weight: Share of the example's own statistics at evaluation, from 0 to 1; a tensor
            ``(N, 1)`` has one share per example.
    """

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    momentum: float | None
    example_weight: float | Tensor

    @property
    def partition(self) -> Partition:
        """Which elements of a batch share one value of the buffers."""
        return Partition(num_groups=self.mean.shape[0])

    def update_(self, table: Moments, shape: Sequence[int]) -> None:
        """Update the buffers with a batch of this shape, from its segments' moments ``(N, K)``."""
        if buffers_are_frozen():
            return
        batch = self.partition.pool(table)
        sizes = self.partition.group_sizes(shape)[0] if batch.count is None else batch.count[0]
        self.follow_(Moments(batch.mean[0], batch.var[0]), sizes)

    def follow_(self, batch: Moments, num_values: int | Tensor) -> None:
        r"""Update the buffers with the statistics of one batch, in place, without a gradient.

        .. math::  m \leftarrow (1 - r) m + r \mu, \quad
                   V \leftarrow (1 - r) V + r \frac{n}{n-1} \sigma^2

        Args:
            batch: Moments in the shape of the buffers, biased.
            num_values: Number of values ``n`` in each, as an integer or as a tensor that broadcasts
                to the buffers. Where a tensor is 0, the buffers stay as they are.
        """
        with torch.no_grad():
            if isinstance(num_values, Tensor):
                counted = num_values > 0
                correction = num_values / (num_values - 1).clamp(min=1)
                rate = self._count(counted.any()) * counted.to(self.mean.dtype)
            else:
                correction = num_values / max(num_values - 1, 1)  # one value has variance 0
                rate = self._count(1)
            self.mean.lerp_(batch.mean.to(self.mean.dtype), rate)
            self.var.lerp_((batch.var * correction).to(self.var.dtype), rate)

    def groups(self, partition: Partition, dtype: torch.dtype) -> Moments:
        """Pool the buffers into the groups of ``partition``, ``(1, G)``.

        The result is a copy, because later updates of the buffers must not change what a backward
        pass uses.
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
        # Torch takes the reciprocal of an integer in float32, so it is cast first.
        return self.num_batches_tracked.to(self.mean.dtype).reciprocal()


Recent = deque[tuple[Tensor, Tensor]]
"""The latest batches: each channel's sum of means, which identifies a batch, and the estimates
``(2, C)`` that normalised it. Checkpoint recomputation needs them, because the buffers may have
changed since."""


class RunningEstimates(NamedTuple):
    """Buffers that a forward first updates and then normalises by.

    Algorithm 1 of batch-channel normalization.

    Args:
        mean: Estimated mean, ``(C,)``, 0 at first.
        var: Estimated biased variance, ``(C,)``, 1 at first.
        num_batches_tracked: Number of updates so far; None counts none.
        update_rate: Weight of the new value; at 0 the estimates stay as they are.
        example_weight: Share of the example's own statistics at evaluation, from 0 to 1; a tensor
            ``(N, 1)`` has one share per example.
        recent: The latest batches, for checkpoint recomputation; None keeps none.
    """

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    update_rate: float
    example_weight: float | Tensor
    recent: Recent | None = None

    def used_for_the_batch(self, means: SegmentTable) -> RunningEstimates:
        """The estimates that normalised the batch with these means in its first forward.

        Their update rate is 0, so that recomputation does not update them.

        Raises:
            InputError: If none of the latest batches had these means.
        """
        if self.recent is None:
            return self._replace(update_rate=0.0)
        sums = means.sum(dim=0)
        for seen, moved in reversed(self.recent):
            if _is_same(seen, sums):
                return self._replace(mean=moved[0], var=moved[1], update_rate=0.0)
        raise InputError(
            f"a layer with running estimates was called during a backward pass on an input that "
            f"none of its last {self.recent.maxlen} training forwards has seen; gradient "
            f"checkpointing must recompute the same input (preserve_rng_state=True), or leave the "
            f"layer outside of the checkpoint"
        )

    def remember(self, means: SegmentTable, moved: Tensor) -> None:
        """Store the means ``(N, C)`` of a batch, and the estimates ``(2, C)`` that normalised it.

        The estimates are a row of means and a row of variances. Neither has a gradient.
        """
        if self.recent is None or torch.compiler.is_compiling() or buffers_are_frozen():
            return
        self.recent.append((means.sum(dim=0), moved.clone()))

    def follow_(self, moved: Moments) -> None:
        """Write the estimates ``(1, C)`` that have just normalised a batch into the buffers."""
        if buffers_are_frozen() or self.update_rate == 0:
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
"""Buffers of a layer, and how a training forward updates them."""


def buffers_are_frozen() -> bool:
    """Whether a forward must not update the buffers.

    Neither checkpoint recomputation nor a call inside a ``torch.func`` transform is a new batch.
    """
    return functorch_is_active() or is_recomputing()


def is_recomputing(*, may_be_traced: bool = True) -> bool:
    """Whether a backward pass runs, so that this forward is a checkpoint's recomputation.

    ``may_be_traced`` is False if the caller knows that ``torch.compile`` does not trace the call.
    """
    if may_be_traced and torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1
