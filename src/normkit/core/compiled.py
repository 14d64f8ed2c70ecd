r"""A call on a GPU under ``torch.compile``: one operator for the statistics, torch's for the rest.

The compiler cannot fuse into an operator: it would read and write the map once more for each
activation, residual or cast beside the norm. So only the statistics are an operator, ``moments``,
which is exact and one pass over the map. The rest are torch's operations on tables and on the map,
which the compiler fuses with their neighbours; in backward it fuses the sums as well. It keeps
``x`` and tables for backward.

Tables are float64, maps at least float32. ``y`` is written around the mean rounded to float32; the
rounding error is added to the table of centers.
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
"""Mean, scale and center of each segment, with one row per example or one row for all."""


def normalize_compiled(
    x: FeatureMap,
    partition: Partition,
    algebra: Callable[[Moments], Tables],
) -> tuple[FeatureMap, Moments]:
    """Normalise by the tables that ``algebra`` computes from the statistics of the input's groups.

    Returns:
        The result in the dtype of ``x``, and the moments of its segments, without a gradient.
    """
    wide = x.to(table_dtype(x.dtype))
    narrow = None if wide.dtype == x.dtype else x  # Dynamo cannot trace one tensor passed twice
    mean, var, *segments = _Statistics.apply(wide, narrow, partition)
    segment_size = partition.segment_size(x.shape)
    mean, scale, center = algebra(Moments(mean, var))
    near = mean.detach().to(wide.dtype)
    center = center + (near - mean) * scale
    near, scale, center = (
        _spread(_Materialized.apply(t.to(wide.dtype)), x, segment_size)
        for t in (near, scale, center)
    )
    rows = recomputed_in_backward(torch.sub, reference.segments(wide, segment_size), near)
    return (rows * scale + center).reshape(x.shape).to(x.dtype), Moments(*segments)


def recomputed_in_backward(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """Return ``function(*inputs)``, which the compiler must recompute in the backward pass.

    In long graphs the compiler would otherwise keep a second map beside ``x``.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _spread(table: SegmentTable, x: FeatureMap, segment_size: int) -> Tensor:
    """Reshape a table so that it broadcasts to ``reference.segments`` of ``x``."""
    num_segments = math.prod(x.shape[2:]) // segment_size
    return table.reshape(table.shape[0], x.shape[1], num_segments, 1)


class _Statistics(torch.autograd.Function):
    """Moments of groups, and of segments without a gradient; the gradient of ``wide`` is pointwise.

    ``wide`` is the map cast to at least float32, so that its gradient is rounded once. ``narrow``
    is the map itself, which the operator reads.
    """

    @staticmethod
    def forward(
        ctx: Any,
        wide: Tensor,
        narrow: Tensor | None,
        partition: Partition,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = wide if narrow is None else narrow
        # Not an argument of forward: Dynamo would make it a constant of the graph.
        segment_size = partition.segment_size(x.shape)
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
            partition.expand(_Materialized.apply(t.to(wide.dtype)), x.shape[0], ctx.num_segments)
            for t in (near, factor, shift)
        )
        size = partition.segment_size(x.shape)
        return reference.apply(wide, near, factor, shift, size), None, None


def _by_value(grad: GroupTable, partition: Partition, x: FeatureMap) -> GroupTable:
    """Divide a gradient of groups ``(B, G)`` by the number of values in each group."""
    full, last = partition.group_sizes(x.shape)
    if partition.examples_per_group in (None, 1) or full == last:
        return grad / full
    return torch.cat((grad[:-1] / full, grad[-1:] / last))


class _Materialized(torch.autograd.Function):
    """The identity, which makes inductor compute a table before it computes the map.

    Inductor would otherwise fuse the table's pointwise operations into the map's and repeat them
    for every element. A tensor that is viewed by strides must exist in memory.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        whole = table.contiguous()
        return whole.as_strided(whole.shape, whole.stride())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
