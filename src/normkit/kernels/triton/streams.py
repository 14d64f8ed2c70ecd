# triton declares that functions which kernels call never return, so pyright finds dead code
# pyright: reportGeneralTypeIssues=false
"""Kernels that stream over a map: the four primitives, with tables of segments or of groups.

A program takes ``BK`` segments of an example, and ``BL`` elements of each at a time. The axis that
is contiguous in memory is read in vectors, because strides of 1 are known when a kernel is
compiled. A segment may be shared by several programs (``SPLITS``), each of which takes ``span``
elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton.device import (
    columns,
    finite,
    folded,
    reciprocal_root,
    row_starts,
    split,
)
from normkit.kernels.triton.endings import activated, gradient_of_sum, passed_back, slope_of


@triton.jit
def place(K, SPLITS, BK: tl.constexpr):
    """The example, the part of its segments and the segments of a program."""
    tiles = tl.cdiv(K, BK)
    pid = tl.program_id(0)
    rest = pid // tiles
    k = (pid % tiles) * BK + tl.arange(0, BK)
    return rest // SPLITS, rest % SPLITS, k, k < K


@triton.jit
def load_block(
    x, rows, first, stop, inside, SP, BL: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Load elements of segments from ``first`` on, ``(BK, BL)``; they are 0 from ``stop`` on."""
    l = first + tl.arange(0, BL)
    mask = inside[:, None] & (l < stop)[None, :]
    return tl.load(x + rows[:, None] + columns(l, SP, WIDE)[None, :], mask=mask, other=0.0)


