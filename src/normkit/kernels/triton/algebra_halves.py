# triton declares what kernels call as never returning
# pyright: reportGeneralTypeIssues=false
"""Kernels for an instance norm on the first ``H`` channels and a batch norm on the others.

Letters are those of ``algebra``. The batch norm's ``C - H`` channels have tables of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton.algebra import blend, of_channels, root, through_blend
from normkit.kernels.triton.device import count_batch, move


@triton.jit
def load_moments(mean, var, n, c, mask, C):
    """Where channels of examples are, and their moments."""
    at = n.to(tl.int64)[:, None] * C + c[None, :]
    m = tl.load(mean + at, mask=mask, other=0.0)
    return at, m, tl.load(var + at, mask=mask, other=1.0)


@triton.jit
def pool_columns(mean, var, c, inside, N, C, BK: tl.constexpr, BR: tl.constexpr):
    """The batch's moments of channels."""
    total = tl.zeros((BR, BK), tl.float64)
    for top in range(0, N, BR):
        n = top + tl.arange(0, BR)
        _, m, _ = load_moments(mean, var, n, c, (n < N)[:, None] & inside[None, :], C)
        total += m
    M = tl.sum(total, axis=0) / N  # noqa: N806
    total = tl.zeros((BR, BK), tl.float64)
    for top in range(0, N, BR):
        n = top + tl.arange(0, BR)
        mask = (n < N)[:, None] & inside[None, :]
        _, m, v = load_moments(mean, var, n, c, mask, C)
        apart = m - M[None, :]
        total += tl.where(mask, v + apart * apart, 0.0)
    return M, tl.sum(total, axis=0) / N


@triton.jit
def of_halves(one, other, c, C, H, default: tl.constexpr, HAS1: tl.constexpr, HAS2: tl.constexpr):
    """A parameter's value for each channel, from those of the two norms."""
    left = of_channels(one, c, c < H, 1, default, HAS1)
    right = of_channels(other, c - H, (c >= H) & (c < C), 1, default, HAS2)
    return tl.where(c < H, left, right)[None, :]


@triton.jit
def halves_stage(
    m, v, M, V, in_batch, be_high, be_low, ge_high, ge_low, own_high, own_low,
    WEIGHED: tl.constexpr,
):  # fmt: skip
    """Distance from the mean, and reciprocal deviation, that a channel's norm takes."""
    u, _, spread = blend(m, v, M, V, own_high, own_low, WEIGHED)
    r = tl.where(in_batch, root(spread, be_high, be_low), root(v, ge_high, ge_low))
    return tl.where(in_batch, u, 0.0), r


