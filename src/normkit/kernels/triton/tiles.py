# triton declares what kernels call as never returning
# pyright: reportGeneralTypeIssues=false
"""Kernels for groups that fit a program: the map is read once and written once.

A program takes ``BG`` groups side by side, of ``E`` examples and ``J`` segments each: a block of
``(BG, BR, BL)`` elements, whose rows are the pairs of an example and a segment.
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
    sum_block,
)


@triton.jit
def block(
    N, G, E, J, L, BG: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """A program's run of examples and groups; its rows' examples and segments; what is inside."""
    tiles = tl.cdiv(G, BG)
    run = tl.program_id(0) // tiles
    g = (tl.program_id(0) % tiles) * BG + tl.arange(0, BG)
    row = tl.arange(0, BR)
    examples = tl.minimum(E, N - run * E)
    n = run * E + row // J
    k = g[:, None] * J + (row % J)[None, :]
    rows_inside = (g < G)[:, None] & (row < examples * J)[None, :]
    size = L // ALIGN * ALIGN  # L, and known to be a multiple: elements are then read together
    inside = rows_inside[:, :, None] & (tl.arange(0, BL) < size)[None, None, :]
    return run, g, n, k, rows_inside, inside, examples * J * L


@triton.jit
def of_rows(values, g, G, k, inside, Q, ACC: tl.constexpr, SINGLE: tl.constexpr):
    """A channel's value for each row; ``SINGLE``: for each group, which is then one segment."""
    if SINGLE:
        found = tl.load(values + g // Q, mask=g < G, other=0.0)[:, None]
    else:
        found = tl.load(values + k // Q, mask=inside, other=0.0)
    return found.to(ACC)


@triton.jit
def tile_forward_kernel(
    x, y, weight, bias, table, running_mean, running_var, counter, rate_high, rate_low,
    SN, SC, SP, YN, YC, YP, N, Q, L, E, J, G, num_cells,
    eps_high, eps_low,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RUNNING: tl.constexpr, HAS_COUNTER: tl.constexpr,
    BG: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Normalise groups; their means and variances go to ``table``, float64 ``(2, num_cells)``."""
    run, g, n, k, rows_inside, inside, size = block(N, G, E, J, L, BG, BR, BL, ALIGN)
    l = tl.arange(0, BL)
    rows = row_starts(n[None, :], k, SN, SC, SP, Q, L, WIDE, ALIGN)
    at = rows[:, :, None] + columns(l, SP, WIDE)[None, None, :]
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
    outs = row_starts(n[None, :], k, YN, YC, YP, Q, L, WIDE, ALIGN)
    out_at = outs[:, :, None] + columns(l, YP, WIDE)[None, None, :]
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
    g_map, x, dx, weight, table, sums, sums_x,
    GN, GC, GP, SN, SC, SP, DN, DC, DP, N, Q, L, E, J, G, K, num_cells, eps_high, eps_low,
    HAS_WEIGHT: tl.constexpr, BY_RUN: tl.constexpr, BY_ROW: tl.constexpr,
    BG: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Gradient of groups' elements, and the parts of the parameters' gradients.

    Sums of ``g`` and of ``g * (x - mean) / std`` go to tables ``(B, K)`` (``BY_RUN``, for groups of
    one segment) or ``(N, K)`` (``BY_ROW``).
    """
    run, g, n, k, rows_inside, inside, size = block(N, G, E, J, L, BG, BR, BL, ALIGN)
    l = tl.arange(0, BL)
    cell = run.to(tl.int64) * G + g
    high, low = split(tl.load(table + cell, mask=g < G, other=0.0), ACC)
    var = tl.load(table + num_cells + cell, mask=g < G, other=1.0)
    rstd = reciprocal_root(var, eps_high, eps_low, ACC)
    rows = row_starts(n[None, :], k, SN, SC, SP, Q, L, WIDE, ALIGN)
    at = rows[:, :, None] + columns(l, SP, WIDE)[None, None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(ACC)
    unit = ((value - high[:, None, None]) - low[:, None, None]) * rstd[:, None, None]
    unit = tl.where(inside, unit, 0.0)
    grads = row_starts(n[None, :], k, GN, GC, GP, Q, L, WIDE, ALIGN)
    grad_at = grads[:, :, None] + columns(l, GP, WIDE)[None, None, :]
    grad = tl.load(g_map + grad_at, mask=inside, other=0.0).to(ACC)
    if BY_RUN:
        out = run.to(tl.int64) * K + g
        tl.store(sums + out, sum_block(grad, BG, BR, BL), mask=g < G)
        tl.store(sums_x + out, sum_block(grad * unit, BG, BR, BL), mask=g < G)
    if BY_ROW:
        row_out = n.to(tl.int64)[None, :] * K + k
        tl.store(sums + row_out, tl.sum(grad, axis=2), mask=rows_inside)
        tl.store(sums_x + row_out, tl.sum(grad * unit, axis=2), mask=rows_inside)
    if HAS_WEIGHT:
        grad = grad * of_rows(weight, g, G, k, rows_inside, Q, ACC, SINGLE)[:, :, None]
    by_unit = sum_block(grad * unit, BG, BR, BL) / size
    shift = sum_block(grad, BG, BR, BL) / size
    result = grad - shift[:, None, None] - unit * by_unit[:, None, None]
    result = result * rstd[:, None, None]
    outs = row_starts(n[None, :], k, DN, DC, DP, Q, L, WIDE, ALIGN)
    out_at = outs[:, :, None] + columns(l, DP, WIDE)[None, None, :]
    tl.store(dx + out_at, result.to(dx.dtype.element_ty), mask=inside)
