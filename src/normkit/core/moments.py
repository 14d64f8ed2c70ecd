"""Mean and variance of every cell of a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and biased variance of each cell, in the unit of ``x`` and of ``x`` squared.

    The cells are segments ``(N, K)`` as measured, or statistics groups ``(B, G)`` once pooled.
    ``count`` is how many values stand behind each cell; None where all have equally many.
    """

    mean: Tensor
    var: Tensor
    count: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Moments:
        """Do the same to every table."""
        return Moments(fn(self.mean), fn(self.var), None if self.count is None else fn(self.count))

    def counted(self, segment_size: int) -> Moments:
        """Return the same numbers with a ``count``: at first that of the elements of a segment."""
        if self.count is not None:
            return self
        return Moments(self.mean, self.var, torch.full_like(self.mean, segment_size))

    def detach(self) -> Moments:
        """Return the same numbers without a gradient."""
        return self.map(lambda t: t.detach())  # of whatever stands for a table, too

    def transform(self, scale: Tensor, center: Tensor) -> Moments:
        r"""Moments of :math:`y = scale \cdot (x - mean) + center`, without a look at ``x``."""
        return Moments(center, scale.square() * self.var, self.count)

    def blend(self, other: Moments, weight: float | Tensor) -> Moments:
        r"""Moments of a mixture: ``weight`` parts of ``self``, ``1 - weight`` parts of ``other``.

        .. math::  m = \alpha m_1 + (1-\alpha) m_2, \quad
                   v = \alpha v_1 + (1-\alpha) v_2 + \alpha (1-\alpha) (m_1 - m_2)^2

        This is ``E[x^2] - mean^2`` in a form that cannot be negative.
        """
        spread = weight * self.var + (1 - weight) * other.var
        between = weight * (1 - weight) * (self.mean - other.mean).square()
        # lerp starts from the nearer of the two means: a far one would cost digits of the result.
        mean = torch.lerp(other.mean.to(self.mean.dtype), self.mean, weight)
        return Moments(mean, spread + between, self.count)
