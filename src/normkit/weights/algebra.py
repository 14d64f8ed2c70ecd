"""The reparametrisations as functions of each filter's mean and variance.

A weight is read as a feature map with one segment for each filter. Every reparametrisation is then
one scale and one center for each filter, which the kernels of the layers apply and differentiate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from normkit.core.algebra import per_segment
from normkit.core.check import require_eps
from normkit.core.moments import Moments
from normkit.core.normalize import Affine
from normkit.errors import OptionError
from normkit.typing import PerChannel, SegmentTable

EpsTo = Literal["variance", "std"]


class FilterAlgebra(Protocol):
    """Computes the scale and center of every filter from its moments, its gain and its offset."""

    def __call__(
        self, table: Moments, gain: PerChannel | None, offset: PerChannel | None
    ) -> Affine:
        """Return the scale and center of every filter."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Standardize:
    """Subtract each filter's mean and divide by its standard deviation.

    The options are those of ``normkit.weights.standardize``; each of the two steps can be left out.
    """

    fan_in: int
    center: bool = True
    scale: bool = True
    eps: float = 1e-5
    unbiased: bool = False
    eps_to: EpsTo = "variance"

    def __post_init__(self) -> None:
        require_eps(self.eps)
        if self.eps_to not in ("variance", "std"):
            raise OptionError(f"eps_to={self.eps_to!r} was given; it must be 'variance' or 'std'")

    @property
    def is_plain(self) -> bool:
        """Whether this is what norm layers compute, so that their pooled kernels can do it."""
        plain = self.center and self.scale and not self.unbiased and self.eps_to == "variance"
        return plain and self.eps > 0

    def __call__(
        self, table: Moments, gain: PerChannel | None, offset: PerChannel | None
    ) -> Affine:
        """Return the scale and center of every filter."""
        # Without scale the factor is 1. ``var - var`` connects it to the graph, so that autograd
        # returns a zero gradient instead of an error about an unused input.
        factor = self.factor(table) if self.scale else 1 + (table.var - table.var)
        return _affine(factor, _kept_mean(table, self.center), gain, offset)

    def factor(self, table: Moments) -> SegmentTable:
        """Return one over the standard deviation."""
        var = table.var
        if self.unbiased:
            var = var * (self.fan_in / max(self.fan_in - 1, 1))
        # The square root has an infinite derivative at 0, which would give NaN gradients. Where the
        # variance is 0, take the root of 1 instead and replace the result, so the gradient is 0.
        positive = var > 0
        if self.eps_to == "variance":
            if self.eps > 0:
                return torch.rsqrt(var + self.eps)
            return torch.where(positive, torch.rsqrt(torch.where(positive, var, 1)), 0)
        std = torch.where(positive, torch.where(positive, var, 1).sqrt(), 0)
        divisor = std + self.eps
        return torch.where(divisor > 0, 1 / torch.where(divisor > 0, divisor, 1), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitLength:
    """Divide each filter by its length; if ``center``, subtract its mean first."""

    fan_in: int
    center: bool
    eps: float

    def __post_init__(self) -> None:
        require_eps(self.eps)

    def __call__(
        self, table: Moments, gain: PerChannel | None, offset: PerChannel | None
    ) -> Affine:
        """Return the scale and center of every filter."""
        return _affine(self.factor(table), _kept_mean(table, self.center), gain, offset)

    def factor(self, table: Moments) -> SegmentTable:
        """Return one over the length."""
        mean_square = table.var if self.center else table.var + table.mean.square()
        return torch.rsqrt(mean_square + self.eps / self.fan_in) / math.sqrt(self.fan_in)


def _kept_mean(table: Moments, center: bool) -> SegmentTable:
    """Return each filter's mean, or zeros if ``center`` subtracts it."""
    # ``mean - mean`` rather than zeros keeps the result connected to the autograd graph.
    return table.mean - table.mean if center else table.mean


def _affine(
    factor: SegmentTable, kept_mean: SegmentTable, gain: Tensor | None, offset: Tensor | None
) -> Affine:
    """Combine the factor, the mean that is kept, the gain and the offset into scale and center."""
    scale = factor if gain is None else factor * per_segment(gain, factor)
    center = kept_mean * scale
    return Affine(scale, center if offset is None else center + per_segment(offset, center))
