"""Kernels on tables: what lies between the passes over a map.

All tables of moments are float64. A program takes ``BK`` columns (or groups) and ``BR`` rows (or
segments of a group) at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton.device import count_batch, estimate, move


@triton.jit
def part_size(i, SPLITS, span, L):
    """Elements of the part of a segment that is row ``i`` of a table of parts."""
    return tl.minimum(span, L - (i % SPLITS) * span).to(tl.float64)


@triton.jit
def pool_rows_kernel(
    mean, var, out_mean, out_var, running_mean, running_var, counter, rate_high, rate_low,
    N, SPLITS, span, L, K, E,
    HAS_RUNNING: tl.constexpr, HAS_COUNTER: tl.constexpr, ESTIMATED: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Pool parts of segments ``(N, SPLITS, K)`` over runs of ``E`` examples: ``(B, K)``.

    ``ESTIMATED``: what comes out, and is kept, are running estimates moved towards that.
    """
    tiles = tl.cdiv(K, BK)
    run = tl.program_id(0) // tiles
    k = (tl.program_id(0) % tiles) * BK + tl.arange(0, BK)
    examples = tl.minimum(E, N - run * E)
    num_rows = examples * SPLITS
    top = (run * E).to(tl.int64) * SPLITS
    size = examples.to(tl.float64) * L
    lane = tl.arange(0, BR)
    total = tl.zeros((BR, BK), tl.float64)
    for first in range(0, num_rows, BR):
        i = first + lane
        mask = (i < num_rows)[:, None] & (k < K)[None, :]
        at = (top + i)[:, None] * K + k[None, :]
        total += tl.load(mean + at, mask=mask, other=0.0) * part_size(i, SPLITS, span, L)[:, None]
    center = tl.sum(total, axis=0) / size
    total = tl.zeros((BR, BK), tl.float64)
    for first in range(0, num_rows, BR):
        i = first + lane
        mask = (i < num_rows)[:, None] & (k < K)[None, :]
        at = (top + i)[:, None] * K + k[None, :]
        apart = tl.load(mean + at, mask=mask, other=0.0) - center[None, :]
        within = tl.load(var + at, mask=mask, other=0.0)
        both = (within + apart * apart) * part_size(i, SPLITS, span, L)[:, None]
        total += tl.where(mask, both, 0.0)
    spread = tl.sum(total, axis=0) / size
    if ESTIMATED:
        center, spread = estimate(
            center, spread, running_mean + k, running_var + k, rate_high, rate_low, k < K
        )
    out = run.to(tl.int64) * K + k
    tl.store(out_mean + out, center, mask=k < K)
    tl.store(out_var + out, spread, mask=k < K)
    if HAS_RUNNING and not ESTIMATED:
        unbiased = spread * (size / tl.maximum(size - 1.0, 1.0))
        move(running_mean + k, center, rate_high, rate_low, k < K)
        move(running_var + k, unbiased, rate_high, rate_low, k < K)
    if HAS_COUNTER:
        count_batch(counter, tl.program_id(0) == 0)


@triton.jit
def pool_segments_kernel(
    mean, var, out_mean, out_var, J, BR: tl.constexpr
):  # fmt: skip
    """Pool runs of ``J`` equal cells of a table, a program each."""
    group = tl.program_id(0)
    top = group.to(tl.int64) * J
    lane = tl.arange(0, BR)
    total = tl.zeros((BR,), tl.float64)
    for first in range(0, J, BR):
        j = first + lane
        total += tl.load(mean + top + j, mask=j < J, other=0.0)
    center = tl.sum(total, axis=0) / J
    total = tl.zeros((BR,), tl.float64)
    for first in range(0, J, BR):
        j = first + lane
        apart = tl.load(mean + top + j, mask=j < J, other=0.0) - center
        within = tl.load(var + top + j, mask=j < J, other=0.0)
        total += tl.where(j < J, within + apart * apart, 0.0)
    spread = tl.sum(total, axis=0) / J
    one = tl.arange(0, 1)
    tl.store(out_mean + group + one, center, mask=one < 1)
    tl.store(out_var + group + one, spread, mask=one < 1)


@triton.jit
def sum_rows_kernel(
    first_in, second_in, first_out, second_out, num_rows, run_rows, K,
    BK: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of runs of ``run_rows`` rows of two tables ``(num_rows, K)``, in a fixed order."""
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
