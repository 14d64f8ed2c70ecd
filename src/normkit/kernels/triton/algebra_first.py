# triton declares what kernels call as never returning
# pyright: reportGeneralTypeIssues=false
"""Kernels for composites whose group norm comes first; the letters are those of ``algebra``."""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton.algebra import (
    blend,
    group_stage,
    of_channels,
    root,
    share,
    through_blend,
)
from normkit.kernels.triton.device import count_batch, move


@triton.jit
def first_stage(mean, var, group_mean, group_var, n, c, mask, C, J, ge_high, ge_low):
    """What a group norm that comes first makes of channels: its ``r``, center, variance."""
    at = n.to(tl.int64)[:, None] * C + c[None, :]
    cell = n[:, None] * (C // J) + (c // J)[None, :]
    r = root(tl.load(group_var + cell, mask=mask, other=1.0), ge_high, ge_low)
    apart = tl.load(mean + at, mask=mask, other=0.0)
    apart -= tl.load(group_mean + cell, mask=mask, other=0.0)
    v = tl.load(var + at, mask=mask, other=0.0)
    return at, r, tl.where(mask, apart * r, 0.0), v


@triton.jit
def pool_first(
    mean, var, group_mean, group_var, c, N, C, J, ge_high, ge_low, BK: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """The batch's moments of what a group norm made of channels."""
    total = tl.zeros((BR, BK), tl.float64)
    for top in range(0, N, BR):
        n = top + tl.arange(0, BR)
        mask = (n < N)[:, None] & (c < C)[None, :]
        _, _, made, _ = first_stage(
            mean, var, group_mean, group_var, n, c, mask, C, J, ge_high, ge_low
        )
        total += made
    M = tl.sum(total, axis=0) / N  # noqa: N806
    total = tl.zeros((BR, BK), tl.float64)
    for top in range(0, N, BR):
        n = top + tl.arange(0, BR)
        mask = (n < N)[:, None] & (c < C)[None, :]
        _, r, made, v = first_stage(
            mean, var, group_mean, group_var, n, c, mask, C, J, ge_high, ge_low
        )
        apart = made - M[None, :]
        total += tl.where(mask, r * r * v + apart * apart, 0.0)
    return M, tl.sum(total, axis=0) / N


@triton.jit
def columns_forward_kernel(
    mean, var, group_mean, group_var, given_mean, given_var, first, second, logit, scale, center,
    out_mean, out_var, running_mean, running_var, counter, rate_high, rate_low, N, C, J, L,
    be_high, be_low, ge_high, ge_low, own_high, own_low,
    HAS1: tl.constexpr, HAS2: tl.constexpr, OWN: tl.constexpr, WEIGHED: tl.constexpr,
    HAS_RUNNING: tl.constexpr, HAS_COUNTER: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Scale and center where the group norm comes first: the batch sees what it made.

    ``OWN``: the batch's moments are measured; else they are given, perhaps ``WEIGHED``.
    """
    c = tl.program_id(0) * BK + tl.arange(0, BK)
    if OWN:
        M, V = pool_first(  # noqa: N806
            mean, var, group_mean, group_var, c, N, C, J, ge_high, ge_low, BK, BR
        )
    else:
        M = tl.load(given_mean + c, mask=c < C, other=0.0).to(tl.float64)  # noqa: N806
        V = tl.load(given_var + c, mask=c < C, other=1.0).to(tl.float64)  # noqa: N806
    tl.store(out_mean + c, M, mask=c < C)
    tl.store(out_var + c, V, mask=c < C)
    if HAS_RUNNING:
        size = tl.cast(N, tl.float64) * L
        move(running_mean + c, M, rate_high, rate_low, c < C)
        move(running_var + c, V * (size / tl.maximum(size - 1.0, 1.0)), rate_high, rate_low, c < C)
    if HAS_COUNTER:
        count_batch(counter, tl.program_id(0) == 0)
    p = share(logit)
    weight = of_channels(first, c, c < C, 1, 1.0, HAS1)[None, :]
    bias = of_channels(second, c, c < C, 1, 0.0, HAS2)[None, :]
    for top in range(0, N, BR):
        n = top + tl.arange(0, BR)
        mask = (n < N)[:, None] & (c < C)[None, :]
        at, r, made, v = first_stage(
            mean, var, group_mean, group_var, n, c, mask, C, J, ge_high, ge_low
        )
        u, _, spread = blend(made, r * r * v, M[None, :], V[None, :], own_high, own_low, WEIGHED)
        rb = root(spread, be_high, be_low)
        slope = r * (p + (1.0 - p) * rb) * weight
        offset = (p * made + (1.0 - p) * u * rb) * weight + bias
        tl.store(scale + at, slope, mask=mask)
        tl.store(center + at, offset, mask=mask)


@triton.jit
def columns_first_backward_kernel(
    mean, var, group_mean, group_var, batch_mean, batch_var, first, logit, grad_center, grad_scale,
    to_center, to_root, dvar, k1, sums, N, C, J, be_high, be_low, ge_high, ge_low,
    own_high, own_low,
    HAS1: tl.constexpr, OWN: tl.constexpr, WEIGHED: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """Transpose of ``columns_forward_kernel`` down to what the group norm made; sums ``(3, C)``."""
    c = tl.program_id(0) * BK + tl.arange(0, BK)
    inside = c < C
    M = tl.load(batch_mean + c, mask=inside, other=0.0)[None, :]  # noqa: N806
    V = tl.load(batch_var + c, mask=inside, other=1.0)[None, :]  # noqa: N806
    weight = of_channels(first, c, inside, 1, 1.0, HAS1)[None, :]
    p = share(logit)
    q = 1.0 - p
    one = tl.zeros((BR, BK), tl.float64)
    two = tl.zeros((BR, BK), tl.float64)
    three = tl.zeros((BR, BK), tl.float64)
    droot = tl.zeros((BR, BK), tl.float64)
    for top in range(0, N, BR):
        n = top + tl.arange(0, BR)
        mask = (n < N)[:, None] & inside[None, :]
        at, r, made, v = first_stage(
            mean, var, group_mean, group_var, n, c, mask, C, J, ge_high, ge_low
        )
        apart, _, spread = blend(made, r * r * v, M, V, own_high, own_low, WEIGHED)
        rb = root(spread, be_high, be_low)
        gs = tl.load(grad_scale + at, mask=mask, other=0.0).to(tl.float64)
        gc = tl.load(grad_center + at, mask=mask, other=0.0).to(tl.float64)
        one += gs * r * (p + q * rb) + gc * (p * made + q * apart * rb)
        two += gc
        three += (gs * (r - r * rb) + gc * (made - apart * rb)) * weight
        droot += q * weight * (gs * r + gc * apart)
    total = tl.sum(two, axis=0)
    tl.store(sums + c, tl.sum(one, axis=0), mask=inside)
    tl.store(sums + C + c, total, mask=inside)
    tl.store(sums + 2 * C + c, tl.sum(three, axis=0) * p * q, mask=inside)
    unblended = root(V, be_high, be_low)
    dM = -q * total[None, :] * weight * unblended / N  # noqa: N806
    dV = -0.5 * tl.sum(droot, axis=0)[None, :] / N  # noqa: N806
    dV *= unblended * unblended * unblended  # noqa: N806
    for top in range(0, N, BR):
        n = top + tl.arange(0, BR)
        mask = (n < N)[:, None] & inside[None, :]
        at, r, made, v = first_stage(
            mean, var, group_mean, group_var, n, c, mask, C, J, ge_high, ge_low
        )
        gs = tl.load(grad_scale + at, mask=mask, other=0.0).to(tl.float64)
        gc = tl.load(grad_center + at, mask=mask, other=0.0).to(tl.float64)
        apart, _, spread = blend(made, r * r * v, M, V, own_high, own_low, WEIGHED)
        rb = root(spread, be_high, be_low)
        both = (p + q * rb) * weight
        to_c = tl.zeros((BR, BK), tl.float64)
        to_v = tl.zeros((BR, BK), tl.float64)
        if OWN:
            to_c += dM + dV * 2.0 * (made - M)
            to_v += dV
        if WEIGHED:
            of_m = -q * gc * weight * rb
            of_v = -0.5 * q * weight * (gs * r + gc * apart) * rb * rb * rb
            to_c, to_v = through_blend(of_m, of_v, made - M, own_high, own_low)
        tl.store(to_center + at, gc * both + to_c, mask=mask)
        tl.store(to_root + at, gs * both + 2.0 * to_v * r * v, mask=mask)
        tl.store(dvar + at, to_v * r * r, mask=mask)
        tl.store(k1 + at, r * both, mask=mask)


@triton.jit
def rows_first_backward_kernel(
    mean, var, to_center, to_root, dvar, k1, grad_center, k2, k3, C, J, L, ge_high, ge_low,
    BR: tl.constexpr,
):  # fmt: skip
    """Transpose of a group norm that comes first: factors ``k2, k3``."""
    lane = tl.arange(0, BR)
    inside = lane < J
    k = (tl.program_id(0) % (C // J)) * J + lane
    at = (tl.program_id(0) // (C // J)).to(tl.int64) * C + k
    m = tl.load(mean + at, mask=inside, other=0.0)
    v = tl.load(var + at, mask=inside, other=0.0)
    dc = tl.load(to_center + at, mask=inside, other=0.0)
    ds = tl.load(to_root + at, mask=inside, other=0.0)
    d, _, _, r = group_stage(m, v, inside, J, ge_high, ge_low)
    dspread = -0.5 * tl.sum(ds + dc * d, axis=0) * r * r * r
    dm = dc * r - tl.sum(dc, axis=0) * r / J + dspread * 2.0 * d / J
    dv = tl.load(dvar + at, mask=inside, other=0.0) + dspread / J
    gc = tl.load(grad_center + at, mask=inside, other=0.0).to(tl.float64)
    dm -= tl.load(k1 + at, mask=inside, other=0.0) * gc
    tl.store(k2 + at, dv * 2.0 / L, mask=inside)
    tl.store(k3 + at, dm / L, mask=inside)
