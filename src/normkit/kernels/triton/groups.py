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
    finite,
    folded_block,
    move,
    reciprocal_root,
    row_starts,
    split,
    sum_block,
)
from normkit.kernels.triton.streams import load_block, load_unless, place, store_block


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
def segments_of(g, first, G, J, BJ: tl.constexpr, UNIT: tl.constexpr):
    """Segments ``first`` and on of groups, ``(BG, BJ)``, and which there are.

    ``UNIT`` divides ``J``: said as a product, for then segments side by side are read together.
    """
    num_segments = J // UNIT * UNIT
    j = first + tl.arange(0, BJ)
    inside = (g < G)[:, None] & (j < num_segments)[None, :]
    return g[:, None] * num_segments + j[None, :], inside


@triton.jit
def stretch(t, last, SPANS, span, L, STEPS, BL: tl.constexpr, ALIGN: tl.constexpr):
    """Where block ``t`` of a program begins: example, first position, and where its stretch ends.

    Beyond the last pair nothing is left: its stretch ends at once.
    """
    item = t // STEPS
    start = (item % SPANS) * span
    stop = tl.where(item < last, tl.minimum(start + span, L), 0) // ALIGN * ALIGN
    return item // SPANS, start + (t % STEPS) * BL, stop


@triton.jit
def load_groups(
    x, n, k, inside, top, stop, SN, SC, SP, Q, L,
    BL: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A block ``(BG, BJ, BL)`` of a map, from position ``top`` on; 0 from ``stop`` on."""
    l = top + tl.arange(0, BL)
    rows = row_starts(n, k, SN, SC, SP, Q, L, WIDE, ALIGN)
    at = rows[:, :, None] + columns(l, SP, WIDE)[None, None, :]
    return tl.load(x + at, mask=inside[:, :, None] & (l < stop)[None, None, :], other=0.0)


@triton.jit
def num_positions(first, last, SPANS, span, L):
    """Positions of all pairs of a program; the last stretch of an example is shorter."""
    whole = tl.cast(tl.maximum(last - first, 0), tl.int64) * span
    shorter = tl.maximum(last // SPANS - first // SPANS, 0)
    return whole - shorter * (tl.cast(SPANS, tl.int64) * span - L)


@triton.jit
def measure_groups_kernel(
    x, parts,
    SN, SC, SP, N, Q, L, E, J, G, ITEMS, SPANS, span, R, STEPS, TURNS, plane,
    BG: tl.constexpr, BJ: tl.constexpr, BL: tl.constexpr, FOLD: tl.constexpr,
    UNIT: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows ``(B, R, G)`` of three planes, a mean as two summands and squared deviations.

    Behind them each row's number of elements, ``(B, R)``. A program takes the ``TURNS`` blocks of
    its groups' segments at a stretch of positions, then the next stretch. Sums are taken around the
    mean of the first block, so a mean far from 0 costs no digits.
    """
    g, run, row, first, last = rows_of(N, G, E, ITEMS, SPANS, R, BG)
    n0 = run * E
    lane = tl.arange(0, BL)
    n, top, stop = stretch(first * STEPS, last, SPANS, span, L, STEPS, BL, ALIGN)
    k, inside = segments_of(g, 0, G, J, BJ, UNIT)
    value = load_groups(x, n0 + n, k, inside, top, stop, SN, SC, SP, Q, L, BL, WIDE, ALIGN)
    cells = tl.maximum(tl.minimum(stop - top, BL) * tl.minimum(J, BJ), 1).to(ACC)
    shift = finite(sum_block(value.to(ACC) * (1.0 / cells), BG, BJ, BL))
    total = tl.zeros((BG, BJ, BL // FOLD), ACC)
    square = tl.zeros((BG, BJ, BL // FOLD), ACC)
    for t in range(first * STEPS * TURNS, last * STEPS * TURNS):
        mask = inside[:, :, None] & (top + lane < stop)[None, None, :]
        n, top, stop = stretch((t + 1) // TURNS, last, SPANS, span, L, STEPS, BL, ALIGN)
        k, inside = segments_of(g, (t + 1) % TURNS * BJ, G, J, BJ, UNIT)
        ahead = load_groups(x, n0 + n, k, inside, top, stop, SN, SC, SP, Q, L, BL, WIDE, ALIGN)
        apart = tl.where(mask, value.to(ACC) - shift[:, None, None], 0.0)
        total += folded_block(apart, BG, BJ, BL, FOLD)
        square += folded_block(apart * apart, BG, BJ, BL, FOLD)
        value = ahead
    size = (num_positions(first, last, SPANS, span, L) * J).to(ACC)
    sums = sum_block(total, BG, BJ, BL // FOLD)
    center = sums / tl.maximum(size, 1.0)
    spread = sum_block(square, BG, BJ, BL // FOLD) - sums * center
    at = run * R + row
    out = at.to(tl.int64) * G + g
    tl.store(parts + out, shift, mask=g < G)
    tl.store(parts + plane + out, center, mask=g < G)
    tl.store(parts + 2 * plane + out, tl.where(spread < 0.0, 0.0, spread), mask=g < G)
    tl.store(parts + 3 * plane + at + g, size, mask=g == 0)


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
    low = finite(load_part(parts, plane, top + g, inside, 1))
    size = tl.zeros((BR,), ACC)
    total = tl.zeros((BR, BK), ACC)
    square = tl.zeros((BR, BK), ACC)
    for first in range(0, R, BR):
        r = first + tl.arange(0, BR)
        mask = (r < R)[:, None] & inside[None, :]
        at = top + r[:, None] * G + g[None, :]
        count = load_part(parts, 3 * plane, run * R + r, r < R, 1)
        apart = load_part(parts, plane, at, mask, 0) - high[None, :]
        apart += load_part(parts, plane, at, mask, 1) - low[None, :]
        weighed = tl.where(mask & (count > 0.0)[:, None], count[:, None] * apart, 0.0)
        size += count
        total += weighed
        square += load_part(parts, plane, at, mask, 2) + weighed * apart
    sizes = tl.maximum(tl.sum(size, axis=0), 1.0)
    center = tl.sum(total, axis=0) / sizes
    spread = tl.sum(square, axis=0) / sizes - center * center
    return high, low + center, tl.where(spread < 0.0, 0.0, spread), sizes


@triton.jit
def normalize_groups_kernel(
    x, y, weight, bias, parts, table, running_mean, running_var, counter, rate_high, rate_low,
    SN, SC, SP, YN, YC, YP, K, Q, L, SPLITS, span, E, J, G, R, plane, num_cells,
    eps_high, eps_low,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RUNNING: tl.constexpr,
    HAS_COUNTER: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr, BR: tl.constexpr,
    FOLD: tl.constexpr, ONCE: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Pool, normalise, scale and shift; the table's cells and running statistics on the way."""
    n, part, k, inside = place(K, SPLITS, BK)
    rows = row_starts(n, k, SN, SC, SP, Q, L, WIDE, ALIGN)
    outs = row_starts(n, k, YN, YC, YP, Q, L, WIDE, ALIGN)
    start = part * span
    stop = tl.minimum(start + span, L) // ALIGN * ALIGN
    value = load_block(x, rows, start, stop, inside, SP, BL, WIDE)
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
    for block in range(1 if ONCE else tl.cdiv(stop - start, BL)):
        first = start + block * BL
        ahead = load_unless(ONCE, value, x, rows, first + BL, stop, inside, SP, BL, WIDE)
        unit = (value.to(ACC) - high[:, None]) - low[:, None]
        result = unit * factor[:, None] + shift[:, None]
        store_block(y, result, outs, first, stop, inside, YP, BL, WIDE)
        value = ahead


@triton.jit
def reduce_groups_kernel(
    g_map, x, weight, mean, var, sums, group_sums,
    GN, GC, GP, SN, SC, SP, N, Q, L, E, J, G, ITEMS, SPANS, span, R, STEPS, TURNS, VAR_AT, CELL_ROW,
    plane, group_plane, eps_high, eps_low,
    HAS_WEIGHT: tl.constexpr, HAS_SUMS: tl.constexpr, HAS_GROUPS: tl.constexpr,
    BG: tl.constexpr, BJ: tl.constexpr, BL: tl.constexpr, FOLD: tl.constexpr,
    UNIT: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``sum(g)`` and ``sum(g * unit)``, ``unit = (x - mean) / std``, of what each program sees.

    Of segments, rows ``(B, R, K)`` of two planes, for the parameters; of groups, weighed by the
    channels' scale, rows ``(B, R, G)``.
    """
    g, run, row, first, last = rows_of(N, G, E, ITEMS, SPANS, R, BG)
    n0 = run * E
    cell = run.to(tl.int64) * CELL_ROW + g
    high, low = split(tl.load(mean + cell, mask=g < G, other=0.0).to(tl.float64), ACC)
    spread = tl.load(var + VAR_AT + cell, mask=g < G, other=1.0)
    rstd = reciprocal_root(spread, eps_high, eps_low, ACC)
    of_group = tl.zeros((BG,), ACC)
    of_group_x = tl.zeros((BG,), ACC)
    out = (run * R + row).to(tl.int64)
    for j0 in range(0, J, BJ):
        k, inside = segments_of(g, j0, G, J, BJ, UNIT)
        n, top, stop = stretch(first * STEPS, last, SPANS, span, L, STEPS, BL, ALIGN)
        value = load_groups(x, n0 + n, k, inside, top, stop, SN, SC, SP, Q, L, BL, WIDE, ALIGN)
        grad = load_groups(g_map, n0 + n, k, inside, top, stop, GN, GC, GP, Q, L, BL, WIDE, ALIGN)
        total = tl.zeros((BG, BJ, BL // FOLD), ACC)
        total_x = tl.zeros((BG, BJ, BL // FOLD), ACC)
        for t in range(first * STEPS, last * STEPS):
            n, top, stop = stretch(t + 1, last, SPANS, span, L, STEPS, BL, ALIGN)
            value_ahead = load_groups(
                x, n0 + n, k, inside, top, stop, SN, SC, SP, Q, L, BL, WIDE, ALIGN
            )
            grad_ahead = load_groups(
                g_map, n0 + n, k, inside, top, stop, GN, GC, GP, Q, L, BL, WIDE, ALIGN
            )
            wide = grad.to(ACC)
            unit = (value.to(ACC) - high[:, None, None]) - low[:, None, None]
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
def sums_of_groups(
    sums, group_sums, plane, group_plane, top, num_rows, K, G, k, J, scale, inside,
    HAS_GROUPS: tl.constexpr, ACC: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Of the groups that segments belong to, weighed by the channels' scale."""
    if HAS_GROUPS:
        of_group, of_group_x = summed_rows(
            group_sums, group_plane, top, num_rows, G, k // J, inside, ACC, BK, BR
        )
    else:
        of_group, of_group_x = summed_rows(
            sums, plane, top, num_rows, K, k, inside, ACC, BK, BR
        )  # fmt: skip
        of_group *= scale
        of_group_x *= scale
    return of_group, of_group_x


@triton.jit
def gradient_groups_kernel(
    g_map, x, dx, weight, mean, var, sums, group_sums, dweight, dbias,
    GN, GC, GP, SN, SC, SP, DN, DC, DP, N, K, Q, L, SPLITS, span, E, J, G, R, RUNS,
    VAR_AT, CELL_ROW, plane, group_plane, group_size, eps_high, eps_low,
    HAS_WEIGHT: tl.constexpr, HAS_GROUPS: tl.constexpr, ADDS: tl.constexpr,
    CONSTANT: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr, BR: tl.constexpr,
    FOLD: tl.constexpr, ONCE: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Gradient of the map; ``ADDS``: the first programs add up those of weight and bias.

    ``CONSTANT``: the statistics are given, so nothing flows through them, and x is not read.
    """
    n, part, k, inside = place(K, SPLITS, BK)
    rows = row_starts(n, k, SN, SC, SP, Q, L, WIDE, ALIGN)
    grads = row_starts(n, k, GN, GC, GP, Q, L, WIDE, ALIGN)
    outs = row_starts(n, k, DN, DC, DP, Q, L, WIDE, ALIGN)
    start = part * span
    stop = tl.minimum(start + span, L) // ALIGN * ALIGN
    grad = load_block(g_map, grads, start, stop, inside, GP, BL, WIDE)
    value = load_unless(CONSTANT, grad, x, rows, start, stop, inside, SP, BL, WIDE)
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
        of_group, of_group_x = sums_of_groups(
            sums, group_sums, plane, group_plane, run * R, R, K, G, k, J, scale, inside,
            HAS_GROUPS, ACC, BK, BR,
        )  # fmt: skip
        size = (tl.minimum(E, N - run * E) * group_size).to(ACC)
        by_unit = of_group_x * rstd * rstd / size
        level = of_group * rstd / size
    by_grad = scale * rstd
    for block in range(1 if ONCE else tl.cdiv(stop - start, BL)):
        first = start + block * BL
        grad_ahead = load_unless(ONCE, grad, g_map, grads, first + BL, stop, inside, GP, BL, WIDE)
        ahead = load_unless(
            ONCE or CONSTANT, value, x, rows, first + BL, stop, inside, SP, BL, WIDE
        )
        result = grad.to(ACC) * by_grad[:, None]
        if not CONSTANT:
            unit = (value.to(ACC) - high[:, None]) - low[:, None]
            result = result - unit * by_unit[:, None] - level[:, None]
        store_block(dx, result, outs, first, stop, inside, DP, BL, WIDE)
        value = ahead
        grad = grad_ahead
