r"""The four primitives in plain torch, which define the results of all kernels.

A feature map ``(N, C, *S)`` is reshaped to ``(N, C, Q, L)``: ``Q`` segments of ``L`` elements in
each channel. This is a view for contiguous and channels_last maps. Tables are ``(N, K)`` or
``(1, K)`` with ``K = C * Q``. Statistics are at least float32. The map comes first in every
expression, because the first operand decides the memory format of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.typing import FeatureMap, SegmentTable


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the tables for maps of this dtype: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def moments(x: FeatureMap, segment_size: int) -> tuple[SegmentTable, SegmentTable]:
    """Mean and biased variance of every segment."""
    rows = segments(x, segment_size)
    var, mean = torch.var_mean(rows, dim=-1, correction=0)
    return mean.flatten(1), var.flatten(1)


def apply(
    x: FeatureMap, mean: SegmentTable, scale: SegmentTable, center: SegmentTable, segment_size: int
) -> FeatureMap:
    """Compute ``scale * (x - mean) + center`` per segment, in the dtype and layout of ``x``."""
    rows = segments(x, segment_size)
    mean, scale, center = (_column(table, rows) for table in (mean, scale, center))
    return _like((rows - mean) * scale + center, x)


def reduce_grad(
    grad: FeatureMap, x: FeatureMap, mean: SegmentTable, segment_size: int
) -> tuple[SegmentTable, SegmentTable]:
    """Compute ``sum(grad)`` and ``sum(grad * (x - mean))`` of every segment."""
    rows, grads = segments(x, segment_size), segments(grad, segment_size)
    weighted = grads * (rows - _column(mean, rows))
    return grads.sum(dim=-1).flatten(1), weighted.sum(dim=-1).flatten(1)


def combine_grad(
    grad: FeatureMap,
    x: FeatureMap,
    mean: SegmentTable,
    factors: tuple[SegmentTable, SegmentTable, SegmentTable],
    segment_size: int,
) -> FeatureMap:
    """Compute ``k1 * grad + k2 * (x - mean) + k3`` with ``factors = (k1, k2, k3)``."""
    rows, grads = segments(x, segment_size), segments(grad, segment_size)
    k1, k2, k3 = (_column(table, rows) for table in factors)
    return _like(((rows - _column(mean, rows)) * k2).addcmul_(k1, grads).add_(k3), x)


def segments(x: FeatureMap, segment_size: int) -> Tensor:
    """Reshape ``(N, C, *S)`` to ``(N, C, Q, L)``, in the dtype of the tables."""
    num_examples, num_channels = x.shape[:2]
    rows = x.unsqueeze(-1) if x.ndim == 2 else x.flatten(2)
    num_segments = rows.shape[2] // max(segment_size, 1)  # reshape cannot infer -1 if N is 0
    rows = rows.reshape(num_examples, num_channels, num_segments, segment_size)
    return rows.to(table_dtype(x.dtype))


def _column(table: SegmentTable, rows: Tensor) -> Tensor:
    return table.reshape(table.shape[0], rows.shape[1], rows.shape[2], 1)


def _like(rows: Tensor, x: FeatureMap) -> FeatureMap:
    return rows.reshape(x.shape).to(x.dtype)