@triton.jit
def halves_forward_kernel(
    mean, var, given_mean, given_var, first, second, third, fourth, scale, center,
    out_mean, out_var, running_mean, running_var, counter, rate_high, rate_low, N, C, H, L,
    be_high, be_low, ge_high, ge_low, own_high, own_low,
    HAS1: tl.constexpr, HAS2: tl.constexpr, HAS3: tl.constexpr, HAS4: tl.constexpr,
    OWN: tl.constexpr, WEIGHED: tl.constexpr, CENTERED: tl.constexpr, HAS_RUNNING: tl.constexpr,
    HAS_COUNTER: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Scale and center, and the batch's moments: measured (``OWN``), or as they are given.

    ``CENTERED``: the batch norm's channels are written around the given means, not around their
    own, which may be infinite.
    """
    c = tl.program_id(0) * BK + tl.arange(0, BK)
    b = c - H
    mask = (c >= H) & (c < C)
    if OWN:
        M, V = pool_columns(mean, var, c, mask, N, C, BK, BR)  # noqa: N806
    else:
        M = tl.load(given_mean + b, mask=mask, other=0.0).to(tl.float64)  # noqa: N806
        V = tl.load(given_var + b, mask=mask, other=1.0).to(tl.float64)  # noqa: N806
    tl.store(out_mean + b, M, mask=mask)
    tl.store(out_var + b, V, mask=mask)
    if HAS_RUNNING:
        size = tl.cast(N, tl.float64) * L
        move(running_mean + b, M, rate_high, rate_low, mask)
        move(running_var + b, V * (size / tl.maximum(size - 1.0, 1.0)), rate_high, rate_low, mask)
    if HAS_COUNTER:
        count_batch(counter, tl.program_id(0) == 0)
    in_batch = (c >= H)[None, :]
    weight = of_halves(first, third, c, C, H, 1.0, HAS1, HAS3)
    bias = of_halves(second, fourth, c, C, H, 0.0, HAS2, HAS4)
    for top in range(0, N, BR):
        n = top + tl.arange(0, BR)
        cells = (n < N)[:, None] & (c < C)[None, :]
        at, m, v = load_moments(mean, var, n, c, cells, C)
        if CENTERED:
            m = tl.where(in_batch, M[None, :], m)
            tl.store(mean + at, m, mask=cells & in_batch)
        u, r = halves_stage(
            m, v, M[None, :], V[None, :], in_batch, be_high, be_low, ge_high, ge_low,
            own_high, own_low, WEIGHED,
        )  # fmt: skip
        tl.store(scale + at, r * weight, mask=cells)
        tl.store(center + at, u * r * weight + bias, mask=cells)


@triton.jit
def halves_row(
    mean, var, grad_center, grad_scale, n, c, mask, C, M, V, in_batch,
    be_high, be_low, ge_high, ge_low, own_high, own_low, WEIGHED: tl.constexpr,
):  # fmt: skip
    """Addresses and means of channels of examples, their stage, and the gradients."""
    at, m, v = load_moments(mean, var, n, c, mask, C)
    gs = tl.load(grad_scale + at, mask=mask, other=0.0).to(tl.float64)
    gc = tl.load(grad_center + at, mask=mask, other=0.0).to(tl.float64)
    u, r = halves_stage(
        m, v, M, V, in_batch, be_high, be_low, ge_high, ge_low, own_high, own_low, WEIGHED
    )
    return at, m, u, r, gs, gc


@triton.jit
def halves_backward_kernel(
    mean, var, batch_mean, batch_var, first, third, grad_center, grad_scale, k1, k2, k3, sums,
    N, C, H, L, be_high, be_low, ge_high, ge_low, own_high, own_low,
    HAS1: tl.constexpr, HAS3: tl.constexpr, OWN: tl.constexpr, WEIGHED: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Transpose of ``halves_forward_kernel``: factors, and sums ``(2, C)`` of weight and bias."""
    c = tl.program_id(0) * BK + tl.arange(0, BK)
    inside = (c >= H) & (c < C)
    M = tl.load(batch_mean + c - H, mask=inside, other=0.0)[None, :]  # noqa: N806
    V = tl.load(batch_var + c - H, mask=inside, other=1.0)[None, :]  # noqa: N806
    in_batch = (c >= H)[None, :]
    weight = of_halves(first, third, c, C, H, 1.0, HAS1, HAS3)
    one = tl.zeros((BR, BK), tl.float64)
    two = tl.zeros((BR, BK), tl.float64)
    dspread = tl.zeros((BR, BK), tl.float64)
    for top in range(0, N, BR):
        n = top + tl.arange(0, BR)
        mask = (n < N)[:, None] & (c < C)[None, :]
        _, _, u, r, gs, gc = halves_row(
            mean, var, grad_center, grad_scale, n, c, mask, C, M, V, in_batch,
            be_high, be_low, ge_high, ge_low, own_high, own_low, WEIGHED,
        )  # fmt: skip
        one += (gs + gc * u) * r
        two += gc
        dspread += -0.5 * (gs + gc * u) * weight * r * r * r
    total = tl.sum(two, axis=0)
    tl.store(sums + c, tl.sum(one, axis=0), mask=c < C)
    tl.store(sums + C + c, total, mask=c < C)
    dM = -total[None, :] * weight * root(V, be_high, be_low) / N  # noqa: N806
    dV = tl.sum(dspread, axis=0)[None, :] / N  # noqa: N806
    for top in range(0, N, BR):
        n = top + tl.arange(0, BR)
        mask = (n < N)[:, None] & (c < C)[None, :]
        at, m, u, r, gs, gc = halves_row(
            mean, var, grad_center, grad_scale, n, c, mask, C, M, V, in_batch,
            be_high, be_low, ge_high, ge_low, own_high, own_low, WEIGHED,
        )  # fmt: skip
        own_v = -0.5 * (gs + gc * u) * weight * r * r * r
        to_m = tl.zeros((BR, BK), tl.float64)  # of the batch norm's channels
        to_v = tl.zeros((BR, BK), tl.float64)
        if OWN:
            to_m += dM + dV * 2.0 * (m - M)
            to_v += dV
        if WEIGHED:
            to_m, to_v = through_blend(-gc * r * weight, own_v, m - M, own_high, own_low)
        # in the batch's channels a mean also gets k1 gc straight, which k3 takes away from all
        to_m = tl.where(in_batch, to_m, -gc * r * weight)
        tl.store(k1 + at, r * weight, mask=mask)
        tl.store(k2 + at, tl.where(in_batch, to_v, own_v) * 2.0 / L, mask=mask)
        tl.store(k3 + at, to_m / L, mask=mask)
