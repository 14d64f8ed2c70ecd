"""The four primitives of ``reference``, computed by Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.kernels.triton import passes
from normkit.kernels.triton.geometry import Grouping, Layout, Map, result_like
from normkit.kernels.triton.passes import Table
from normkit.kernels.triton.plan import planned
from normkit.typing import FeatureMap, SegmentTable


def moments(x: FeatureMap, segment_size: int) -> tuple[SegmentTable, SegmentTable]:
    """Mean and biased variance of every segment, in float64, so that an offset costs no digits."""
    return planned(_moments, (x,), (segment_size,))


def apply(
    x: FeatureMap, mean: SegmentTable, scale: SegmentTable, center: SegmentTable, segment_size: int
) -> FeatureMap:
    """``scale * (x - mean) + center``, segment by segment, in the dtype and layout of ``x``."""
    return planned(_apply, (x, mean, scale, center), (segment_size,))


def reduce_grad(
    grad: FeatureMap, x: FeatureMap, mean: SegmentTable, segment_size: int
) -> tuple[SegmentTable, SegmentTable]:
    """``sum(grad)`` and ``sum(grad * (x - mean))`` of every segment."""
    return planned(_reduce_grad, (grad, x, mean), (segment_size,))


def combine_grad(
    grad: FeatureMap,
    x: FeatureMap,
    mean: SegmentTable,
    factors: tuple[SegmentTable, SegmentTable, SegmentTable],
    segment_size: int,
) -> FeatureMap:
    """``k1 * grad + k2 * (x - mean) + k3`` with ``factors = (k1, k2, k3)``."""
    return planned(_combine_grad, (grad, x, mean, *factors), (segment_size,))


def _moments(x: Tensor, segment_size: int) -> tuple[Tensor, Tensor]:
    source = Map.of(x)
    layout = Layout.of(Grouping.of_segments(x, segment_size), source)
    found = passes.two_tables(x, layout.grouping.N, layout.grouping.K, torch.float64)
    passes.measure_whole(source, layout, found)
    return found


def _apply(x: Tensor, mean: Tensor, scale: Tensor, center: Tensor, segment_size: int) -> Tensor:
    y = result_like(x)
    maps = Map.of(x), Map.of(y)
    layout = Layout.of(Grouping.of_segments(x, segment_size), *maps)
    passes.apply_segments(*maps, layout, (Table.of(mean), Table.of(scale), Table.of(center)))
    return y


def _reduce_grad(grad: Tensor, x: Tensor, mean: Tensor, segment_size: int) -> tuple[Tensor, Tensor]:
    maps = Map.of(grad), Map.of(x)
    layout = Layout.of(Grouping.of_segments(x, segment_size), *maps)
    return passes.reduce_whole(*maps, layout, Table.of(mean))


def _combine_grad(  # noqa: PLR0913 - the operator's own arguments
    grad: Tensor, x: Tensor, mean: Tensor, k1: Tensor, k2: Tensor, k3: Tensor, segment_size: int
) -> Tensor:
    dx = result_like(x)
    maps = Map.of(grad), Map.of(x), Map.of(dx)
    layout = Layout.of(Grouping.of_segments(x, segment_size), *maps)
    factors = Table.of(k1), Table.of(k2), Table.of(k3)
    passes.combine_segments(maps, layout, Table.of(mean), factors)
    return dx
