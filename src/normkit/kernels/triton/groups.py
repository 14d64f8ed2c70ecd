# triton declares what kernels call as never returning
# pyright: reportGeneralTypeIssues=false
"""Kernels for groups that no program holds: two launches each way.

The first of each way reads the map and leaves, for each group, a few rows of parts: what one
program has seen of it. Each program of the second pools the rows of the groups that it needs (they
come from the cache) and writes its part of the map; the first of a group's programs also writes
what is kept of the group, and moves running statistics.

A run of ``E`` examples has ``SPANS`` stretches of positions in each example; ``ITEMS`` of these
pairs belong to a row. A block is ``(BG, BJ, BL)``: groups, segments of a group, positions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton.device import (
    columns,
    count_batch,
    move,
    reciprocal_root,
    row_starts,
    split,
)
from normkit.kernels.triton.streams import place


@triton.jit
def rows_of(N, G, E, ITEMS, SPANS, R, BG: tl.constexpr):
    """A program's groups, its run of examples, its row, and the pairs that belong to it."""
    tiles = tl.cdiv(G, BG)
    rest = tl.program_id(0) // tiles
    g = (tl.program_id(0) % tiles) * BG + tl.arange(0, BG)
    run = rest // R
    row = rest % R
    examples = tl.minimum(E, N - run * E)
    first = row * ITEMS
    return g, run, row, first, tl.minimum(first + ITEMS, examples * SPANS)


@triton.jit
def sum_block(values):
    """Sums over a block's segments and positions."""
    return tl.sum(tl.sum(values, axis=2), axis=1)


