"""What every kernel shares on the device: addresses of a map's rows, centring, blocks of groups.

A map ``(N, C, P)`` has strides ``(SN, SC, SP)``. Its segment ``k`` of ``L`` positions is part
``k % Q`` of channel ``k // Q``. A group of ``J`` segments and ``E`` examples has one cell in a
table ``(B, G)``, at ``(n // E) * G + k // J``. ``WIDE`` computes addresses in 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_starts(n, k, SN, SC, SP, Q, L, WIDE: tl.constexpr, ALIGN: tl.constexpr):
    """Address of the first element of segment ``k`` of example ``n``.

    ``ALIGN`` divides it: said as a product, which the compiler looks through.
    """
    if WIDE:
        n = tl.cast(n, tl.int64)
        k = tl.cast(k, tl.int64)
    return (n * SN + (k // Q) * SC + (k % Q) * L * SP) // ALIGN * ALIGN


@triton.jit
def columns(l, SP, WIDE: tl.constexpr):
    """Address of position ``l`` from the first of its segment."""
    if WIDE:
        l = tl.cast(l, tl.int64)
    return l * SP


@triton.jit
def load_or(HAS: tl.constexpr, default, values, at, inside):
    """Values of a table, in the dtype of ``default``; ``default`` where there is no table."""
    found = default
    if HAS:
        found = tl.load(values + at, mask=inside, other=0.0).to(default.dtype)
    return found


@triton.jit
def split(value, ACC: tl.constexpr):
    """A float64 number as the sum of two of ``ACC``: 1e4 and a part of 1e-4 of it both survive."""
    high = value.to(ACC)
    return high, (value - high.to(tl.float64)).to(ACC)


@triton.jit
def finite(value):
    """A value to subtract, or 0 where subtracting it would make everything NaN."""
    return tl.where(value - value == 0.0, value, 0.0)


@triton.jit
def folded(values, BK: tl.constexpr, BL: tl.constexpr, FOLD: tl.constexpr):
    """Sums of a block's ``FOLD`` parts of each row, which lie in registers of the same thread."""
    return tl.sum(tl.reshape(values, (BK, FOLD, BL // FOLD)), axis=1)


@triton.jit
def folded_block(
    values, BG: tl.constexpr, BJ: tl.constexpr, BL: tl.constexpr, FOLD: tl.constexpr
):  # fmt: skip
    """The same of a block ``(BG, BJ, BL)``."""
    return tl.sum(tl.reshape(values, (BG, BJ, FOLD, BL // FOLD)), axis=2)


@triton.jit
def sum_block(values, BG: tl.constexpr, BJ: tl.constexpr, BL: tl.constexpr):
    """Sums over a block's rows and positions: of both at once, so threads meet only once."""
    return tl.sum(tl.reshape(values, (BG, BJ * BL)), axis=1)


@triton.jit
def reciprocal_root(var, eps_high, eps_low, ACC: tl.constexpr):
    """``1 / sqrt(var + eps)``; few GPUs are fast in float64, so only where ``ACC`` is."""
    if ACC == tl.float32:  # noqa: SIM300 - a constant of the kernel, not of Python
        root = tl.rsqrt(var.to(ACC) + eps_high)
    else:
        root = 1.0 / tl.sqrt(var.to(ACC) + join(eps_high, eps_low))
    return root


@triton.jit
def join(high, low):
    """A number that came in two parts, in float64."""
    return tl.cast(high, tl.float64) + tl.cast(low, tl.float64)


@triton.jit
def move(pointer, value, rate_high, rate_low, mask):
    """Move buffers towards ``value`` by a rate that comes in two parts."""
    rate = join(rate_high, rate_low)
    old = tl.load(pointer, mask=mask, other=0.0)
    wide = old.to(tl.float64)
    tl.store(pointer, (wide + rate * (value - wide)).to(old.dtype), mask=mask)


@triton.jit
def count_batch(counter, is_first):
    """Count a batch, once: by the first program."""
    pointer = counter + tl.arange(0, 1)
    mask = tl.zeros((1,), tl.int32) + tl.cast(is_first, tl.int32) > 0
    tl.store(pointer, tl.load(pointer, mask=mask, other=0) + 1, mask=mask)
