# triton declares that functions which kernels call never return, so pyright finds dead code
# pyright: reportGeneralTypeIssues=false
"""Backward kernels for groups that are too large for one program: two launches.

In the first launch each program stores a row of sums over the part of the map that it reads. In the
second launch each program adds up the rows of the groups that it needs, and writes the gradient of
its part of the map. Blocks are those of ``groups``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton.device import (
    columns,
    folded_block,
    load_or,
    reciprocal_root,
    row_starts,
    split,
)
from normkit.kernels.triton.endings import gradient_of_sum, passed_back, slope_of
from normkit.kernels.triton.groups import (
    load_groups,
    place_in_rows,
    rows_of,
    segments_of,
    stretch,
)
from normkit.kernels.triton.streams import load_block, load_unless, place, store_block


@triton.jit
def store_groups(
    y, value, n, k, inside, top, stop, YN, YC, YP, Q, L,
    BL: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Store a block ``(BG, BJ, BL)`` of a map, from position ``top`` on and not beyond ``stop``."""
    l = top + tl.arange(0, BL)
    rows = row_starts(n, k, YN, YC, YP, Q, L, WIDE, ALIGN)
    at = rows[:, :, None] + columns(l, YP, WIDE)[None, None, :]
    mask = inside[:, :, None] & (l < stop)[None, None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def reduce_groups_kernel(
    g_map, x, weight, bias, mean, var, sums, group_sums, added_map, passed,
    GN, GC, GP, SN, SC, SP, DN, DC, DP, RN, RC, RP, N, Q, L, E, J, G, ITEMS, SPANS, span, R,
    STEPS, TURNS, VAR_AT, CELL_ROW, plane, group_plane, eps_high, eps_low, slope_high, slope_low,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SUMS: tl.constexpr,
    HAS_GROUPS: tl.constexpr, ADDED: tl.constexpr, ACT: tl.constexpr, PASSES: tl.constexpr,
    BG: tl.constexpr, BJ: tl.constexpr, BL: tl.constexpr, FOLD: tl.constexpr,
    UNIT: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``sum(g)`` and ``sum(g * unit)``, with ``unit = (x - mean) / std``, of each program's part.

    Sums of segments, for the parameters' gradients, are two planes of rows ``(B, R, K)``; sums of
    groups, in which the channels' scale is a factor, are two of rows ``(B, R, G)``. With an
    activation ``g`` is the gradient of its input; ``PASSES`` stores it in ``passed``.
    """
    g, run, row, first, last = rows_of(N, G, E, ITEMS, SPANS, R, BG)
    n0 = run * E
    cell = run.to(tl.int64) * CELL_ROW + g
    high, low = split(tl.load(mean + cell, mask=g < G, other=0.0).to(tl.float64), ACC)
    spread = tl.load(var + VAR_AT + cell, mask=g < G, other=1.0)
    rstd = reciprocal_root(spread, eps_high, eps_low, ACC)
    slope = slope_of(slope_high, slope_low, ACC)
    of_group = tl.zeros((BG,), ACC)
    of_group_x = tl.zeros((BG,), ACC)
    out = (run * R + row).to(tl.int64)
    for j0 in range(0, J, BJ):
        k, inside = segments_of(g, j0, G, J, BJ, UNIT)
        n, top, stop = stretch(first * STEPS, last, SPANS, span, L, STEPS, BL, ALIGN)
        value = load_groups(x, n0 + n, k, inside, top, stop, SN, SC, SP, Q, L, BL, WIDE, ALIGN)
        grad = load_groups(g_map, n0 + n, k, inside, top, stop, GN, GC, GP, Q, L, BL, WIDE, ALIGN)
        scale = load_or(HAS_WEIGHT, tl.full((BG, BJ), 1.0, ACC), weight, k // Q, inside)
        shift = load_or(HAS_BIAS, tl.zeros((BG, BJ), ACC), bias, k // Q, inside)
        factor = scale * rstd[:, None]
        total = tl.zeros((BG, BJ, BL // FOLD), ACC)
        total_x = tl.zeros((BG, BJ, BL // FOLD), ACC)
        for t in range(first * STEPS, last * STEPS):
            this, this_top, this_stop = n0 + n, top, stop
            added = grad
            if ADDED:
                added = load_groups(
                    added_map, this, k, inside, top, stop, RN, RC, RP, Q, L, BL, WIDE, ALIGN
                )
            n, top, stop = stretch(t + 1, last, SPANS, span, L, STEPS, BL, ALIGN)
            value_ahead = load_groups(
                x, n0 + n, k, inside, top, stop, SN, SC, SP, Q, L, BL, WIDE, ALIGN
            )
            grad_ahead = load_groups(
                g_map, n0 + n, k, inside, top, stop, GN, GC, GP, Q, L, BL, WIDE, ALIGN
            )
            wide = grad.to(ACC)
            unit = (value.to(ACC) - high[:, None, None]) - low[:, None, None]
            u = unit * factor[:, :, None] + shift[:, :, None]
            wide = gradient_of_sum(wide, u, added, slope, ADDED, ACT)
            if PASSES:
                store_groups(
                    passed, wide, this, k, inside, this_top, this_stop, DN, DC, DP, Q, L,
                    BL, WIDE, ALIGN,
                )  # fmt: skip
            total += folded_block(wide, BG, BJ, BL, FOLD)
            total_x += folded_block(wide * unit, BG, BJ, BL, FOLD)
            value = value_ahead
            grad = grad_ahead
        found = tl.sum(total, axis=2)
        found_x = tl.sum(total_x, axis=2) * rstd[:, None]
        if HAS_SUMS:
            at = out * (G * J) + k
            tl.store(sums + at, found, mask=inside)
            tl.store(sums + plane + at, found_x, mask=inside)
        if HAS_GROUPS:
            found *= scale
            found_x *= scale
            of_group += tl.sum(tl.where(inside, found, 0.0), axis=1)
            of_group_x += tl.sum(tl.where(inside, found_x, 0.0), axis=1)
    if HAS_GROUPS:
        at = out * G + g
        tl.store(group_sums + at, of_group, mask=g < G)
        tl.store(group_sums + group_plane + at, of_group_x, mask=g < G)


@triton.jit
def summed_rows(
    table, plane, top, num_rows, width, first_column, num_columns, inside,
    ACC: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Sums over some rows and columns of two planes, added up in a fixed order."""
    start = top.to(tl.int64) * width + first_column
    one = tl.zeros((BR, BK), ACC)
    two = tl.zeros((BR, BK), ACC)
    for first in range(0, num_rows * num_columns, BR):
        i = first + tl.arange(0, BR)
        mask = (i < num_rows * num_columns)[:, None] & inside[None, :]
        at = start[None, :] + place_in_rows(i, width, num_columns)[:, None]
        one += tl.load(table + at, mask=mask, other=0.0)
        two += tl.load(table + plane + at, mask=mask, other=0.0)
    return tl.sum(one, axis=0), tl.sum(two, axis=0)


@triton.jit
def sums_of_groups(
    sums, group_sums, plane, group_plane, top, num_rows, K, G, k, J, scale, inside,
    HAS_GROUPS: tl.constexpr, ACC: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Sums of the segments' groups, in which the channels' scale is a factor."""
    if HAS_GROUPS:
        of_group, of_group_x = summed_rows(
            group_sums, group_plane, top, num_rows, G, k // J, 1, inside, ACC, BK, BR
        )
    else:
        of_group, of_group_x = summed_rows(
            sums, plane, top, num_rows, K, k, 1, inside, ACC, BK, BR
        )  # fmt: skip
        of_group *= scale
        of_group_x *= scale
    return of_group, of_group_x


@triton.jit
def gradient_groups_kernel(
    g_map, x, dx, weight, bias, mean, var, sums, group_sums, dweight, dbias,
    GN, GC, GP, SN, SC, SP, DN, DC, DP, N, K, Q, L, SPLITS, span, E, J, G, R, RUNS,
    VAR_AT, CELL_ROW, plane, group_plane, group_size, eps_high, eps_low, slope_high, slope_low,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GROUPS: tl.constexpr, ADDS: tl.constexpr,
    CONSTANT: tl.constexpr, ACT: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr, BR: tl.constexpr,
    FOLD: tl.constexpr, ONCE: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Gradient of the map; with ``ADDS`` the first programs also compute those of weight and bias.

    ``CONSTANT``: the statistics are given, so they have no gradient, and the kernel reads x only
    for an activation. ``ACT`` is the activation if the first launch has not stored the gradient of
    its input, and 0 otherwise.
    """
    n, part, k, inside = place(K, SPLITS, BK)
    rows = row_starts(n, k, SN, SC, SP, Q, L, WIDE, ALIGN)
    grads = row_starts(n, k, GN, GC, GP, Q, L, WIDE, ALIGN)
    outs = row_starts(n, k, DN, DC, DP, Q, L, WIDE, ALIGN)
    start = part * span
    stop = tl.minimum(start + span, L) // ALIGN * ALIGN
    grad = load_block(g_map, grads, start, stop, inside, GP, BL, WIDE)
    value = load_unless(
        CONSTANT and ACT == 0, grad, x, rows, start, stop, inside, SP, BL, WIDE
    )  # fmt: skip
    run = n // E
    cell = run.to(tl.int64) * CELL_ROW + k // J
    wide = tl.load(var + VAR_AT + cell, mask=inside, other=1.0)
    rstd = reciprocal_root(wide, eps_high, eps_low, ACC)
    scale = load_or(HAS_WEIGHT, tl.full((BK,), 1.0, ACC), weight, k // Q, inside)
    if ADDS:  # noqa: SIM102 - the compiler's condition, then the program's
        if (n == 0) & (part == 0):
            starts = inside & (k % Q == 0)
            of_bias, of_weight = summed_rows(
                sums, plane, 0 * n, RUNS * R, K, k, Q, starts, ACC, BK, BR
            )  # fmt: skip
            tl.store(dweight + k // Q, of_weight, mask=starts)
            tl.store(dbias + k // Q, of_bias, mask=starts)
    by_unit = tl.zeros((BK,), ACC)
    level = tl.zeros((BK,), ACC)
    high, low = split(tl.load(mean + cell, mask=inside, other=0.0).to(tl.float64), ACC)
    if not CONSTANT:
        of_group, of_group_x = sums_of_groups(
            sums, group_sums, plane, group_plane, run * R, R, K, G, k, J, scale, inside,
            HAS_GROUPS, ACC, BK, BR,
        )  # fmt: skip
        size = (tl.minimum(E, N - run * E) * group_size).to(ACC)
        by_unit = of_group_x * rstd * rstd / size
        level = of_group * rstd / size
    by_grad = scale * rstd
    shift = load_or(HAS_BIAS, tl.zeros((BK,), ACC), bias, k // Q, inside)
    slope = slope_of(slope_high, slope_low, ACC)
    for block in range(1 if ONCE else tl.cdiv(stop - start, BL)):
        first = start + block * BL
        grad_ahead = load_unless(ONCE, grad, g_map, grads, first + BL, stop, inside, GP, BL, WIDE)
        ahead = load_unless(
            ONCE or (CONSTANT and ACT == 0), value, x, rows, first + BL, stop, inside, SP, BL, WIDE
        )
        unit = (value.to(ACC) - high[:, None]) - low[:, None]
        u = unit * by_grad[:, None] + shift[:, None]
        behind = passed_back(grad.to(ACC), u, slope, ACT)
        result = behind * by_grad[:, None]
        if not CONSTANT:
            result = result - unit * by_unit[:, None] - level[:, None]
        store_block(dx, result, outs, first, stop, inside, DP, BL, WIDE)
        value = ahead
        grad = grad_ahead
