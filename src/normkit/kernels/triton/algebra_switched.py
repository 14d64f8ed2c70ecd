# triton declares what kernels call as never returning
# pyright: reportGeneralTypeIssues=false
"""Kernels for mixtures of statistics: an instance's, a layer's and a batch's.

Letters are those of ``algebra``; ``a`` and ``b`` are the shares of means and variances. Without
``HAS_BATCH`` there are two logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton.algebra import batch_stage, group_stage, keep, of_channels, root


@triton.jit
def shares(logits, COUNT: tl.constexpr):
    """Softmax of two or three logits: a number each, the third 0 where there are two."""
    i = tl.arange(0, 4)
    raw = tl.load(logits + i, mask=i < COUNT, other=-float("inf")).to(tl.float64)
    weight = tl.exp(raw - tl.max(raw, axis=0))
    weight = weight / tl.sum(weight, axis=0)
    first = tl.sum(tl.where(i == 0, weight, 0.0), axis=0)
    second = tl.sum(tl.where(i == 1, weight, 0.0), axis=0)
    return first, second, tl.sum(tl.where(i == 2, weight, 0.0), axis=0)


@triton.jit
def batch_moments(
    m, v, batch_mean, batch_var, k, inside, own_high, own_low,
    HAS_BATCH: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    """The batch's, or zeros where its share is 0."""
    if HAS_BATCH:
        _, batch_m, batch_v = batch_stage(
            m, v, batch_mean, batch_var, k, inside, own_high, own_low, WEIGHED
        )
    else:
        batch_m = tl.zeros_like(k).to(tl.float64)
        batch_v = tl.zeros_like(k).to(tl.float64)
    return batch_m, batch_v


@triton.jit
def switched_forward_kernel(
    mean, var, batch_mean, batch_var, kept_mean, kept_var, first, second, mean_logits, var_logits,
    scale, center, C, eps_high, eps_low, own_high, own_low,
    HAS1: tl.constexpr, HAS2: tl.constexpr, HAS_BATCH: tl.constexpr, KEEPS: tl.constexpr,
    WEIGHED: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Scale and center of an example's channels."""
    k = tl.arange(0, BR)
    inside = k < C
    at = tl.program_id(0).to(tl.int64) * C + k
    m = tl.load(mean + at, mask=inside, other=0.0)
    v = tl.load(var + at, mask=inside, other=0.0)
    M, V = batch_moments(  # noqa: N806
        m, v, batch_mean, batch_var, k, inside, own_high, own_low, HAS_BATCH, WEIGHED
    )
    if KEEPS:
        is_first = inside & (tl.program_id(0) < 1)
        keep(batch_mean, batch_var, kept_mean, kept_var, k, is_first)
    _, layer_mean, layer_var, _ = group_stage(m, v, inside, C, eps_high, eps_low)
    a0, a1, a2 = shares(mean_logits, 3 if HAS_BATCH else 2)
    b0, b1, b2 = shares(var_logits, 3 if HAS_BATCH else 2)
    apart = m - a0 * m - a1 * layer_mean - a2 * M
    slope = root(b0 * v + b1 * layer_var + b2 * V, eps_high, eps_low)
    slope = slope * of_channels(first, k, inside, 1, 1.0, HAS1)
    offset = apart * slope + of_channels(second, k, inside, 1, 0.0, HAS2)
    tl.store(scale + at, slope, mask=inside)
    tl.store(center + at, offset, mask=inside)


@triton.jit
def switched_backward_kernel(
    mean, var, batch_mean, batch_var, first, mean_logits, var_logits, grad_center, grad_scale,
    k1, dmean, dvar, to_mean, to_var, of_first, of_second, scalars, C, eps_high, eps_low,
    own_high, own_low,
    HAS1: tl.constexpr, HAS_BATCH: tl.constexpr, WEIGHED: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Transpose of ``switched_forward_kernel``; what it writes is as in ``rows_backward_kernel``.

    Six sums an example are for the shares: of the means', then of the variances'.
    """
    k = tl.arange(0, BR)
    inside = k < C
    at = tl.program_id(0).to(tl.int64) * C + k
    m = tl.load(mean + at, mask=inside, other=0.0)
    v = tl.load(var + at, mask=inside, other=0.0)
    gs = tl.load(grad_scale + at, mask=inside, other=0.0).to(tl.float64)
    gc = tl.load(grad_center + at, mask=inside, other=0.0).to(tl.float64)
    weight = of_channels(first, k, inside, 1, 1.0, HAS1)
    M, V = batch_moments(  # noqa: N806
        m, v, batch_mean, batch_var, k, inside, own_high, own_low, HAS_BATCH, WEIGHED
    )
    d, layer_mean, layer_var, _ = group_stage(m, v, inside, C, eps_high, eps_low)
    a0, a1, a2 = shares(mean_logits, 3 if HAS_BATCH else 2)
    b0, b1, b2 = shares(var_logits, 3 if HAS_BATCH else 2)
    apart = m - a0 * m - a1 * layer_mean - a2 * M
    r = root(b0 * v + b1 * layer_var + b2 * V, eps_high, eps_low)
    of_var = tl.where(inside, -0.5 * (gs + gc * apart) * weight * r * r * r, 0.0)
    of_mean = tl.where(inside, -gc * weight * r, 0.0)
    all_mean = tl.sum(of_mean, axis=0)
    all_var = tl.sum(of_var, axis=0)
    through = (a0 - 1.0) * of_mean + (a1 * all_mean + b1 * all_var * 2.0 * d) / C
    tl.store(k1 + at, r * weight, mask=inside)
    tl.store(dmean + at, through, mask=inside)
    tl.store(dvar + at, b0 * of_var + b1 * all_var / C, mask=inside)
    tl.store(to_mean + at, a2 * of_mean, mask=inside)
    tl.store(to_var + at, b2 * of_var, mask=inside)
    tl.store(of_first + at, (gs + gc * apart) * r, mask=inside)
    tl.store(of_second + at, gc, mask=inside)
    own = scalars + tl.program_id(0) * 6
    tl.store(own, tl.sum(of_mean * m, axis=0))
    tl.store(own + 1, all_mean * layer_mean)
    tl.store(own + 2, tl.sum(of_mean * M, axis=0))
    tl.store(own + 3, tl.sum(of_var * v, axis=0))
    tl.store(own + 4, all_var * layer_var)
    tl.store(own + 5, tl.sum(of_var * V, axis=0))
