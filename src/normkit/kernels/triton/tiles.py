# triton declares that functions which kernels call never return, so pyright finds dead code
# pyright: reportGeneralTypeIssues=false
"""Kernels for groups that fit a program: they read the map once and write it once.

A program takes ``BG`` groups side by side, of ``E`` examples and ``J`` segments each: a block of
``(BG, BR, BL)`` elements, whose rows are the pairs of an example and a segment.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton.device import (
    columns,
    count_batch,
    load_or,
    move,
    reciprocal_root,
    row_starts,
    split,
    sum_block,
)
from normkit.kernels.triton.endings import activated, gradient_of_sum, slope_of


@triton.jit
def block(
    N, G, E, J, L, BG: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """A program's run of examples and groups, its rows' examples and segments, and masks."""
    tiles = tl.cdiv(G, BG)
    run = tl.program_id(0) // tiles
    g = (tl.program_id(0) % tiles) * BG + tl.arange(0, BG)
    row = tl.arange(0, BR)
    examples = tl.minimum(E, N - run * E)
    n = run * E + row // J
    k = g[:, None] * J + (row % J)[None, :]
    rows_inside = (g < G)[:, None] & (row < examples * J)[None, :]
    size = L // ALIGN * ALIGN  # equals L; tells the compiler that ALIGN divides it
    inside = rows_inside[:, :, None] & (tl.arange(0, BL) < size)[None, None, :]
    return run, g, n, k, rows_inside, inside, examples * J * L


@triton.jit
def of_rows(values, g, G, k, inside, Q, ACC: tl.constexpr, SINGLE: tl.constexpr):
    """A channel's value for each row; with ``SINGLE`` for each group, which is one segment."""
    if SINGLE:
        found = tl.load(values + g // Q, mask=g < G, other=0.0)[:, None]
    else:
        found = tl.load(values + k // Q, mask=inside, other=0.0)
    return found.to(ACC)


@triton.jit
def of_rows_or(
    HAS: tl.constexpr, default: tl.constexpr, values, g, G, k, inside, Q,
    BG: tl.constexpr, ACC: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """The values of ``of_rows`` in a shape that broadcasts to a block, or ``default``."""
    found = tl.full((BG, 1), default, ACC)
    if HAS:
        found = of_rows(values, g, G, k, inside, Q, ACC, SINGLE)
    return found[:, :, None]


@triton.jit
def places(n, k, l, SN, SC, SP, Q, L, WIDE: tl.constexpr, ALIGN: tl.constexpr):
    """Addresses of a block's elements in a map."""
    rows = row_starts(n[None, :], k, SN, SC, SP, Q, L, WIDE, ALIGN)
    return rows[:, :, None] + columns(l, SP, WIDE)[None, None, :]


@triton.jit
def tile_forward_kernel(
    x, y, weight, bias, table, running_mean, running_var, counter, rate_high, rate_low, residual,
    SN, SC, SP, YN, YC, YP, RN, RC, RP, N, Q, L, E, J, G, num_cells,
    eps_high, eps_low, slope_high, slope_low,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RUNNING: tl.constexpr, HAS_COUNTER: tl.constexpr,
    ADDED: tl.constexpr, ACT: tl.constexpr,
    BG: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Normalise groups; their means and variances go to ``table``, float64 ``(2, num_cells)``.

    Then add a residual (``ADDED``) and apply an activation (``ACT``).
    """
    run, g, n, k, rows_inside, inside, size = block(N, G, E, J, L, BG, BR, BL, ALIGN)
    l = tl.arange(0, BL)
    at = places(n, k, l, SN, SC, SP, Q, L, WIDE, ALIGN)
    value = tl.load(x + at, mask=inside, other=0.0).to(ACC)
    corner = row_starts(run * E, g * J, SN, SC, SP, Q, L, WIDE, 1)
    shift = tl.load(x + corner, mask=g < G, other=0.0).to(ACC)
    moved = tl.where(inside, value - shift[:, None, None], 0.0)
    center = sum_block(moved, BG, BR, BL) / size
    unit = tl.where(inside, moved - center[:, None, None], 0.0)
    var = (sum_block(unit * unit, BG, BR, BL) / size).to(tl.float64)
    mean = shift.to(tl.float64) + center.to(tl.float64)
    factor = reciprocal_root(var, eps_high, eps_low, ACC)[:, None]
    if HAS_WEIGHT:
        factor = factor * of_rows(weight, g, G, k, rows_inside, Q, ACC, SINGLE)
    result = unit * factor[:, :, None]
    if HAS_BIAS:
        result += of_rows(bias, g, G, k, rows_inside, Q, ACC, SINGLE)[:, :, None]
    if ADDED:
        added_at = places(n, k, l, RN, RC, RP, Q, L, WIDE, ALIGN)
        result += tl.load(residual + added_at, mask=inside, other=0.0).to(ACC)
    result = activated(result, slope_of(slope_high, slope_low, ACC), ACT)
    out_at = places(n, k, l, YN, YC, YP, Q, L, WIDE, ALIGN)
    tl.store(y + out_at, result.to(y.dtype.element_ty), mask=inside)
    cell = run.to(tl.int64) * G + g
    tl.store(table + cell, mean, mask=g < G)
    tl.store(table + num_cells + cell, var, mask=g < G)
    if HAS_RUNNING:
        unbiased = var * (size.to(tl.float64) / tl.maximum(size - 1, 1).to(tl.float64))
        move(running_mean + g, mean, rate_high, rate_low, g < G)
        move(running_var + g, unbiased, rate_high, rate_low, g < G)
    if HAS_COUNTER:
        count_batch(counter, tl.program_id(0) == 0)


@triton.jit
def tile_backward_kernel(
    g_map, x, dx, weight, bias, table, sums, sums_x, added_map, passed,
    GN, GC, GP, SN, SC, SP, DN, DC, DP, RN, RC, RP, N, Q, L, E, J, G, K, num_cells,
    eps_high, eps_low, slope_high, slope_low,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BY_RUN: tl.constexpr, BY_ROW: tl.constexpr,
    ADDED: tl.constexpr, ACT: tl.constexpr, PASSES: tl.constexpr,
    BG: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Gradient of groups' elements, and the parts of the parameters' gradients.

    Sums of ``g`` and of ``g * (x - mean) / std`` go to tables ``(B, K)`` (``BY_RUN``, for groups of
    one segment) or ``(N, K)`` (``BY_ROW``). ``PASSES`` stores the gradient of the activation's
    input in ``passed``, which has the layout of ``dx``.
    """
    run, g, n, k, rows_inside, inside, size = block(N, G, E, J, L, BG, BR, BL, ALIGN)
    l = tl.arange(0, BL)
    cell = run.to(tl.int64) * G + g
    high, low = split(tl.load(table + cell, mask=g < G, other=0.0), ACC)
    var = tl.load(table + num_cells + cell, mask=g < G, other=1.0)
    rstd = reciprocal_root(var, eps_high, eps_low, ACC)
    at = places(n, k, l, SN, SC, SP, Q, L, WIDE, ALIGN)
    value = tl.load(x + at, mask=inside, other=0.0).to(ACC)
    unit = ((value - high[:, None, None]) - low[:, None, None]) * rstd[:, None, None]
    unit = tl.where(inside, unit, 0.0)
    grad_at = places(n, k, l, GN, GC, GP, Q, L, WIDE, ALIGN)
    grad = tl.load(g_map + grad_at, mask=inside, other=0.0).to(ACC)
    scale = of_rows_or(HAS_WEIGHT, 1.0, weight, g, G, k, rows_inside, Q, BG, ACC, SINGLE)
    shift = of_rows_or(HAS_BIAS, 0.0, bias, g, G, k, rows_inside, Q, BG, ACC, SINGLE)
    added_at = places(n, k, l, RN, RC, RP, Q, L, WIDE, ALIGN)
    added = load_or(ADDED > 0, grad, added_map, added_at, inside)
    slope = slope_of(slope_high, slope_low, ACC)
    grad = gradient_of_sum(grad, unit * scale + shift, added, slope, ADDED, ACT)
    out_at = places(n, k, l, DN, DC, DP, Q, L, WIDE, ALIGN)
    if PASSES:
        tl.store(passed + out_at, grad.to(passed.dtype.element_ty), mask=inside)
    if BY_RUN:
        out = run.to(tl.int64) * K + g
        tl.store(sums + out, sum_block(grad, BG, BR, BL), mask=g < G)
        tl.store(sums_x + out, sum_block(grad * unit, BG, BR, BL), mask=g < G)
    if BY_ROW:
        row_out = n.to(tl.int64)[None, :] * K + k
        tl.store(sums + row_out, tl.sum(grad, axis=2), mask=rows_inside)
        tl.store(sums_x + row_out, tl.sum(grad * unit, axis=2), mask=rows_inside)
    grad = grad * scale
    by_unit = sum_block(grad * unit, BG, BR, BL) / size
    level = sum_block(grad, BG, BR, BL) / size
    result = grad - level[:, None, None] - unit * by_unit[:, None, None]
    result = result * rstd[:, None, None]
    tl.store(dx + out_at, result.to(dx.dtype.element_ty), mask=inside)
