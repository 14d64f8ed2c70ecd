"""What each reparametrisation does to a filter, as algebra on its mean and variance.

A weight is a feature map with one segment for each filter, so all of them are one scale and one
center a filter, computed and differentiated by the kernels of the layers.
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
    """From a filter's moments, and a gain and an offset for each, to its scale and center."""

    def __call__(
        self, table: Moments, gain: PerChannel | None, offset: PerChannel | None
    ) -> Affine:
        """Scale and center of every filter."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Standardize:
    """Subtract a filter's mean and divide by its standard deviation, or one of the two."""

    fan_in: int
    center: bool = True
    scale: bool = True
    eps: float = 1e-5
    unbiased: bool = False
    eps_to: EpsTo = "variance"

    def __post_init__(self) -> None:
        require_eps(self.eps)
        if self.eps_to not in ("variance", "std"):
            raise OptionError(f"eps_to={self.eps_to!r} was given; it is 'variance' or 'std'")

    @property
    def is_plain(self) -> bool:
        """Whether norm layers do this to maps, so that the pooled kernels compute it."""
        plain = self.center and self.scale and not self.unbiased and self.eps_to == "variance"
        return plain and self.eps > 0

    def __call__(
        self, table: Moments, gain: PerChannel | None, offset: PerChannel | None
    ) -> Affine:
        """Scale and center of every filter."""
        # of a constant autograd could not say that its gradient is 0: hence var - var
        factor = self.factor(table) if self.scale else 1 + (table.var - table.var)
        return _affine(factor, _kept_mean(table, self.center), gain, offset)

    def factor(self, table: Moments) -> SegmentTable:
        """One over the standard deviation."""
        var = table.var
        if self.unbiased:
            var = var * (self.fan_in / max(self.fan_in - 1, 1))
        # the root's slope at 0 is infinite, and 0 times it is NaN: a constant filter gets slope 0
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
    """Divide a filter by its length, if ``center`` after subtracting its mean."""

    fan_in: int
    center: bool
    eps: float

    def __post_init__(self) -> None:
        require_eps(self.eps)

    def __call__(
        self, table: Moments, gain: PerChannel | None, offset: PerChannel | None
    ) -> Affine:
        """Scale and center of every filter."""
        return _affine(self.factor(table), _kept_mean(table, self.center), gain, offset)

    def factor(self, table: Moments) -> SegmentTable:
        """One over the length."""
        mean_square = table.var if self.center else table.var + table.mean.square()
        return torch.rsqrt(mean_square + self.eps / self.fan_in) / math.sqrt(self.fan_in)


def _kept_mean(table: Moments, center: bool) -> SegmentTable:
    """What remains of a filter's mean; zeros that autograd can follow."""
    return table.mean - table.mean if center else table.mean


def _affine(
    factor: SegmentTable, kept_mean: SegmentTable, gain: Tensor | None, offset: Tensor | None
) -> Affine:
    """Multiply the filter by ``factor`` and ``gain``; only ``kept_mean`` of its mean remains."""
    scale = factor if gain is None else factor * per_segment(gain, factor)
    center = kept_mean * scale
    return Affine(scale, center if offset is None else center + per_segment(offset, center))
