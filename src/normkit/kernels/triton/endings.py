# triton declares that functions which kernels call never return, so pyright finds dead code
# pyright: reportGeneralTypeIssues=false
"""Activations and their gradients, for kernels that apply them to values in registers.

``ACT`` is a number of ``kernels.activations.Kind``. ``ADDED`` says which map a backward kernel
reads beside ``x``: none (0), the residual (1), or the result (2), which has the sign of the
activation's input.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton.device import join

ROOT_HALF = tl.constexpr(0.70710678118654752440)
DENSITY_AT_0 = tl.constexpr(0.39894228040143267794)


@triton.jit
def slope_of(high, low, ACC: tl.constexpr):
    """The slope of a leaky ReLU below 0, which a kernel is given in two parts."""
    return join(high, low).to(ACC)


@triton.jit
def logistic(u):
    """``1 / (1 + exp(-u))``, computed by ``exp(-abs(u))``, which cannot overflow."""
    e = tl.exp(-tl.abs(u))
    return tl.where(u < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def hyperbolic_tangent(u):
    """``tanh(u)``; the absolute error is about that of rounding 1."""
    e = tl.exp(-2.0 * tl.abs(u))
    size = (1.0 - e) / (1.0 + e)
    return tl.where(u < 0.0, -size, size)


@triton.jit
def normal_share(u):
    """The cumulative distribution function of the standard normal distribution."""
    return 0.5 * (1.0 + tl.erf(u * ROOT_HALF))


@triton.jit
def clamped(u, least, most):
    """``u`` limited to an interval; NaN stays NaN."""
    return tl.where(u < least, least, tl.where(u > most, most, u))


@triton.jit
def activated(u, slope, ACT: tl.constexpr):  # noqa: C901 - a branch for each
    """``act(u)``; ``u`` itself without an activation."""
    if ACT == 1:  # relu
        u = tl.where(u <= 0.0, 0.0, u)
    if ACT == 2:  # leaky_relu
        u = tl.where(u <= 0.0, slope * u, u)
    if ACT == 3:  # silu
        u = u * logistic(u)
    if ACT == 4:  # gelu
        u = u * normal_share(u)
    if ACT == 5:  # hardswish
        u = u * clamped(u + 3.0, 0.0, 6.0) / 6.0
    if ACT == 6:  # sigmoid
        u = logistic(u)
    if ACT == 7:  # tanh
        u = hyperbolic_tangent(u)
    if ACT == 8:  # relu6
        u = clamped(u, 0.0, 6.0)
    return u


@triton.jit
def passed_back(grad, u, slope, ACT: tl.constexpr):  # noqa: C901
    """``grad * act'(u)``."""
    if ACT == 1:
        grad = tl.where(u <= 0.0, 0.0, grad)
    if ACT == 2:
        grad = tl.where(u <= 0.0, slope * grad, grad)
    if ACT == 3:
        share = logistic(u)
        grad = grad * (share * (1.0 + u * (1.0 - share)))
    if ACT == 4:
        grad = grad * (normal_share(u) + u * (tl.exp(-0.5 * u * u) * DENSITY_AT_0))
    if ACT == 5:
        inside = grad * (u / 3.0 + 0.5)
        grad = tl.where(u < -3.0, 0.0, tl.where(u <= 3.0, inside, grad))
    if ACT == 6:
        share = logistic(u)
        grad = grad * (share * (1.0 - share))
    if ACT == 7:
        y = hyperbolic_tangent(u)
        grad = grad * (1.0 - y * y)
    if ACT == 8:
        grad = tl.where((u <= 0.0) | (u >= 6.0), 0.0, grad)
    return grad


@triton.jit
def gradient_of_sum(grad, u, added, slope, ADDED: tl.constexpr, ACT: tl.constexpr):
    """The gradient of ``norm(x) + residual``, for ``u = norm(x)``."""
    if ADDED == 1:
        u = u + added.to(u.dtype)
    if ADDED == 2:
        u = added.to(u.dtype)
    return passed_back(grad, u, slope, ACT)
