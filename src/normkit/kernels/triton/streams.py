# triton declares what kernels call as never returning
# pyright: reportGeneralTypeIssues=false
"""Kernels that stream over a map: the four primitives, with tables of segments or of groups.

A program takes ``BK`` segments of an example, ``BL`` elements of each at a time. Whichever of both
axes lies side by side in memory is read side by side: strides of 1 are known when a kernel is
compiled. Segments may be shared by several programs (``SPLITS``), each of which takes ``span``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton.device import columns, reciprocal_root, row_starts, split


@triton.jit
def place(K, SPLITS, BK: tl.constexpr):
    """The example, the part of its segments and the segments of a program."""
    tiles = tl.cdiv(K, BK)
    pid = tl.program_id(0)
    rest = pid // tiles
    k = (pid % tiles) * BK + tl.arange(0, BK)
    return rest // SPLITS, rest % SPLITS, k, k < K


@triton.jit
def moments_kernel(
    x, mean, var,
    SN, SC, SP, K, Q, L, SPLITS, span,
    BK: tl.constexpr, BL: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of every part of a segment, in float64: tables ``(N, SPLITS, K)``.

    Every lane keeps a mean and squared deviations of its own elements (Welford), around the
    segment's first element; they are merged at the end (Chan). Nothing cancels.
    """
    n, part, k, inside = place(K, SPLITS, BK)
    start = part * span
    stop = tl.minimum(start + span, L) // ALIGN * ALIGN
    rows = row_starts(n, k, SN, SC, SP, Q, L, WIDE, ALIGN)
    shift = tl.load(x + rows, mask=inside, other=0.0).to(ACC)
    lane_mean = tl.zeros((BK, BL), ACC)
    lane_square = tl.zeros((BK, BL), ACC)
    lane = tl.arange(0, BL)
    for first in range(start, stop, BL):
        l = first + lane
        mask = inside[:, None] & (l < stop)[None, :]
        value = tl.load(x + rows[:, None] + columns(l, SP, WIDE)[None, :], mask=mask, other=0.0)
        delta = tl.where(mask, value.to(ACC) - shift[:, None] - lane_mean, 0.0)
        step = delta * (1.0 / ((first - start) // BL + 1).to(ACC))
        lane_mean += step
        lane_square += delta * (delta - step)
    count = tl.maximum((stop - start - lane + BL - 1) // BL, 0).to(ACC)[None, :]
    size = (stop - start).to(ACC)
    center = tl.sum(lane_mean * count, axis=1) / size
    distance = lane_mean - center[:, None]
    square = tl.sum(lane_square + distance * distance * count, axis=1)
    out = (n * SPLITS + part).to(tl.int64) * K + k
    tl.store(mean + out, shift.to(tl.float64) + center.to(tl.float64), mask=inside)
    tl.store(var + out, square.to(tl.float64) / size.to(tl.float64), mask=inside)


@triton.jit
def cells(n, k, E, J, ROW, WIDE: tl.constexpr):
    """Places in a table whose row has ``ROW`` cells: 0 where all examples share one row."""
    row = n // E
    if WIDE:
        row = row.to(tl.int64)
    return row * ROW + k // J


@triton.jit
def apply_kernel(
    x, y, mean, var, scale, center,
    SN, SC, SP, YN, YC, YP, K, Q, L, SPLITS, span,
    E, J, MEAN_ROW, SCALE_ROW, CENTER_ROW, eps_high, eps_low,
    POOLED: tl.constexpr, CENTERED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CENTER: tl.constexpr,
    BK: tl.constexpr, BL: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """``scale * (x - mean) + center``.

    ``POOLED``: the mean and variance are those of groups, scale and center those of channels, and
    the scale is divided by the standard deviation. Not ``CENTERED``: there is no mean.
    """
    n, part, k, inside = place(K, SPLITS, BK)
    cell = cells(n, k, E, J, MEAN_ROW, WIDE)
    high, low = split(tl.zeros((BK,), tl.float64), ACC)
    if CENTERED:
        high, low = split(tl.load(mean + cell, mask=inside, other=0.0).to(tl.float64), ACC)
    factor = tl.full((BK,), 1.0, ACC)
    shift = tl.zeros((BK,), ACC)
    if POOLED:
        wide = tl.load(var + cell, mask=inside, other=1.0)
        factor = reciprocal_root(wide, eps_high, eps_low, ACC)
    if HAS_SCALE:
        scale_at = k // Q if POOLED else cells(n, k, 1, 1, SCALE_ROW, WIDE)
        factor *= tl.load(scale + scale_at, mask=inside, other=0.0).to(ACC)
    if HAS_CENTER:
        center_at = k // Q if POOLED else cells(n, k, 1, 1, CENTER_ROW, WIDE)
        shift = tl.load(center + center_at, mask=inside, other=0.0).to(ACC)
    rows = row_starts(n, k, SN, SC, SP, Q, L, WIDE, ALIGN)
    outs = row_starts(n, k, YN, YC, YP, Q, L, WIDE, ALIGN)
    stop = tl.minimum(part * span + span, L) // ALIGN * ALIGN
    for first in range(part * span, stop, BL):
        l = first + tl.arange(0, BL)
        mask = inside[:, None] & (l < stop)[None, :]
        value = tl.load(x + rows[:, None] + columns(l, SP, WIDE)[None, :], mask=mask, other=0.0)
        unit = (value.to(ACC) - high[:, None]) - low[:, None]
        result = unit * factor[:, None] + shift[:, None]
        at = outs[:, None] + columns(l, YP, WIDE)[None, :]
        tl.store(y + at, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def reduce_grad_kernel(
    g, x, mean, sums, sums_x,
    GN, GC, GP, SN, SC, SP, K, Q, L, SPLITS, span, E, J, MEAN_ROW,
    BK: tl.constexpr, BL: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """``sum(g)`` and ``sum(g * (x - mean))`` of every part of a segment, ``(N, SPLITS, K)``."""
    n, part, k, inside = place(K, SPLITS, BK)
    cell = cells(n, k, E, J, MEAN_ROW, WIDE)
    high, low = split(tl.load(mean + cell, mask=inside, other=0.0).to(tl.float64), ACC)
    rows = row_starts(n, k, SN, SC, SP, Q, L, WIDE, ALIGN)
    grads = row_starts(n, k, GN, GC, GP, Q, L, WIDE, ALIGN)
    total = tl.zeros((BK, BL), ACC)
    total_x = tl.zeros((BK, BL), ACC)
    stop = tl.minimum(part * span + span, L) // ALIGN * ALIGN
    for first in range(part * span, stop, BL):
        l = first + tl.arange(0, BL)
        mask = inside[:, None] & (l < stop)[None, :]
        value = tl.load(x + rows[:, None] + columns(l, SP, WIDE)[None, :], mask=mask, other=0.0)
        grad = tl.load(g + grads[:, None] + columns(l, GP, WIDE)[None, :], mask=mask, other=0.0)
        grad = grad.to(ACC)
        total += grad
        total_x += grad * ((value.to(ACC) - high[:, None]) - low[:, None])
    out = (n * SPLITS + part).to(tl.int64) * K + k
    tl.store(sums + out, tl.sum(total, axis=1), mask=inside)
    tl.store(sums_x + out, tl.sum(total_x, axis=1), mask=inside)


@triton.jit
def combine_grad_kernel(
    g, x, dx, mean, var, weight, k1, k2, k3,
    GN, GC, GP, SN, SC, SP, DN, DC, DP, K, Q, L, SPLITS, span,
    E, J, MEAN_ROW, K1_ROW, K2_ROW, K3_ROW, eps_high, eps_low,
    POOLED: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BK: tl.constexpr, BL: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """``k1 * g + k2 * (x - mean) + k3``.

    ``POOLED``: mean, variance, ``k2`` and ``k3`` are those of groups, and
    ``k1 = weight / sqrt(var + eps)``.
    """
    n, part, k, inside = place(K, SPLITS, BK)
    cell = cells(n, k, E, J, MEAN_ROW, WIDE)
    high, low = split(tl.load(mean + cell, mask=inside, other=0.0).to(tl.float64), ACC)
    if POOLED:
        wide = tl.load(var + cell, mask=inside, other=1.0)
        by_grad = reciprocal_root(wide, eps_high, eps_low, ACC)
        if HAS_WEIGHT:
            by_grad *= tl.load(weight + k // Q, mask=inside, other=0.0).to(ACC)
        at2 = cell
        at3 = cell
    else:
        at1 = cells(n, k, 1, 1, K1_ROW, WIDE)
        by_grad = tl.load(k1 + at1, mask=inside, other=0.0).to(ACC)
        at2 = cells(n, k, 1, 1, K2_ROW, WIDE)
        at3 = cells(n, k, 1, 1, K3_ROW, WIDE)
    by_unit = tl.load(k2 + at2, mask=inside, other=0.0).to(ACC)
    shift = tl.load(k3 + at3, mask=inside, other=0.0).to(ACC)
    rows = row_starts(n, k, SN, SC, SP, Q, L, WIDE, ALIGN)
    grads = row_starts(n, k, GN, GC, GP, Q, L, WIDE, ALIGN)
    outs = row_starts(n, k, DN, DC, DP, Q, L, WIDE, ALIGN)
    stop = tl.minimum(part * span + span, L) // ALIGN * ALIGN
    for first in range(part * span, stop, BL):
        l = first + tl.arange(0, BL)
        mask = inside[:, None] & (l < stop)[None, :]
        value = tl.load(x + rows[:, None] + columns(l, SP, WIDE)[None, :], mask=mask, other=0.0)
        grad = tl.load(g + grads[:, None] + columns(l, GP, WIDE)[None, :], mask=mask, other=0.0)
        unit = (value.to(ACC) - high[:, None]) - low[:, None]
        # without a slope (given statistics) x may be infinite, and the gradient is finite
        along = tl.where(by_unit[:, None] == 0.0, 0.0, unit * by_unit[:, None])
        result = grad.to(ACC) * by_grad[:, None] + along + shift[:, None]
        at = outs[:, None] + columns(l, DP, WIDE)[None, :]
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=mask)
