# triton declares that functions which kernels call never return, so pyright finds dead code
# pyright: reportGeneralTypeIssues=false
"""Functions that generated kernels call, see ``generated``."""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton.device import join  # noqa: F401 - generated kernels call it


@triton.jit
def root(values):
    """``1 / sqrt(values)``."""
    return 1.0 / tl.sqrt(values)


@triton.jit
def logistic(values):
    """``1 / (1 + exp(-values))``."""
    return 1.0 / (1.0 + tl.exp(-values))


@triton.jit
def shares(values, lanes, COUNT: tl.constexpr):
    """Softmax of the first ``COUNT`` values; the other lanes are 0."""
    raised = tl.where(lanes < COUNT, values, -float("inf"))
    powers = tl.exp(raised - tl.max(raised, axis=0))
    return powers / tl.sum(powers, axis=0)


@triton.jit
def sum_columns(values):
    """Sum of each row of a block ``(rows, groups, channels)``."""
    return tl.sum(tl.sum(values, axis=2), axis=1)[:, None, None]


@triton.jit
def sum_block(values):
    """Sum of a block ``(rows, groups, channels)``."""
    return tl.sum(tl.sum(tl.sum(values, axis=2), axis=1), axis=0)
