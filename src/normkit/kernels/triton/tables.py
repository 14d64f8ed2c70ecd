"""Kernels on tables, which run between the passes over a map.

All tables of moments are float64. A program takes ``BK`` columns and ``BR`` rows at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def part_size(i, SPLITS, span, L):
    """Number of elements of the part of a segment in row ``i`` of a table of parts."""
    return tl.minimum(span, L - (i % SPLITS) * span).to(tl.float64)


@triton.jit
def pool_rows_kernel(
    mean, var, out_mean, out_var, SPLITS, span, L, K, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Pool the parts of segments, ``(N, SPLITS, K)``, into ``(N, K)``."""
    tiles = tl.cdiv(K, BK)
    example = tl.program_id(0) // tiles
    k = (tl.program_id(0) % tiles) * BK + tl.arange(0, BK)
    top = example.to(tl.int64) * SPLITS
    lane = tl.arange(0, BR)
    total = tl.zeros((BR, BK), tl.float64)
    for first in range(0, SPLITS, BR):
        i = first + lane
        mask = (i < SPLITS)[:, None] & (k < K)[None, :]
        at = (top + i)[:, None] * K + k[None, :]
        total += tl.load(mean + at, mask=mask, other=0.0) * part_size(i, SPLITS, span, L)[:, None]
    center = tl.sum(total, axis=0) / L
    total = tl.zeros((BR, BK), tl.float64)
    for first in range(0, SPLITS, BR):
        i = first + lane
        mask = (i < SPLITS)[:, None] & (k < K)[None, :]
        at = (top + i)[:, None] * K + k[None, :]
        apart = tl.load(mean + at, mask=mask, other=0.0) - center[None, :]
        within = tl.load(var + at, mask=mask, other=0.0)
        both = (within + apart * apart) * part_size(i, SPLITS, span, L)[:, None]
        total += tl.where(mask, both, 0.0)
    out = example.to(tl.int64) * K + k
    tl.store(out_mean + out, center, mask=k < K)
    tl.store(out_var + out, tl.sum(total, axis=0) / L, mask=k < K)


@triton.jit
def sum_rows_kernel(
    first_in, second_in, first_out, second_out, num_rows, run_rows, K,
    BK: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add up each run of ``run_rows`` rows of two tables ``(num_rows, K)``, in a fixed order."""
    tiles = tl.cdiv(K, BK)
    run = tl.program_id(0) // tiles
    k = (tl.program_id(0) % tiles) * BK + tl.arange(0, BK)
    start = run * run_rows
    stop = tl.minimum(start + run_rows, num_rows)
    first_sum = tl.zeros((BR, BK), ACC)
    second_sum = tl.zeros((BR, BK), ACC)
    for top in range(start, stop, BR):
        row = top + tl.arange(0, BR)
        mask = (row < stop)[:, None] & (k < K)[None, :]
        at = row.to(tl.int64)[:, None] * K + k[None, :]
        first_sum += tl.load(first_in + at, mask=mask, other=0.0).to(ACC)
        second_sum += tl.load(second_in + at, mask=mask, other=0.0).to(ACC)
    out = run.to(tl.int64) * K + k
    tl.store(first_out + out, tl.sum(first_sum, axis=0), mask=k < K)
    tl.store(second_out + out, tl.sum(second_sum, axis=0), mask=k < K)


@triton.jit
def parameter_sums_kernel(
    sums, sums_x, dweight, dbias, num_rows, C, Q,
    BK: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias from sums ``(num_rows, C * Q)`` of segments."""
    c = tl.program_id(0) * BK + tl.arange(0, BK)
    total = tl.zeros((BR, BK), ACC)
    total_x = tl.zeros((BR, BK), ACC)
    for top in range(0, num_rows * Q, BR):
        i = top + tl.arange(0, BR)
        row = (i // Q).to(tl.int64)[:, None]
        k = c[None, :] * Q + (i % Q)[:, None]
        mask = (i < num_rows * Q)[:, None] & (c < C)[None, :]
        total += tl.load(sums + row * C * Q + k, mask=mask, other=0.0)
        total_x += tl.load(sums_x + row * C * Q + k, mask=mask, other=0.0)
    tl.store(dbias + c, tl.sum(total, axis=0), mask=c < C)
    tl.store(dweight + c, tl.sum(total_x, axis=0), mask=c < C)
