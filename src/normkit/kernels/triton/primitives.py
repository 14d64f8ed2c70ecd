"""The four primitives of ``reference`` by Triton kernels, in the same words."""

from __future__ import annotations

import torch

from normkit.kernels.triton import passes
from normkit.kernels.triton.geometry import Grouping, Layout, Map, result_like
from normkit.kernels.triton.passes import Table
from normkit.typing import FeatureMap, SegmentTable


def moments(x: FeatureMap, segment_size: int) -> tuple[SegmentTable, SegmentTable]:
    """Mean and biased variance of every segment, in float64: an offset then costs no digits."""
    source = Map.of(x)
    layout = Layout.of(Grouping.of_segments(x, segment_size), source)
    parts = passes.measure(source, layout)
    if parts.stream.splits == 1:
        return parts.first, parts.second
    mean, var = x.new_empty((2, *_table_shape(layout)), dtype=torch.float64)
    passes.pool_rows(parts, layout, 1, (mean, var))
    return mean, var


def apply(
    x: FeatureMap, mean: SegmentTable, scale: SegmentTable, center: SegmentTable, segment_size: int
) -> FeatureMap:
    """``scale * (x - mean) + center``, segment by segment, in the dtype and layout of ``x``."""
    y = result_like(x)
    maps = Map.of(x), Map.of(y)
    layout = Layout.of(Grouping.of_segments(x, segment_size), *maps)
    passes.apply_segments(*maps, layout, (Table.of(mean), Table.of(scale), Table.of(center)))
    return y


def reduce_grad(
    grad: FeatureMap, x: FeatureMap, mean: SegmentTable, segment_size: int
) -> tuple[SegmentTable, SegmentTable]:
    """``sum(grad)`` and ``sum(grad * (x - mean))`` of every segment."""
    maps = Map.of(grad), Map.of(x)
    layout = Layout.of(Grouping.of_segments(x, segment_size), *maps)
    parts = passes.reduce(*maps, layout, Table.of(mean))
    return passes.sum_rows(parts.first, parts.second, parts.stream.splits)


def combine_grad(
    grad: FeatureMap,
    x: FeatureMap,
    mean: SegmentTable,
    factors: tuple[SegmentTable, SegmentTable, SegmentTable],
    segment_size: int,
) -> FeatureMap:
    """``k1 * grad + k2 * (x - mean) + k3`` with ``factors = (k1, k2, k3)``."""
    dx = result_like(x)
    maps = Map.of(grad), Map.of(x), Map.of(dx)
    layout = Layout.of(Grouping.of_segments(x, segment_size), *maps)
    first, second, third = (Table.of(factor) for factor in factors)
    passes.combine_segments(maps, layout, Table.of(mean), (first, second, third))
    return dx


def _table_shape(layout: Layout) -> tuple[int, int]:
    return layout.grouping.N, layout.grouping.K