@triton.jit
def segment_moments(
    x, corner, n0, k, inside, first, last, SN, SC, SP, Q, L, SPANS, span,
    BG: tl.constexpr, BJ: tl.constexpr, BL: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Number, sum and squared deviations of groups' elements in a block of segments.

    Every lane sums around its own first element, so nothing needs a division before the end, and a
    mean far from 0 costs no digits. Sums come relative to ``corner``, an element of each group.
    """
    shift = tl.zeros((BG, BJ, BL), ACC) + corner[:, None, None]
    count = tl.zeros((BG, BJ, BL), ACC)
    total = tl.zeros((BG, BJ, BL), ACC)
    square = tl.zeros((BG, BJ, BL), ACC)
    for item in range(first, last):
        start = (item % SPANS) * span
        stop = tl.minimum(start + span, L) // ALIGN * ALIGN
        rows = row_starts(n0 + item // SPANS, k, SN, SC, SP, Q, L, WIDE, ALIGN)
        for top in range(start, stop, BL):
            l = top + tl.arange(0, BL)
            mask = inside[:, :, None] & (l < stop)[None, None, :]
            at = rows[:, :, None] + columns(l, SP, WIDE)[None, None, :]
            value = tl.load(x + at, mask=mask, other=0.0).to(ACC)
            shift = tl.where(mask & (count == 0.0), value, shift)
            apart = tl.where(mask, value - shift, 0.0)
            count += tl.where(mask, 1.0, 0.0).to(ACC)
            total += apart
            square += apart * apart
    level = (shift - corner[:, None, None]) + total / tl.maximum(count, 1.0)
    size = sum_block(count)
    center = sum_block(tl.where(count > 0.0, level * count, 0.0)) / tl.maximum(size, 1.0)
    away = level - center[:, None, None]
    within = square - total * (total / tl.maximum(count, 1.0))
    spread = tl.where(count > 0.0, tl.maximum(within, 0.0) + count * away * away, 0.0)
    spread = tl.where(within != within, within, spread)  # noqa: PLR0124 - maximum loses a NaN
    return size, center, sum_block(spread)


@triton.jit
def measure_groups_kernel(
    x, parts,
    SN, SC, SP, N, Q, L, E, J, G, ITEMS, SPANS, span, R, plane,
    BG: tl.constexpr, BJ: tl.constexpr, BL: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows ``(B, R, G)`` of four planes: a mean as two summands, squared deviations, a number."""
    g, run, row, first, last = rows_of(N, G, E, ITEMS, SPANS, R, BG)
    n0 = run * E
    some = row_starts(n0 + first // SPANS, g * J, SN, SC, SP, Q, L, WIDE, 1)
    some += columns((first % SPANS) * span, SP, WIDE)
    corner = tl.load(x + some, mask=(g < G) & (first < last), other=0.0).to(ACC)
    size = tl.zeros((BG,), ACC)
    center = tl.zeros((BG,), ACC)
    square = tl.zeros((BG,), ACC)
    for j0 in range(0, J, BJ):
        j = j0 + tl.arange(0, BJ)
        inside = (g < G)[:, None] & (j < J)[None, :]
        k = g[:, None] * J + j[None, :]
        more, level, spread = segment_moments(
            x, corner, n0, k, inside, first, last, SN, SC, SP, Q, L, SPANS, span,
            BG, BJ, BL, ACC, WIDE, ALIGN,
        )  # fmt: skip
        both = tl.maximum(size + more, 1.0)
        step = level - center
        square += spread + step * step * (size * more / both)
        center += step * (more / both)
        size += more
    out = (run * R + row).to(tl.int64) * G + g
    tl.store(parts + out, corner, mask=g < G)
    tl.store(parts + plane + out, center, mask=g < G)
    tl.store(parts + 2 * plane + out, square, mask=g < G)
    tl.store(parts + 3 * plane + out, size, mask=g < G)


@triton.jit
def load_part(parts, plane, at, mask, which: tl.constexpr):
    """A plane's values of rows and groups."""
    return tl.load(parts + which * plane + at, mask=mask, other=0.0)


@triton.jit
def pooled_moments(
    parts, plane, run, R, G, g, inside, ACC: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """Mean, as two summands, variance and number of groups, by the law of total variance."""
    top = (run * R).to(tl.int64) * G
    high = load_part(parts, plane, top + g, inside, 0)
    low = load_part(parts, plane, top + g, inside, 1)
    size = tl.zeros((BR, BK), ACC)
    total = tl.zeros((BR, BK), ACC)
    for first in range(0, R, BR):
        r = first + tl.arange(0, BR)
        mask = (r < R)[:, None] & inside[None, :]
        at = top + r[:, None] * G + g[None, :]
        count = load_part(parts, plane, at, mask, 3)
        apart = load_part(parts, plane, at, mask, 0) - high[None, :]
        apart += load_part(parts, plane, at, mask, 1) - low[None, :]
        size += count
        total += tl.where(mask & (count > 0.0), count * apart, 0.0)
    sizes = tl.maximum(tl.sum(size, axis=0), 1.0)
    center = tl.sum(total, axis=0) / sizes
    total = tl.zeros((BR, BK), ACC)
    for first in range(0, R, BR):
        r = first + tl.arange(0, BR)
        mask = (r < R)[:, None] & inside[None, :]
        at = top + r[:, None] * G + g[None, :]
        count = load_part(parts, plane, at, mask, 3)
        apart = load_part(parts, plane, at, mask, 0) - high[None, :]
        apart += load_part(parts, plane, at, mask, 1) - low[None, :]
        away = apart - center[None, :]
        both = load_part(parts, plane, at, mask, 2) + count * away * away
        total += tl.where(mask & (count > 0.0), both, 0.0)
    return high, low + center, tl.sum(total, axis=0) / sizes, sizes


@triton.jit
def normalize_groups_kernel(
    x, y, weight, bias, parts, table, running_mean, running_var, counter, rate_high, rate_low,
    SN, SC, SP, YN, YC, YP, K, Q, L, SPLITS, span, E, J, G, R, plane, num_cells,
    eps_high, eps_low,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RUNNING: tl.constexpr,
    HAS_COUNTER: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr, BR: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Pool, normalise, scale and shift; the table's cells and running statistics on the way."""
    n, part, k, inside = place(K, SPLITS, BK)
    run = n // E
    g = k // J
    high, low, var, sizes = pooled_moments(parts, plane, run, R, G, g, inside, ACC, BK, BR)
    is_first = inside & (k % J == 0) & (n == run * E) & (part == 0)
    cell = run.to(tl.int64) * G + g
    mean = high.to(tl.float64) + low.to(tl.float64)
    tl.store(table + cell, mean, mask=is_first)
    tl.store(table + num_cells + cell, var.to(tl.float64), mask=is_first)
    if HAS_RUNNING:
        size = sizes.to(tl.float64)
        unbiased = var.to(tl.float64) * (size / tl.maximum(size - 1.0, 1.0))
        move(running_mean + g, mean, rate_high, rate_low, is_first)
        move(running_var + g, unbiased, rate_high, rate_low, is_first)
    if HAS_COUNTER:
        count_batch(counter, tl.program_id(0) == 0)
    factor = reciprocal_root(var, eps_high, eps_low, ACC)
    shift = tl.zeros((BK,), ACC)
    if HAS_WEIGHT:
        factor *= tl.load(weight + k // Q, mask=inside, other=0.0).to(ACC)
    if HAS_BIAS:
        shift = tl.load(bias + k // Q, mask=inside, other=0.0).to(ACC)
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
def reduce_groups_kernel(
    g_map, x, weight, mean, var, sums, group_sums,
    GN, GC, GP, SN, SC, SP, N, Q, L, E, J, G, ITEMS, SPANS, span, R, VAR_AT, CELL_ROW,
    plane, group_plane, eps_high, eps_low,
    HAS_WEIGHT: tl.constexpr, HAS_SUMS: tl.constexpr, HAS_GROUPS: tl.constexpr,
    BG: tl.constexpr, BJ: tl.constexpr, BL: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """``sum(g)`` and ``sum(g * unit)``, ``unit = (x - mean) / std``, of what each program sees.

    Of segments, rows ``(B, R, K)`` of two planes, for the parameters; of groups, weighed by the
    channels' scale, rows ``(B, R, G)``.
    """
    g, run, row, first, last = rows_of(N, G, E, ITEMS, SPANS, R, BG)
    n0 = run * E
    cell = run.to(tl.int64) * CELL_ROW + g
    high, low = split(tl.load(mean + cell, mask=g < G, other=0.0).to(tl.float64), ACC)
    wide = tl.load(var + VAR_AT + cell, mask=g < G, other=1.0)
    rstd = reciprocal_root(wide, eps_high, eps_low, ACC)
    of_group = tl.zeros((BG,), ACC)
    of_group_x = tl.zeros((BG,), ACC)
    out = (run * R + row).to(tl.int64)
    for j0 in range(0, J, BJ):
        j = j0 + tl.arange(0, BJ)
        inside = (g < G)[:, None] & (j < J)[None, :]
        k = g[:, None] * J + j[None, :]
        total = tl.zeros((BG, BJ, BL), ACC)
        total_x = tl.zeros((BG, BJ, BL), ACC)
        for item in range(first, last):
            start = (item % SPANS) * span
            stop = tl.minimum(start + span, L) // ALIGN * ALIGN
            n = n0 + item // SPANS
            rows = row_starts(n, k, SN, SC, SP, Q, L, WIDE, ALIGN)
            grads = row_starts(n, k, GN, GC, GP, Q, L, WIDE, ALIGN)
            for top in range(start, stop, BL):
                l = top + tl.arange(0, BL)
                mask = inside[:, :, None] & (l < stop)[None, None, :]
                at = rows[:, :, None] + columns(l, SP, WIDE)[None, None, :]
                grad_at = grads[:, :, None] + columns(l, GP, WIDE)[None, None, :]
                value = tl.load(x + at, mask=mask, other=0.0).to(ACC)
                grad = tl.load(g_map + grad_at, mask=mask, other=0.0).to(ACC)
                total += grad
                total_x += grad * ((value - high[:, None, None]) - low[:, None, None])
        found = tl.sum(total, axis=2)
        found_x = tl.sum(total_x, axis=2) * rstd[:, None]
        if HAS_SUMS:
            at = out * (G * J) + k
            tl.store(sums + at, found, mask=inside)
            tl.store(sums + plane + at, found_x, mask=inside)
        if HAS_GROUPS:
            if HAS_WEIGHT:
                scale = tl.load(weight + k // Q, mask=inside, other=0.0).to(ACC)
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
    table, plane, top, num_rows, width, at, inside,
    ACC: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Sums of rows of two planes at places ``at``, in a fixed order."""
    one = tl.zeros((BR, BK), ACC)
    two = tl.zeros((BR, BK), ACC)
    for first in range(0, num_rows, BR):
        r = first + tl.arange(0, BR)
        mask = (r < num_rows)[:, None] & inside[None, :]
        place_of = (top + r).to(tl.int64)[:, None] * width + at[None, :]
        one += tl.load(table + place_of, mask=mask, other=0.0)
        two += tl.load(table + plane + place_of, mask=mask, other=0.0)
    return tl.sum(one, axis=0), tl.sum(two, axis=0)


@triton.jit
def gradient_groups_kernel(
    g_map, x, dx, weight, mean, var, sums, group_sums, dweight, dbias,
    GN, GC, GP, SN, SC, SP, DN, DC, DP, N, K, Q, L, SPLITS, span, E, J, G, R, RUNS,
    VAR_AT, CELL_ROW, plane, group_plane, group_size, eps_high, eps_low,
    HAS_WEIGHT: tl.constexpr, HAS_GROUPS: tl.constexpr, ADDS: tl.constexpr,
    CONSTANT: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr, BR: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Gradient of the map; ``ADDS``: the first programs add up those of weight and bias.

    ``CONSTANT``: the statistics are given, so nothing flows through them, and x is not read.
    """
    n, part, k, inside = place(K, SPLITS, BK)
    run = n // E
    cell = run.to(tl.int64) * CELL_ROW + k // J
    wide = tl.load(var + VAR_AT + cell, mask=inside, other=1.0)
    rstd = reciprocal_root(wide, eps_high, eps_low, ACC)
    scale = tl.full((BK,), 1.0, ACC)
    if HAS_WEIGHT:
        scale = tl.load(weight + k // Q, mask=inside, other=0.0).to(ACC)
    if ADDS:  # noqa: SIM102 - the compiler's condition, then the program's
        if (n == 0) & (part == 0):
            of_bias, of_weight = summed_rows(
                sums, plane, 0, RUNS * R, K, k, inside, ACC, BK, BR
            )  # fmt: skip
            tl.store(dweight + k, of_weight, mask=inside)
            tl.store(dbias + k, of_bias, mask=inside)
    by_unit = tl.zeros((BK,), ACC)
    level = tl.zeros((BK,), ACC)
    if not CONSTANT:
        high, low = split(tl.load(mean + cell, mask=inside, other=0.0).to(tl.float64), ACC)
        if HAS_GROUPS:
            of_group, of_group_x = summed_rows(
                group_sums, group_plane, run * R, R, G, k // J, inside, ACC, BK, BR
            )  # fmt: skip
        else:
            of_group, of_group_x = summed_rows(
                sums, plane, run * R, R, K, k, inside, ACC, BK, BR
            )  # fmt: skip
            of_group *= scale
            of_group_x *= scale
        size = (tl.minimum(E, N - run * E) * group_size).to(ACC)
        by_unit = of_group_x * rstd * rstd / size
        level = of_group * rstd / size
    by_grad = scale * rstd
    rows = row_starts(n, k, SN, SC, SP, Q, L, WIDE, ALIGN)
    grads = row_starts(n, k, GN, GC, GP, Q, L, WIDE, ALIGN)
    outs = row_starts(n, k, DN, DC, DP, Q, L, WIDE, ALIGN)
    stop = tl.minimum(part * span + span, L) // ALIGN * ALIGN
    for first in range(part * span, stop, BL):
        l = first + tl.arange(0, BL)
        mask = inside[:, None] & (l < stop)[None, :]
        grad = tl.load(g_map + grads[:, None] + columns(l, GP, WIDE)[None, :], mask=mask, other=0.0)
        result = grad.to(ACC) * by_grad[:, None]
        if not CONSTANT:
            at = rows[:, None] + columns(l, SP, WIDE)[None, :]
            value = tl.load(x + at, mask=mask, other=0.0)
            unit = (value.to(ACC) - high[:, None]) - low[:, None]
            result = result - unit * by_unit[:, None] - level[:, None]
        tl.store(
            dx + outs[:, None] + columns(l, DP, WIDE)[None, :],
            result.to(dx.dtype.element_ty),
            mask=mask,
        )
