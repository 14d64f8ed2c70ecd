"""The four primitives of ``reference``, with the same signatures, by the C++ operators."""

from __future__ import annotations

import torch

from normkit.typing import FeatureMap, SegmentTable

Tables = tuple[SegmentTable, ...]


def moments(x: FeatureMap, segment_size: int) -> tuple[SegmentTable, SegmentTable]:
    """Mean and biased variance of every segment, in float64, so that an offset costs no digits."""
    return torch.ops.normkit.moments.default(x, segment_size, True)


def apply(
    x: FeatureMap, mean: SegmentTable, scale: SegmentTable, center: SegmentTable, segment_size: int
) -> FeatureMap:
    """Compute ``scale * (x - mean) + center`` per segment, in the dtype and layout of ``x``."""
    return torch.ops.normkit.apply.default(x, *_alike(mean, scale, center))


def reduce_grad(
    grad: FeatureMap, x: FeatureMap, mean: SegmentTable, segment_size: int
) -> tuple[SegmentTable, SegmentTable]:
    """Compute ``sum(grad)`` and ``sum(grad * (x - mean))`` of every segment."""
    return torch.ops.normkit.reduce_grad.default(grad, x, mean)


def combine_grad(
    grad: FeatureMap,
    x: FeatureMap,
    mean: SegmentTable,
    factors: tuple[SegmentTable, SegmentTable, SegmentTable],
    segment_size: int,
) -> FeatureMap:
    """Compute ``k1 * grad + k2 * (x - mean) + k3`` with ``factors = (k1, k2, k3)``."""
    return torch.ops.normkit.combine_grad.default(grad, x, *_alike(mean, *factors))


def _alike(*tables: SegmentTable) -> Tables:
    """Give tables one shape: if one has a row per example, repeat the others' single rows."""
    shape = max((table.shape for table in tables), key=lambda s: s[0])
    return tuple(t if t.shape == shape else t.expand(shape).contiguous() for t in tables)
