r"""What ``torch.compile`` sees of a call on a GPU: one operator, and torch's own beside it.

An operator is closed to the compiler, which would read and write the map once more for each
activation, residual or cast beside it. So only the statistics are one operator, ``moments``: exact,
and one pass over the map. What follows on tables and on the map are torch's operations, which the
compiler fuses with whatever stands beside them, in the backward pass also the sums. For that it
keeps ``x`` and tables.

Tables are float64, maps at least float32. ``y`` is written around a mean that float32 holds; what
is left of the mean is in the table of centers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from normkit.core.moments import Moments
from normkit.core.partition import Partition
from normkit.kernels import reference
from normkit.kernels.reference import table_dtype
from normkit.typing import FeatureMap, GroupTable, SegmentTable

Tables = tuple[SegmentTable, SegmentTable, SegmentTable]
"""Mean, scale and center of each segment, of every example or of all."""


def normalize_traced(
    x: FeatureMap,
    partition: Partition,
    algebra: Callable[[Moments], Tables],
) -> tuple[FeatureMap, Moments]:
    """Normalise by what ``algebra`` makes of the statistics of the input's own groups.

    Returns:
        The result in the dtype of ``x``, and the moments of its segments, without a gradient.
    """
    wide = x.to(table_dtype(x.dtype))
    narrow = None if wide.dtype == x.dtype else x  # a tensor twice is more than Dynamo traces
    mean, var, *segments = _Statistics.apply(wide, narrow, partition)
    segment_size = partition.segment_size(x.shape)
    mean, scale, center = algebra(Moments(mean, var))
    near = mean.detach().to(wide.dtype)
    center = center + (near - mean) * scale
    near, scale, center = (
        _spread(_Once.apply(t.to(wide.dtype)), x, segment_size) for t in (near, scale, center)
    )
    rows = not_kept(torch.sub, reference.segments(wide, segment_size), near)
    return (rows * scale + center).reshape(x.shape).to(x.dtype), Moments(*segments)


def not_kept(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """``function(*inputs)``, which the compiler computes again in the backward pass.

    Left to itself it keeps what is as large as the map, next to ``x``, where graphs are long.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _spread(table: SegmentTable, x: FeatureMap, segment_size: int) -> Tensor:
    """A table as it broadcasts to ``reference.segments`` of ``x``."""
    num_segments = math.prod(x.shape[2:]) // segment_size
    return table.reshape(table.shape[0], x.shape[1], num_segments, 1)


class _Statistics(torch.autograd.Function):
    """Moments of groups, and of segments without a gradient; the gradient of ``wide`` is pointwise.

    ``wide`` is the map in the dtype of tables, so that a gradient is rounded once; ``narrow`` is
    what lies in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        wide: Tensor,
        narrow: Tensor | None,
        partition: Partition,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = wide if narrow is None else narrow
        segment_size = partition.segment_size(x.shape)  # an argument would be a constant
        segments = torch.ops.normkit.moments.default(x, segment_size, True)
        groups = partition.pool(Moments(*segments))
        ctx.save_for_backward(x, groups.mean)
        ctx.partition, ctx.num_segments = partition, segments[0].shape[1]
        ctx.mark_non_differentiable(*segments)
        return groups.mean, groups.var, *segments

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean = ctx.saved_tensors
        partition = ctx.partition
        wide = x.to(table_dtype(x.dtype))
        near = mean.to(wide.dtype)
        by_mean, by_var = (_by_value(grad, partition, x) for grad in grads[:2])
        factor = 2 * by_var
        shift = by_mean + factor * (near - mean)
        near, factor, shift = (
            partition.expand(_Once.apply(t.to(wide.dtype)), x.shape[0], ctx.num_segments)
            for t in (near, factor, shift)
        )
        size = partition.segment_size(x.shape)
        return reference.apply(wide, near, factor, shift, size), None, None


def _by_value(grad: GroupTable, partition: Partition, x: FeatureMap) -> GroupTable:
    """A gradient of groups ``(B, G)``, shared among the values of each."""
    full, last = partition.group_sizes(x.shape)
    if partition.examples_per_group in (None, 1) or full == last:
        return grad / full
    return torch.cat((grad[:-1] / full, grad[-1:] / last))


class _Once(torch.autograd.Function):
    """A table as it is, computed before the map is: inductor would compute it for every element.

    That is how it treats pointwise operations; a tensor that is viewed by strides must exist.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        whole = table.contiguous()
        return whole.as_strided(whole.shape, whole.stride())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
