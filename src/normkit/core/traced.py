r"""What ``torch.compile`` sees of a call on a GPU: one operator, and torch's own beside it.

An operator is closed to the compiler, which would read and write the map once more for each
activation, residual or cast beside it. So only the statistics are one operator, ``moments``: exact,
and one pass over the map. What follows on tables and on the map are torch's operations, which the
compiler fuses with whatever stands beside them, in the backward pass also the sums. For that it
keeps ``x`` and tables: what lies between is cheaper to compute again than to keep.

Tables are float64, maps at least float32. ``y`` is written around a mean that float32 holds; what
is left of the mean is in the table of centers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.core.algebra import per_segment
from normkit.core.moments import Moments
from normkit.core.normalize import Algebra
from normkit.core.parameters import Parameters
from normkit.core.partition import Partition
from normkit.kernels import reference
from normkit.kernels.reference import table_dtype
from normkit.typing import FeatureMap, GroupTable, SegmentTable


def normalize_traced(
    x: FeatureMap, segment_size: int, algebra: Algebra, parameters: tuple[Tensor | None, ...]
) -> tuple[FeatureMap, Moments]:
    """Normalise ``x`` by what ``algebra`` makes of its segments' moments."""
    wide = x.to(table_dtype(x.dtype))
    segments = Partition(num_groups=_num_segments(x, segment_size), examples_per_group=1)
    mean, var = _Statistics.apply(wide, x, segments, segment_size)[:2]
    table = Moments(mean, var)
    scale, center = algebra(table, *parameters)
    return _around(wide, mean, scale, center, segment_size).to(x.dtype), table


def normalize_groups_traced(
    x: FeatureMap, partition: Partition, parameters: Parameters
) -> tuple[FeatureMap, Moments]:
    """Normalise by the statistics of the input's own groups.

    Returns:
        The result in the dtype of ``x``, and the moments of its segments, without a gradient.
    """
    weight, bias, eps = parameters
    size = partition.segment_size(x.shape)
    wide = x.to(table_dtype(x.dtype))
    mean, var, *segments = _Statistics.apply(wide, x, partition, size)
    num_segments = segments[0].shape[1]
    mean, scale = (
        partition.expand(t, x.shape[0], num_segments) for t in (mean, torch.rsqrt(var + eps))
    )
    if weight is not None:
        scale = scale * per_segment(weight, mean)
    center = torch.zeros_like(mean) if bias is None else per_segment(bias, mean)
    return _around(wide, mean, scale, center, size).to(x.dtype), Moments(*segments)


def _num_segments(x: FeatureMap, segment_size: int) -> int:
    num_segments = x.shape[1]
    for size in x.shape[2:]:
        num_segments = num_segments * size
    return num_segments // segment_size


def _around(
    wide: FeatureMap, mean: SegmentTable, scale: SegmentTable, center: SegmentTable, size: int
) -> FeatureMap:
    """``scale * (x - mean) + center`` around the nearest mean that the map's dtype holds."""
    near = mean.detach().to(wide.dtype)
    center = center + (near - mean) * scale
    tables = (_Once.apply(t.to(wide.dtype)) for t in (scale, center))
    return reference.apply(wide, _Once.apply(near), *tables, size)


class _Statistics(torch.autograd.Function):
    """Moments of groups, and of segments without a gradient; the gradient of ``wide`` is pointwise.

    ``wide`` is ``x`` in the dtype of tables, so that a gradient is rounded once.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context has no public type
        wide: Tensor,
        x: Tensor,
        partition: Partition,
        segment_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        segments = torch.ops.normkit.moments.default(x, segment_size, True)
        groups = partition.pool(Moments(*segments))
        ctx.save_for_backward(x, groups.mean)
        ctx.partition, ctx.segment_size = partition, segment_size
        ctx.mark_non_differentiable(*segments)
        return groups.mean, groups.var, *segments

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, mean = ctx.saved_tensors
        partition, size = ctx.partition, ctx.segment_size
        wide = x.to(table_dtype(x.dtype))
        near = mean.to(wide.dtype)
        by_mean, by_var = (_by_value(grad, partition, x) for grad in grads[:2])
        factor = 2 * by_var
        shift = by_mean + factor * (near - mean)
        tables = (
            _Once.apply(partition.expand(t.to(wide.dtype), x.shape[0], _num_segments(x, size)))
            for t in (near, factor, shift)
        )
        return reference.apply(wide, *tables, size), None, None, None


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
    def forward(ctx: Any, table: Tensor) -> Tensor:  # noqa: ANN401
        whole = table.contiguous()
        return whole.as_strided(whole.shape, whole.stride())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ANN401
        return grads[0]
