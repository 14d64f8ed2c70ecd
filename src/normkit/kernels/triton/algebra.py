# triton declares what kernels call as never returning
# pyright: reportGeneralTypeIssues=false
"""Kernels for composites: what several norms do to the moments of a map's channels, and back.

``core.composite`` defines what they compute; the letters are ``m, v`` for a channel's moments,
``M, V`` for the batch's (``rb`` its reciprocal standard deviation), ``d, r`` for a distance from a
group's mean and the group's reciprocal standard deviation, ``p, q`` for the shares of group and
batch norm, ``gs, gc`` for gradients of scale and center. Tables are float64. ``KIND`` is that of
``kinds.Kind``: 0 batch then group, 2 and 3 both mixed, the batch norm first or side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton.device import join


@triton.jit
def of_channels(values, k, inside, REPEAT, default: tl.constexpr, HAS: tl.constexpr):
    """A parameter's value for each channel."""
    if HAS:
        found = tl.load(values + k // REPEAT, mask=inside, other=default).to(tl.float64)
    else:
        found = tl.zeros_like(k).to(tl.float64) + default
    return found


@triton.jit
def root(var, eps_high, eps_low):
    """``1 / sqrt(var + eps)``."""
    return 1.0 / tl.sqrt(var + join(eps_high, eps_low))


@triton.jit
def group_stage(center, var, inside, J, eps_high, eps_low):
    """Distances from the group's mean, its mean, its variance and reciprocal deviation."""
    mean = tl.sum(tl.where(inside, center, 0.0), axis=0) / J
    apart = tl.where(inside, center - mean, 0.0)
    spread = tl.sum(tl.where(inside, var, 0.0) + apart * apart, axis=0) / J
    return apart, mean, spread, root(spread, eps_high, eps_low)


@triton.jit
def blend(m, v, M, V, own_high, own_low, WEIGHED: tl.constexpr):
    """Distance from the mean that the batch stage takes away, that mean, and the variance.

    ``WEIGHED``: of a mixture of the channel's own moments, whose share comes in two parts. At a
    share of 1 the batch's moments have no say, even where they are not finite.
    """
    own = join(own_high, own_low)
    if WEIGHED:
        M = tl.where(own == 1.0, m, M)  # noqa: N806
        V = tl.where(own == 1.0, v, V)  # noqa: N806
    u = m - M
    if WEIGHED:
        V = own * v + (1.0 - own) * (V + own * u * u)  # noqa: N806
        M += own * u  # noqa: N806
        u = (1.0 - own) * u
    return u, M, V


@triton.jit
def batch_stage(m, v, batch_mean, batch_var, k, inside, own_high, own_low, WEIGHED: tl.constexpr):
    """What ``blend`` makes of the batch's moments for each channel."""
    M = tl.load(batch_mean + k, mask=inside, other=0.0).to(tl.float64)  # noqa: N806
    V = tl.load(batch_var + k, mask=inside, other=1.0).to(tl.float64)  # noqa: N806
    return blend(m, v, M, V, own_high, own_low, WEIGHED)


@triton.jit
def keep(batch_mean, batch_var, kept_mean, kept_var, k, mask):
    """Note what somebody else gave, for a backward pass that comes when it has changed."""
    M = tl.load(batch_mean + k, mask=mask, other=0.0).to(tl.float64)  # noqa: N806
    V = tl.load(batch_var + k, mask=mask, other=0.0).to(tl.float64)  # noqa: N806
    tl.store(kept_mean + k, M, mask=mask)
    tl.store(kept_var + k, V, mask=mask)


@triton.jit
def through_blend(dM, dV, u, own_high, own_low):
    """What reaches moments through their share of a mixture, ``u`` away from the given mean."""
    own = join(own_high, own_low)
    apart = tl.where(own == 1.0, 0.0, 2.0 * (1.0 - own) * u)
    return own * (dM + dV * apart), own * dV


@triton.jit
def share(logit):
    """The group norm's share."""
    return 1.0 / (1.0 + tl.exp(-tl.load(logit).to(tl.float64)))


@triton.jit
def rows_forward_kernel(
    mean, var, batch_mean, batch_var, kept_mean, kept_var, first, second, third, fourth,
    scale, center, C, J, REPEAT, be_high, be_low, ge_high, ge_low, own_high, own_low,
    KIND: tl.constexpr, HAS1: tl.constexpr, HAS2: tl.constexpr, HAS3: tl.constexpr,
    HAS4: tl.constexpr, KEEPS: tl.constexpr, WEIGHED: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Scale and center of the channels of a group of an example, where the batch sees ``m, v``."""
    lane = tl.arange(0, BR)
    inside = lane < J
    k = (tl.program_id(0) % (C // J)) * J + lane
    at = (tl.program_id(0) // (C // J)).to(tl.int64) * C + k
    m = tl.load(mean + at, mask=inside, other=0.0)
    v = tl.load(var + at, mask=inside, other=0.0)
    weight = of_channels(first, k, inside, 1, 1.0, HAS1)
    bias = of_channels(second, k, inside, 1, 0.0, HAS2)
    u, _, V = batch_stage(  # noqa: N806
        m, v, batch_mean, batch_var, k, inside, own_high, own_low, WEIGHED
    )
    rb = root(V, be_high, be_low)
    if KEEPS:
        is_first = inside & (tl.program_id(0) < C // J)
        keep(batch_mean, batch_var, kept_mean, kept_var, k, is_first)
    if KIND == 0:
        s = rb * weight
        d, _, _, r = group_stage(u * s + bias, s * s * v, inside, J, ge_high, ge_low)
        factor = of_channels(third, k, inside, REPEAT, 1.0, HAS3) * r
        slope = s * factor
        offset = d * factor + of_channels(fourth, k, inside, REPEAT, 0.0, HAS4)
    elif KIND == 2:
        p = share(third)
        d, _, _, r = group_stage(u * rb, rb * rb * v, inside, J, ge_high, ge_low)
        slope = (p * rb * r + (1.0 - p) * rb) * weight
        offset = (p * d * r + (1.0 - p) * u * rb) * weight + bias
    else:
        p = share(third)
        d, _, _, r = group_stage(m, v, inside, J, ge_high, ge_low)
        slope = (p * r + (1.0 - p) * rb) * weight
        offset = (p * d * r + (1.0 - p) * u * rb) * weight + bias
    tl.store(scale + at, slope, mask=inside)
    tl.store(center + at, offset, mask=inside)


@triton.jit
def rows_backward_kernel(
    mean, var, batch_mean, batch_var, first, second, third, fourth, grad_center, grad_scale,
    k1, dmean, dvar, to_mean, to_var, of_first, of_second, of_third, scalars,
    C, J, REPEAT, be_high, be_low, ge_high, ge_low, own_high, own_low,
    KIND: tl.constexpr, HAS1: tl.constexpr, HAS2: tl.constexpr, HAS3: tl.constexpr,
    WEIGHED: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Transpose of ``rows_forward_kernel``.

    What reaches ``m, v`` past the batch's statistics goes to ``dmean, dvar``; what reaches those,
    ``to_mean, to_var``; then terms of the parameters' gradients, of the logit a sum a program.
    """
    lane = tl.arange(0, BR)
    inside = lane < J
    k = (tl.program_id(0) % (C // J)) * J + lane
    at = (tl.program_id(0) // (C // J)).to(tl.int64) * C + k
    m = tl.load(mean + at, mask=inside, other=0.0)
    v = tl.load(var + at, mask=inside, other=0.0)
    gs = tl.load(grad_scale + at, mask=inside, other=0.0).to(tl.float64)
    gc = tl.load(grad_center + at, mask=inside, other=0.0).to(tl.float64)
    weight = of_channels(first, k, inside, 1, 1.0, HAS1)
    bias = of_channels(second, k, inside, 1, 0.0, HAS2)
    u, _, V = batch_stage(  # noqa: N806
        m, v, batch_mean, batch_var, k, inside, own_high, own_low, WEIGHED
    )
    rb = root(V, be_high, be_low)
    if KIND == 0:
        s = rb * weight
        d, _, _, r = group_stage(u * s + bias, s * s * v, inside, J, ge_high, ge_low)
        after = of_channels(third, k, inside, REPEAT, 1.0, HAS3)
        e = gs * s + gc * d
        dr = tl.sum(tl.where(inside, after * e, 0.0), axis=0)
        dgroup = -tl.sum(tl.where(inside, gc * after, 0.0), axis=0) * r
        dspread = -0.5 * dr * r * r * r
        dc = gc * r * after + dgroup / J + dspread * 2.0 * d / J
        ds = gs * r * after + 2.0 * s * v * dspread / J + dc * u
        through = dc * s
        direct = s * s * dspread / J
        batch_m = -through
        batch_v = -0.5 * ds * weight * rb * rb * rb
        slope = s * r * after
        term1 = ds * rb
        term2 = dc
        tl.store(of_third + at, e * r, mask=inside)
    else:
        p = share(third)
        q = 1.0 - p
        hs = gs * weight
        hc = gc * weight
        if KIND == 2:
            s = rb
            d, _, _, r = group_stage(u * rb, rb * rb * v, inside, J, ge_high, ge_low)
        else:
            s = tl.zeros_like(m) + 1.0
            d, _, _, r = group_stage(m, v, inside, J, ge_high, ge_low)
        dr = tl.sum(tl.where(inside, p * (hs * s + hc * d), 0.0), axis=0)
        dgroup = -tl.sum(tl.where(inside, p * hc, 0.0), axis=0) * r
        dspread = -0.5 * dr * r * r * r
        dc = p * hc * r + dgroup / J + dspread * 2.0 * d / J
        if KIND == 2:
            dc += q * hc
            ds = p * hs * r + 2.0 * s * v * dspread / J + q * hs + dc * u
            through = dc * s
            batch_m = -through
        else:
            ds = q * (hs + hc * u)
            through = dc + q * hc * rb
            batch_m = -q * hc * rb
        direct = s * s * dspread / J
        batch_v = -0.5 * ds * rb * rb * rb
        slope = (p * s * r + q * rb) * weight
        term1 = gs * (p * s * r + q * rb) + gc * (p * d * r + q * u * rb)
        term2 = gc
        difference = hs * (s * r - rb) + hc * (d * r - u * rb)
        of_share = tl.sum(tl.where(inside, difference, 0.0), axis=0) * p * q
        tl.store(scalars + tl.program_id(0) * 6, of_share)
    tl.store(k1 + at, slope, mask=inside)
    tl.store(dmean + at, through, mask=inside)
    tl.store(dvar + at, direct, mask=inside)
    tl.store(to_mean + at, batch_m, mask=inside)
    tl.store(to_var + at, batch_v, mask=inside)
    tl.store(of_first + at, term1, mask=inside)
    tl.store(of_second + at, term2, mask=inside)


@triton.jit
def through_batch(u, dM, dV, to_mean, to_var, mask, own_high, own_low, WEIGHED: tl.constexpr):
    """What reaches moments ``u`` away from the batch's mean by way of the batch's moments."""
    if WEIGHED:
        of_m = tl.load(to_mean, mask=mask, other=0.0)
        of_v = tl.load(to_var, mask=mask, other=0.0)
        of_m, of_v = through_blend(of_m, of_v, u, own_high, own_low)
    else:
        of_m = dM[None, :] + dV[None, :] * 2.0 * u
        of_v = tl.zeros_like(u) + dV[None, :]
    return of_m, of_v


@triton.jit
def columns_backward_kernel(
    mean, batch_mean, grad_center, k1, dmean, dvar, to_mean, to_var,
    of_first, of_second, of_third, k2, k3, sums, N, C, L, own_high, own_low,
    OWN: tl.constexpr, WEIGHED: tl.constexpr, HAS_THIRD: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """Factors ``k2, k3`` of every channel of every example, and sums ``(4, C)`` of the terms.

    ``OWN``: the batch's statistics are pooled from ``m, v``. Else they are given, which no gradient
    reaches, or ``WEIGHED``.
    """
    c = tl.program_id(0) * BK + tl.arange(0, BK)
    to_m = tl.zeros((BR, BK), tl.float64)
    to_v = tl.zeros((BR, BK), tl.float64)
    one = tl.zeros((BR, BK), tl.float64)
    two = tl.zeros((BR, BK), tl.float64)
    three = tl.zeros((BR, BK), tl.float64)
    four = tl.zeros((BR, BK), tl.float64)
    for top in range(0, N, BR):
        n = top + tl.arange(0, BR)
        mask = (n < N)[:, None] & (c < C)[None, :]
        at = n.to(tl.int64)[:, None] * C + c[None, :]
        one += tl.load(of_first + at, mask=mask, other=0.0)
        two += tl.load(of_second + at, mask=mask, other=0.0)
        if HAS_THIRD:
            three += tl.load(of_third + at, mask=mask, other=0.0)
            four += tl.load(grad_center + at, mask=mask, other=0.0).to(tl.float64)
        if OWN:
            to_m += tl.load(to_mean + at, mask=mask, other=0.0)
            to_v += tl.load(to_var + at, mask=mask, other=0.0)
    tl.store(sums + c, tl.sum(one, axis=0), mask=c < C)
    tl.store(sums + C + c, tl.sum(two, axis=0), mask=c < C)
    if HAS_THIRD:
        tl.store(sums + 2 * C + c, tl.sum(three, axis=0), mask=c < C)
        tl.store(sums + 3 * C + c, tl.sum(four, axis=0), mask=c < C)
    dM = tl.sum(to_m, axis=0) / N  # noqa: N806 - the letters of the formulas
    dV = tl.sum(to_v, axis=0) / N  # noqa: N806
    M = dM  # noqa: N806
    if OWN or WEIGHED:
        M = tl.load(batch_mean + c, mask=c < C, other=0.0)  # noqa: N806
    for top in range(0, N, BR):
        n = top + tl.arange(0, BR)
        mask = (n < N)[:, None] & (c < C)[None, :]
        at = n.to(tl.int64)[:, None] * C + c[None, :]
        to_m = tl.load(dmean + at, mask=mask, other=0.0)
        to_v = tl.load(dvar + at, mask=mask, other=0.0)
        if OWN or WEIGHED:
            u = tl.load(mean + at, mask=mask, other=0.0) - M[None, :]
            of_m, of_v = through_batch(
                u, dM, dV, to_mean + at, to_var + at, mask, own_high, own_low, WEIGHED
            )
            to_m += of_m
            to_v += of_v
        gc = tl.load(grad_center + at, mask=mask, other=0.0).to(tl.float64)
        to_m -= tl.load(k1 + at, mask=mask, other=0.0) * gc
        tl.store(k2 + at, to_v * 2.0 / L, mask=mask)
        tl.store(k3 + at, to_m / L, mask=mask)
