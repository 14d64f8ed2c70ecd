# triton declares that functions which kernels call never return, so pyright finds dead code
# pyright: reportGeneralTypeIssues=false
"""Kernels for statistics across the channels of a position.

A program takes all channels of some positions of one example, in blocks ``(BC, BP)``. The backward
kernel reads only ``x`` and computes its statistics again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton.device import columns, load_or, reciprocal_root
from normkit.kernels.triton.endings import activated, gradient_of_sum, slope_of


@triton.jit
def channel_starts(n, c, SN, SC, WIDE: tl.constexpr):
    """Address of the first position of channel ``c`` of example ``n``."""
    if WIDE:
        n = tl.cast(n, tl.int64)
        c = tl.cast(c, tl.int64)
    return n * SN + c * SC


@triton.jit
def standardized(
    x, SN, SC, SP, n, c, l, inside, C, eps_high, eps_low, ACC: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """A standardised block of ``x``, and each position's mean, variance and ``1 / std``."""
    at = channel_starts(n, c, SN, SC, WIDE)[:, None] + columns(l, SP, WIDE)[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(ACC)
    some = tl.sum(tl.where((c == 0)[:, None], value, 0.0), axis=0)
    moved = tl.where(inside, value - some[None, :], 0.0)
    center = tl.sum(moved, axis=0) / C
    apart = tl.where(inside, moved - center[None, :], 0.0)
    var = tl.sum(apart * apart, axis=0) / C
    rstd = reciprocal_root(var, eps_high, eps_low, ACC)
    return apart * rstd[None, :], some.to(tl.float64) + center.to(tl.float64), var, rstd


@triton.jit
def place(P, BP: tl.constexpr):
    """Example and positions of a program."""
    tiles = tl.cdiv(P, BP)
    return tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BP + tl.arange(0, BP)


@triton.jit
def positions_forward_kernel(
    x, y, weight, bias, mean, var, residual,
    SN, SC, SP, YN, YC, YP, RN, RC, RP, C, P, eps_high, eps_low, slope_high, slope_low,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ADDED: tl.constexpr, ACT: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Normalise positions; their means and variances go to float64 tables ``(N * P,)``.

    Then add a residual (``ADDED``) and apply an activation (``ACT``).
    """
    n, l = place(P, BP)
    c = tl.arange(0, BC)
    inside = (c < C)[:, None] & (l < P)[None, :]
    result, center, spread, _ = standardized(
        x, SN, SC, SP, n, c, l, inside, C, eps_high, eps_low, ACC, WIDE
    )
    if HAS_WEIGHT:
        result = result * tl.load(weight + c, mask=c < C, other=0.0).to(ACC)[:, None]
    if HAS_BIAS:
        result = result + tl.load(bias + c, mask=c < C, other=0.0).to(ACC)[:, None]
    added_at = channel_starts(n, c, RN, RC, WIDE)[:, None] + columns(l, RP, WIDE)[None, :]
    result += load_or(ADDED > 0, tl.zeros((BC, BP), ACC), residual, added_at, inside)
    result = activated(result, slope_of(slope_high, slope_low, ACC), ACT)
    at = channel_starts(n, c, YN, YC, WIDE)[:, None] + columns(l, YP, WIDE)[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + n.to(tl.int64) * P + l, center, mask=l < P)
    tl.store(var + n.to(tl.int64) * P + l, spread.to(tl.float64), mask=l < P)


@triton.jit
def positions_backward_kernel(
    g, x, dx, weight, bias, sums, sums_x, added_map, passed,
    GN, GC, GP, SN, SC, SP, DN, DC, DP, RN, RC, RP, C, P, ITEMS, num_items,
    eps_high, eps_low, slope_high, slope_low,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, NEEDS_SUMS: tl.constexpr,
    ADDED: tl.constexpr, ACT: tl.constexpr, PASSES: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient of ``x``, and each program's part of the parameters' gradients, ``(programs, C)``.

    A program takes ``ITEMS`` blocks one after another, so that there are few parts to add up.
    ``PASSES`` stores the gradient of the activation's input in ``passed``, in the layout of ``dx``.
    """
    tiles = tl.cdiv(P, BP)
    c = tl.arange(0, BC)
    total = tl.zeros((BC,), ACC)
    total_x = tl.zeros((BC,), ACC)
    scale = tl.full((BC,), 1.0, ACC)
    if HAS_WEIGHT:
        scale = tl.load(weight + c, mask=c < C, other=0.0).to(ACC)
    shift = load_or(HAS_BIAS, tl.zeros((BC,), ACC), bias, c, c < C)
    slope = slope_of(slope_high, slope_low, ACC)
    first = tl.program_id(0) * ITEMS
    for item in range(first, tl.minimum(first + ITEMS, num_items)):
        n = item // tiles
        l = (item % tiles) * BP + tl.arange(0, BP)
        inside = (c < C)[:, None] & (l < P)[None, :]
        unit, _, _, rstd = standardized(
            x, SN, SC, SP, n, c, l, inside, C, eps_high, eps_low, ACC, WIDE
        )
        at = channel_starts(n, c, GN, GC, WIDE)[:, None] + columns(l, GP, WIDE)[None, :]
        grad = tl.load(g + at, mask=inside, other=0.0).to(ACC)
        added_at = channel_starts(n, c, RN, RC, WIDE)[:, None] + columns(l, RP, WIDE)[None, :]
        added = load_or(ADDED > 0, grad, added_map, added_at, inside)
        value = unit * scale[:, None] + shift[:, None]
        grad = gradient_of_sum(grad, value, added, slope, ADDED, ACT)
        out_at = channel_starts(n, c, DN, DC, WIDE)[:, None] + columns(l, DP, WIDE)[None, :]
        if PASSES:
            tl.store(passed + out_at, grad.to(passed.dtype.element_ty), mask=inside)
        if NEEDS_SUMS:
            total += tl.sum(grad, axis=1)
            total_x += tl.sum(grad * unit, axis=1)
        if HAS_WEIGHT:
            grad = grad * scale[:, None]
        along = tl.sum(grad * unit, axis=0) / C
        level = tl.sum(grad, axis=0) / C
        result = (grad - level[None, :] - unit * along[None, :]) * rstd[None, :]
        tl.store(dx + out_at, result.to(dx.dtype.element_ty), mask=inside)
    if NEEDS_SUMS:
        out = tl.program_id(0).to(tl.int64) * C + c
        tl.store(sums + out, total, mask=c < C)
        tl.store(sums_x + out, total_x, mask=c < C)
