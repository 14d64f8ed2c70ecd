"""Functions that many kernels call: addresses in a map, sums of blocks, updates of buffers.

A map ``(N, C, P)`` has strides ``(SN, SC, SP)``. Its segment ``k`` of ``L`` positions is part
``k % Q`` of channel ``k // Q``. A group of ``J`` segments and ``E`` examples has one cell in a
table ``(B, G)``, at ``(n // E) * G + k // J``. With ``WIDE`` addresses are computed in 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_starts(n, k, SN, SC, SP, Q, L, WIDE: tl.constexpr, ALIGN: tl.constexpr):
    """Address of the first element of segment ``k`` of example ``n``.

    ``ALIGN`` divides it. Dividing and multiplying by ``ALIGN`` tells the compiler so.
    """
    if WIDE:
        n = tl.cast(n, tl.int64)
        k = tl.cast(k, tl.int64)
    return (n * SN + (k // Q) * SC + (k % Q) * L * SP) // ALIGN * ALIGN


@triton.jit
def columns(l, SP, WIDE: tl.constexpr):
    """Distance of position ``l`` from the first element of its segment."""
    if WIDE:
        l = tl.cast(l, tl.int64)
    return l * SP


@triton.jit
def load_or(HAS: tl.constexpr, default, values, at, inside):
    """Load values in the dtype of ``default``; without ``HAS`` return ``default``."""
    found = default
    if HAS:
        found = tl.load(values + at, mask=inside, other=0.0).to(default.dtype)
    return found


@triton.jit
def split(value, ACC: tl.constexpr):
    """Split a float64 number into two of ``ACC``, so that subtracting both loses no digits."""
    high = value.to(ACC)
    return high, (value - high.to(tl.float64)).to(ACC)


@triton.jit
def finite(value):
    """The value, or 0 if it is infinite or NaN and subtracting it would give NaN everywhere."""
    return tl.where(value - value == 0.0, value, 0.0)


@triton.jit
def folded(values, BK: tl.constexpr, BL: tl.constexpr, FOLD: tl.constexpr):
    """Add up the ``FOLD`` parts of each row of a block, which are in registers of one thread."""
    return tl.sum(tl.reshape(values, (BK, FOLD, BL // FOLD)), axis=1)


@triton.jit
def folded_block(
    values, BG: tl.constexpr, BJ: tl.constexpr, BL: tl.constexpr, FOLD: tl.constexpr
):  # fmt: skip
    """Do what ``folded`` does to a block ``(BG, BJ, BL)``."""
    return tl.sum(tl.reshape(values, (BG, BJ, FOLD, BL // FOLD)), axis=2)


@triton.jit
def sum_block(values, BG: tl.constexpr, BJ: tl.constexpr, BL: tl.constexpr):
    """Sums over a block's rows and positions, in one reduction, so threads synchronise once."""
    return tl.sum(tl.reshape(values, (BG, BJ * BL)), axis=1)


@triton.jit
def reciprocal_root(var, eps_high, eps_low, ACC: tl.constexpr):
    """``1 / sqrt(var + eps)`` in the dtype ``ACC``, because float64 is slow on most GPUs."""
    if ACC == tl.float32:  # noqa: SIM300 - a constant of the kernel, not of Python
        root = tl.rsqrt(var.to(ACC) + eps_high)
    else:
        root = 1.0 / tl.sqrt(var.to(ACC) + join(eps_high, eps_low))
    return root


@triton.jit
def join(high, low):
    """The float64 number whose two parts a kernel was given."""
    return tl.cast(high, tl.float64) + tl.cast(low, tl.float64)


@triton.jit
def move(pointer, value, rate_high, rate_low, mask):
    """Update buffers by ``value`` with a rate that is given in two parts."""
    rate = join(rate_high, rate_low)
    old = tl.load(pointer, mask=mask, other=0.0)
    wide = old.to(tl.float64)
    tl.store(pointer, (wide + rate * (value - wide)).to(old.dtype), mask=mask)


@triton.jit
def count_batch(counter, is_first):
    """Add 1 to the counter of batches, in the first program only."""
    pointer = counter + tl.arange(0, 1)
    mask = tl.zeros((1,), tl.int32) + tl.cast(is_first, tl.int32) > 0
    tl.store(pointer, tl.load(pointer, mask=mask, other=0) + 1, mask=mask)