@triton.jit
def load_unless(
    SKIP: tl.constexpr, value, x, rows, first, stop, inside, SP, BL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Load the next block of segments; with ``SKIP`` return ``value``, which nobody will read."""
    if not SKIP:
        value = load_block(x, rows, first, stop, inside, SP, BL, WIDE)
    return value


@triton.jit
def store_block(
    y, value, rows, first, stop, inside, SP, BL: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Store elements of segments from ``first`` on, in the dtype of ``y``."""
    l = first + tl.arange(0, BL)
    mask = inside[:, None] & (l < stop)[None, :]
    at = rows[:, None] + columns(l, SP, WIDE)[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def moments_kernel(
    x, mean, var,
    SN, SC, SP, K, Q, L, SPLITS, span,
    BK: tl.constexpr, BL: tl.constexpr, FOLD: tl.constexpr, ONCE: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of every part of a segment, in float64: tables ``(N, SPLITS, K)``.

    If a part is one block, it is measured in two steps: its mean around its first element, then its
    variance around the mean. If it has more blocks, all sums are taken around the mean of the first
    block. So an offset costs no digits, and the loop has no division.
    """
    n, part, k, inside = place(K, SPLITS, BK)
    start = part * span
    stop = tl.minimum(start + span, L) // ALIGN * ALIGN
    rows = row_starts(n, k, SN, SC, SP, Q, L, WIDE, ALIGN)
    value = load_block(x, rows, start, stop, inside, SP, BL, WIDE)
    size = (stop - start).to(ACC)
    lane = tl.arange(0, BL)
    if ONCE:
        corner = tl.load(x + rows + columns(start, SP, WIDE), mask=inside, other=0.0)
        shift = finite(corner.to(ACC))
        mask = (lane < stop - start)[None, :]
        moved = value.to(ACC) - shift[:, None]
        center = tl.sum(tl.where(mask, moved, 0.0), axis=1) / size
        apart = tl.where(mask, moved - center[:, None], 0.0)
        spread = tl.sum(apart * apart, axis=1) / size
    else:
        shift = finite(tl.sum(value.to(ACC) * (1.0 / tl.minimum(size, BL)), axis=1))
        total = tl.zeros((BK, BL // FOLD), ACC)
        square = tl.zeros((BK, BL // FOLD), ACC)
        for first in range(start, stop, BL):
            ahead = load_block(x, rows, first + BL, stop, inside, SP, BL, WIDE)
            apart = tl.where((first + lane < stop)[None, :], value.to(ACC) - shift[:, None], 0.0)
            total += folded(apart, BK, BL, FOLD)
            square += folded(apart * apart, BK, BL, FOLD)
            value = ahead
        center = tl.sum(total, axis=1) / size
        spread = tl.sum(square, axis=1) / size - center * center
        spread = tl.where(spread < 0.0, 0.0, spread)
    out = (n * SPLITS + part).to(tl.int64) * K + k
    tl.store(mean + out, shift.to(tl.float64) + center.to(tl.float64), mask=inside)
    tl.store(var + out, spread.to(tl.float64), mask=inside)


@triton.jit
def cells(n, k, E, J, ROW, WIDE: tl.constexpr):
    """Places in a table whose row has ``ROW`` cells: 0 where all examples share one row."""
    row = n // E
    if WIDE:
        row = row.to(tl.int64)
    return row * ROW + k // J


@triton.jit
def write_normalized(
    x, y, residual, value, rows, outs, adds, start, stop, inside, SP, YP, RP,
    high, low, factor, shift, slope,
    ADDED: tl.constexpr, ACT: tl.constexpr,
    BL: tl.constexpr, ONCE: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``factor * (x - mean) + shift`` of a part of segments, whose first block is ``value``.

    Then add a residual (``ADDED``) and apply an activation (``ACT``).
    """
    for block in range(1 if ONCE else tl.cdiv(stop - start, BL)):
        first = start + block * BL
        added = load_unless(ADDED == 0, value, residual, adds, first, stop, inside, RP, BL, WIDE)
        ahead = load_unless(ONCE, value, x, rows, first + BL, stop, inside, SP, BL, WIDE)
        unit = (value.to(ACC) - high[:, None]) - low[:, None]
        result = unit * factor[:, None] + shift[:, None]
        if ADDED:
            result += added.to(ACC)
        result = activated(result, slope, ACT)
        store_block(y, result, outs, first, stop, inside, YP, BL, WIDE)
        value = ahead


@triton.jit
def apply_kernel(
    x, y, mean, var, scale, center, residual,
    SN, SC, SP, YN, YC, YP, RN, RC, RP, K, Q, L, SPLITS, span,
    E, J, MEAN_ROW, SCALE_ROW, CENTER_ROW, eps_high, eps_low, slope_high, slope_low,
    POOLED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CENTER: tl.constexpr,
    ADDED: tl.constexpr, ACT: tl.constexpr,
    BK: tl.constexpr, BL: tl.constexpr, FOLD: tl.constexpr, ONCE: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``scale * (x - mean) + center``, then a residual and an activation.

    With ``POOLED`` mean and variance are those of groups, scale and center are those of channels,
    and the kernel divides the scale by the standard deviation.
    """
    n, part, k, inside = place(K, SPLITS, BK)
    rows = row_starts(n, k, SN, SC, SP, Q, L, WIDE, ALIGN)
    outs = row_starts(n, k, YN, YC, YP, Q, L, WIDE, ALIGN)
    start = part * span
    stop = tl.minimum(start + span, L) // ALIGN * ALIGN
    value = load_block(x, rows, start, stop, inside, SP, BL, WIDE)
    cell = cells(n, k, E, J, MEAN_ROW, WIDE)
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
    adds = row_starts(n, k, RN, RC, RP, Q, L, WIDE, ALIGN)
    slope = slope_of(slope_high, slope_low, ACC)
    write_normalized(
        x, y, residual, value, rows, outs, adds, start, stop, inside, SP, YP, RP,
        high, low, factor, shift, slope, ADDED, ACT, BL, ONCE, ACC, WIDE,
    )  # fmt: skip


@triton.jit
def factor_or(
    HAS: tl.constexpr, default: tl.constexpr, values, n, k, K, inside,
    BK: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A table's values of segments, to be multiplied with a block; or ``default``."""
    found = tl.full((BK,), default, ACC)
    if HAS:
        at = cells(n, k, 1, 1, K, WIDE)
        found = tl.load(values + at, mask=inside, other=0.0).to(ACC)
    return found[:, None]


@triton.jit
def reduce_grad_kernel(
    g, x, mean, sums, sums_x, scale, center, added_map, passed,
    GN, GC, GP, SN, SC, SP, RN, RC, RP, DN, DC, DP, K, Q, L, SPLITS, span, MEAN_ROW,
    slope_high, slope_low,
    ADDED: tl.constexpr, ACT: tl.constexpr, PASSES: tl.constexpr,
    BK: tl.constexpr, BL: tl.constexpr, FOLD: tl.constexpr, ONCE: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``sum(g)`` and ``sum(g * (x - mean))`` of every part of a segment, ``(N, SPLITS, K)``.

    With an activation (``ACT``) ``g`` is the gradient of the activation's input, computed from that
    of its result; ``PASSES`` stores it in ``passed``.
    """
    n, part, k, inside = place(K, SPLITS, BK)
    rows = row_starts(n, k, SN, SC, SP, Q, L, WIDE, ALIGN)
    grads = row_starts(n, k, GN, GC, GP, Q, L, WIDE, ALIGN)
    adds = row_starts(n, k, RN, RC, RP, Q, L, WIDE, ALIGN)
    outs = row_starts(n, k, DN, DC, DP, Q, L, WIDE, ALIGN)
    start = part * span
    stop = tl.minimum(start + span, L) // ALIGN * ALIGN
    value = load_block(x, rows, start, stop, inside, SP, BL, WIDE)
    grad = load_block(g, grads, start, stop, inside, GP, BL, WIDE)
    cell = cells(n, k, 1, 1, MEAN_ROW, WIDE)
    high, low = split(tl.load(mean + cell, mask=inside, other=0.0).to(tl.float64), ACC)
    factor = factor_or(ACT > 0, 1.0, scale, n, k, K, inside, BK, ACC, WIDE)
    shift = factor_or(ACT > 0, 0.0, center, n, k, K, inside, BK, ACC, WIDE)
    slope = slope_of(slope_high, slope_low, ACC)
    if ONCE:
        unit = (value.to(ACC) - high[:, None]) - low[:, None]
        added = load_unless(ADDED == 0, value, added_map, adds, start, stop, inside, RP, BL, WIDE)
        total = gradient_of_sum(grad.to(ACC), unit * factor + shift, added, slope, ADDED, ACT)
        if PASSES:
            store_block(passed, total, outs, start, stop, inside, DP, BL, WIDE)
        total_x = total * unit
    else:
        total = tl.zeros((BK, BL // FOLD), ACC)
        total_x = tl.zeros((BK, BL // FOLD), ACC)
        for first in range(start, stop, BL):
            ahead = load_block(x, rows, first + BL, stop, inside, SP, BL, WIDE)
            grad_ahead = load_block(g, grads, first + BL, stop, inside, GP, BL, WIDE)
            unit = (value.to(ACC) - high[:, None]) - low[:, None]
            added = load_unless(
                ADDED == 0, value, added_map, adds, first, stop, inside, RP, BL, WIDE
            )
            wide = gradient_of_sum(grad.to(ACC), unit * factor + shift, added, slope, ADDED, ACT)
            if PASSES:
                store_block(passed, wide, outs, first, stop, inside, DP, BL, WIDE)
            total += folded(wide, BK, BL, FOLD)
            total_x += folded(wide * unit, BK, BL, FOLD)
            value = ahead
            grad = grad_ahead
    out = (n * SPLITS + part).to(tl.int64) * K + k
    tl.store(sums + out, tl.sum(total, axis=1), mask=inside)
    tl.store(sums_x + out, tl.sum(total_x, axis=1), mask=inside)


@triton.jit
def combine_grad_kernel(
    g, x, dx, mean, k1, k2, k3, scale, center,
    GN, GC, GP, SN, SC, SP, DN, DC, DP, K, Q, L, SPLITS, span,
    MEAN_ROW, K1_ROW, K2_ROW, K3_ROW, slope_high, slope_low,
    ACT: tl.constexpr,
    BK: tl.constexpr, BL: tl.constexpr, FOLD: tl.constexpr, ONCE: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``k1 * g + k2 * (x - mean) + k3``, with ``g`` as in ``reduce_grad_kernel``."""
    n, part, k, inside = place(K, SPLITS, BK)
    rows = row_starts(n, k, SN, SC, SP, Q, L, WIDE, ALIGN)
    grads = row_starts(n, k, GN, GC, GP, Q, L, WIDE, ALIGN)
    outs = row_starts(n, k, DN, DC, DP, Q, L, WIDE, ALIGN)
    start = part * span
    stop = tl.minimum(start + span, L) // ALIGN * ALIGN
    value = load_block(x, rows, start, stop, inside, SP, BL, WIDE)
    grad = load_block(g, grads, start, stop, inside, GP, BL, WIDE)
    cell = cells(n, k, 1, 1, MEAN_ROW, WIDE)
    high, low = split(tl.load(mean + cell, mask=inside, other=0.0).to(tl.float64), ACC)
    at1 = cells(n, k, 1, 1, K1_ROW, WIDE)
    at2 = cells(n, k, 1, 1, K2_ROW, WIDE)
    at3 = cells(n, k, 1, 1, K3_ROW, WIDE)
    by_grad = tl.load(k1 + at1, mask=inside, other=0.0).to(ACC)
    by_unit = tl.load(k2 + at2, mask=inside, other=0.0).to(ACC)
    level = tl.load(k3 + at3, mask=inside, other=0.0).to(ACC)
    factor = factor_or(ACT > 0, 1.0, scale, n, k, K, inside, BK, ACC, WIDE)
    shift = factor_or(ACT > 0, 0.0, center, n, k, K, inside, BK, ACC, WIDE)
    slope = slope_of(slope_high, slope_low, ACC)
    for block in range(1 if ONCE else tl.cdiv(stop - start, BL)):
        first = start + block * BL
        ahead = load_unless(ONCE, value, x, rows, first + BL, stop, inside, SP, BL, WIDE)
        grad_ahead = load_unless(ONCE, grad, g, grads, first + BL, stop, inside, GP, BL, WIDE)
        unit = (value.to(ACC) - high[:, None]) - low[:, None]
        wide = passed_back(grad.to(ACC), unit * factor + shift, slope, ACT)
        # With given statistics k2 is 0; the gradient is then finite even where x is infinite.
        along = tl.where(by_unit[:, None] == 0.0, 0.0, unit * by_unit[:, None])
        result = wide * by_grad[:, None] + along + level[:, None]
        store_block(dx, result, outs, first, stop, inside, DP, BL, WIDE)
        value = ahead
        grad = grad_ahead
