"""Mean and variance of every cell of a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and biased variance of each cell, in the unit of ``x`` and of ``x`` squared.

    The cells are segments ``(N, K)``, or after pooling statistics groups ``(B, G)``. ``count`` is
    the number of values in each cell; None if all cells have equally many.
    """

    mean: Tensor
    var: Tensor
    count: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Moments:
        """Apply a function to every table."""
        return Moments(fn(self.mean), fn(self.var), None if self.count is None else fn(self.count))

    def counted(self, segment_size: int) -> Moments:
        """Return the same moments with a ``count``, which is ``segment_size`` if there was none."""
        if self.count is not None:
            return self
        return Moments(self.mean, self.var, torch.full_like(self.mean, segment_size))

    def detach(self) -> Moments:
        """Return the same moments without a gradient."""
        return self.map(lambda t: t.detach())  # not Tensor.detach: a table may be a Symbol

    def transform(self, scale: Tensor, center: Tensor) -> Moments:
        r"""Moments of :math:`y = scale \cdot (x - mean) + center`, computed without ``x``."""
        return Moments(center, scale.square() * self.var, self.count)

    def blend(self, other: Moments, weight: float | Tensor) -> Moments:
        r"""Moments of a mixture: ``weight`` parts of ``self``, ``1 - weight`` parts of ``other``.

        .. math::  m = \alpha m_1 + (1-\alpha) m_2, \quad
                   v = \alpha v_1 + (1-\alpha) v_2 + \alpha (1-\alpha) (m_1 - m_2)^2

        This is ``E[x^2] - mean^2`` in a form that cannot be negative.
        """
        spread = weight * self.var + (1 - weight) * other.var
        between = weight * (1 - weight) * (self.mean - other.mean).square()
        # torch.lerp computes from the end that the weight is nearer to, which keeps more digits
        # than weight * m1 + (1 - weight) * m2 if one of the means is large.
        mean = torch.lerp(other.mean.to(self.mean.dtype), self.mean, weight)
        return Moments(mean, spread + between, self.count)
