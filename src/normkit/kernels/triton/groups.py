# triton declares that functions which kernels call never return, so pyright finds dead code
# pyright: reportGeneralTypeIssues=false
"""Forward kernels for groups that are too large for one program: two launches.

In the first launch each program measures a part of some groups, and stores these parts as one row
of a table. In the second launch each program pools the rows of the groups that it needs (they are
in the cache), and writes its part of the map. The first program of a group also writes the group's
statistics for backward and updates the running statistics. ``group_gradients`` has the kernels of
the backward pass.

The positions of an example are cut into ``SPANS`` stretches. A row belongs to ``ITEMS`` pairs of an
example and a stretch. A block is ``(BG, BJ, BL)``: groups, segments of a group, positions.
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
    sum_block,
)
from normkit.kernels.triton.endings import slope_of
from normkit.kernels.triton.streams import load_block, place, write_normalized


@triton.jit
def rows_of(N, G, E, ITEMS, SPANS, R, BG: tl.constexpr):
    """A program's groups, its run of examples, its row, and the pairs that it measures."""
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
    """Segments of groups from the ``first`` on, ``(BG, BJ)``, and a mask of those that exist.

    ``UNIT`` divides ``J``. It is written as a product, so that the compiler sees the divisor and
    reads neighbouring segments together.
    """
    num_segments = J // UNIT * UNIT
    j = first + tl.arange(0, BJ)
    inside = (g < G)[:, None] & (j < num_segments)[None, :]
    return g[:, None] * num_segments + j[None, :], inside


@triton.jit
def stretch(t, last, SPANS, span, L, STEPS, BL: tl.constexpr, ALIGN: tl.constexpr):
    """Example and first position of a program's block ``t``, and the end of its stretch.

    After the program's last pair the stretch is empty.
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
    """Load a block ``(BG, BJ, BL)`` from position ``top`` on; it is 0 from ``stop`` on."""
    l = top + tl.arange(0, BL)
    rows = row_starts(n, k, SN, SC, SP, Q, L, WIDE, ALIGN)
    at = rows[:, :, None] + columns(l, SP, WIDE)[None, None, :]
    return tl.load(x + at, mask=inside[:, :, None] & (l < stop)[None, None, :], other=0.0)


@triton.jit
def num_positions(first, last, SPANS, span, L):
    """Number of positions of all pairs of a program; an example's last stretch may be shorter."""
    whole = tl.cast(tl.maximum(last - first, 0), tl.int64) * span
    shorter = tl.maximum(last // SPANS - first // SPANS, 0)
    return whole - shorter * (tl.cast(SPANS, tl.int64) * span - L)


@triton.jit
def store_part(parts, plane, at, mask, high, low, square):
    """Store the three planes of a part: a mean in two numbers, squared deviations."""
    tl.store(parts + at, high, mask=mask)
    tl.store(parts + plane + at, low, mask=mask)
    tl.store(parts + 2 * plane + at, square, mask=mask)


@triton.jit
def store_size(pointer, size, g, ACC: tl.constexpr):
    """Store a row's number of elements; only the program of the first group does."""
    tl.store(pointer + g, (0 * g + size).to(ACC), mask=g == 0)


@triton.jit
def measure_groups_kernel(
    x, parts,
    SN, SC, SP, N, Q, L, E, J, G, ITEMS, SPANS, span, R, STEPS, TURNS, plane,
    BG: tl.constexpr, BJ: tl.constexpr, BL: tl.constexpr, FOLD: tl.constexpr,
    UNIT: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Store parts of groups in three planes ``(B, R, G)``: a mean in two numbers, its deviations.

    After the planes comes each row's number of elements, ``(B, R)``. A program takes the ``TURNS``
    blocks of its groups' segments at one stretch of positions, then those at the next stretch. Sums
    are taken around the mean of the first block, so a mean far from 0 costs no digits.
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
    store_part(parts, plane, out, g < G, shift, center, tl.where(spread < 0.0, 0.0, spread))
    store_size(parts + 3 * plane + at, size, g, ACC)


@triton.jit
def first_element(
    x, n0, k, inside, first, last, SN, SC, SP, Q, L, SPANS, span,
    ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The first element of each segment that a program reads."""
    at = row_starts(n0 + first // SPANS, k, SN, SC, SP, Q, L, WIDE, 1)
    at += columns((first % SPANS) * span, SP, WIDE)
    return tl.load(x + at, mask=inside & (first < last), other=0.0).to(ACC)


@triton.jit
def segment_moments(
    x, corner, n0, k, inside, first, last, SN, SC, SP, Q, L, SPANS, span,
    BG: tl.constexpr, BJ: tl.constexpr, BL: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Number, mean and squared deviations of a program's part of segments ``(BG, BJ)``.

    Every lane sums around its own first element, so nothing is divided before the end, and a mean
    far from 0 costs no digits. Means are relative to ``corner``, one element of each segment.
    """
    shift = tl.zeros((BG, BJ, BL), ACC) + corner[:, :, None]
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
    level = (shift - corner[:, :, None]) + total / tl.maximum(count, 1.0)
    within = square - total * (total / tl.maximum(count, 1.0))
    within = tl.where(within == within, tl.maximum(within, 0.0), within)  # noqa: PLR0124 - a NaN
    return pooled_parts(count, level, within, 2)


@triton.jit
def pooled_parts(size, level, square, axis: tl.constexpr):
    """Number, mean and squared deviations of the union of the parts along an axis."""
    whole = tl.sum(size, axis=axis)
    center = tl.sum(tl.where(size > 0.0, level * size, 0.0), axis=axis) / tl.maximum(whole, 1.0)
    away = level - tl.expand_dims(center, axis)
    spread = tl.where(size > 0.0, square + size * away * away, 0.0)
    return whole, center, tl.sum(spread, axis=axis)


@triton.jit
def measure_segments_kernel(
    x, parts, segment_parts,
    SN, SC, SP, N, Q, L, E, J, G, ITEMS, SPANS, span, R, STEPS, TURNS, plane, segment_plane,
    BG: tl.constexpr, BJ: tl.constexpr, BL: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Store parts of groups as ``measure_groups_kernel`` does, and of segments, ``(B, R, K)``."""
    g, run, row, first, last = rows_of(N, G, E, ITEMS, SPANS, R, BG)
    n0 = run * E
    corner = first_element(
        x, n0, g * J, g < G, first, last, SN, SC, SP, Q, L, SPANS, span, ACC, WIDE
    )
    size = tl.zeros((BG,), ACC)
    center = tl.zeros((BG,), ACC)
    square = tl.zeros((BG,), ACC)
    out = (run * R + row).to(tl.int64)
    for j0 in range(0, J, BJ):
        j = j0 + tl.arange(0, BJ)
        inside = (g < G)[:, None] & (j < J)[None, :]
        k = g[:, None] * J + j[None, :]
        high = first_element(
            x, n0, k, inside, first, last, SN, SC, SP, Q, L, SPANS, span, ACC, WIDE
        )
        sizes, levels, spreads = segment_moments(
            x, high, n0, k, inside, first, last, SN, SC, SP, Q, L, SPANS, span,
            BG, BJ, BL, ACC, WIDE, ALIGN,
        )  # fmt: skip
        at = out * (G * J) + k
        store_part(segment_parts, segment_plane, at, inside, high, levels, spreads)
        levels += high - corner[:, None]
        more, level, spread = pooled_parts(sizes, levels, spreads, 1)
        both = tl.maximum(size + more, 1.0)
        step = level - center
        square += spread + step * step * (size * more / both)
        center += step * (more / both)
        size += more
    store_part(parts, plane, out * G + g, g < G, corner, center, square)
    positions = num_positions(first, last, SPANS, span, L)
    store_size(parts + 3 * plane + out, positions * J, g, ACC)
    store_size(segment_parts + 3 * segment_plane + out, positions, g, ACC)


@triton.jit
def load_part(parts, plane, at, mask, which: tl.constexpr):
    """Load values of one plane."""
    return tl.load(parts + which * plane + at, mask=mask, other=0.0)


@triton.jit
def pooled_moments(
    parts, plane, top, num_rows, width, first_column, num_columns, inside,
    ACC: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Pool parts by the law of total variance: mean in two numbers, variance, number of elements.

    These are the parts in ``num_columns`` neighbouring columns of ``num_rows`` rows, from row
    ``top`` on; a row has ``width`` parts.
    """
    start = top.to(tl.int64) * width + first_column
    high = load_part(parts, plane, start, inside, 0)
    low = finite(load_part(parts, plane, start, inside, 1))
    size = tl.zeros((BR,), ACC)
    total = tl.zeros((BR, BK), ACC)
    square = tl.zeros((BR, BK), ACC)
    for first in range(0, num_rows * num_columns, BR):
        i = first + tl.arange(0, BR)
        there = i < num_rows * num_columns
        mask = there[:, None] & inside[None, :]
        at = start[None, :] + place_in_rows(i, width, num_columns)[:, None]
        count = load_part(parts, 3 * plane, top + i // num_columns, there, 1)
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
def place_in_rows(i, width, num_columns):
    """Index of the ``i``-th part, counted row by row, of ``num_columns`` columns."""
    return (i // num_columns).to(tl.int64) * width + i % num_columns


@triton.jit
def keep_moments(
    high, low, var, sizes, at, mask, table, num_cells, running_mean, running_var, rate_high,
    rate_low, channel,
    MOVES: tl.constexpr,
):  # fmt: skip
    """Store statistics in the table; with ``MOVES`` also update the running statistics by them."""
    mean = high.to(tl.float64) + low.to(tl.float64)
    tl.store(table + at, mean, mask=mask)
    tl.store(table + num_cells + at, var.to(tl.float64), mask=mask)
    if MOVES:
        size = sizes.to(tl.float64)
        unbiased = var.to(tl.float64) * (size / tl.maximum(size - 1.0, 1.0))
        move(running_mean + channel, mean, rate_high, rate_low, mask)
        move(running_var + channel, unbiased, rate_high, rate_low, mask)


@triton.jit
def normalize_groups_kernel(
    x, y, weight, bias, parts, segment_parts, table, running_mean, running_var, counter,
    rate_high, rate_low, residual,
    SN, SC, SP, YN, YC, YP, RN, RC, RP, K, Q, L, SPLITS, span, E, J, G, R, RUNS, plane,
    segment_plane, num_cells, eps_high, eps_low, slope_high, slope_low,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RUNNING: tl.constexpr,
    HAS_COUNTER: tl.constexpr, HAS_CHANNELS: tl.constexpr,
    ADDED: tl.constexpr, ACT: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr,
    BR: tl.constexpr, FOLD: tl.constexpr, ONCE: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Pool parts, normalise, scale, shift, add a residual (``ADDED``) and activate (``ACT``).

    The kernel also stores the table of statistics and updates running statistics. With
    ``HAS_CHANNELS`` the table has, after the groups, the statistics of each channel over the whole
    batch, and the running statistics are updated by these.
    """
    n, part, k, inside = place(K, SPLITS, BK)
    rows = row_starts(n, k, SN, SC, SP, Q, L, WIDE, ALIGN)
    outs = row_starts(n, k, YN, YC, YP, Q, L, WIDE, ALIGN)
    start = part * span
    stop = tl.minimum(start + span, L) // ALIGN * ALIGN
    value = load_block(x, rows, start, stop, inside, SP, BL, WIDE)
    run = n // E
    g = k // J
    high, low, var, sizes = pooled_moments(
        parts, plane, run * R, R, G, g, 1, inside, ACC, BK, BR
    )  # fmt: skip
    is_first = inside & (k % J == 0) & (n == run * E) & (part == 0)
    keep_moments(
        high, low, var, sizes, run.to(tl.int64) * G + g, is_first, table, num_cells,
        running_mean, running_var, rate_high, rate_low, g, HAS_RUNNING and not HAS_CHANNELS,
    )  # fmt: skip
    if HAS_CHANNELS:  # noqa: SIM102 - the compiler's condition, then the program's
        if (n == 0) & (part == 0):
            starts = inside & (k % Q == 0)
            c_high, c_low, c_var, c_sizes = pooled_moments(
                segment_parts, segment_plane, 0 * n, RUNS * R, K, k, Q, starts, ACC, BK, BR
            )  # fmt: skip
            keep_moments(
                c_high, c_low, c_var, c_sizes, RUNS * G + k // Q, starts, table, num_cells,
                running_mean, running_var, rate_high, rate_low, k // Q, HAS_RUNNING,
            )  # fmt: skip
    if HAS_COUNTER:
        count_batch(counter, tl.program_id(0) == 0)
    factor = reciprocal_root(var, eps_high, eps_low, ACC)
    shift = tl.zeros((BK,), ACC)
    if HAS_WEIGHT:
        factor *= tl.load(weight + k // Q, mask=inside, other=0.0).to(ACC)
    if HAS_BIAS:
        shift = tl.load(bias + k // Q, mask=inside, other=0.0).to(ACC)
    adds = row_starts(n, k, RN, RC, RP, Q, L, WIDE, ALIGN)
    slope = slope_of(slope_high, slope_low, ACC)
    write_normalized(
        x, y, residual, value, rows, outs, adds, start, stop, inside, SP, YP, RP,
        high, low, factor, shift, slope, ADDED, ACT, BL, ONCE, ACC, WIDE,
    )  # fmt: skip
