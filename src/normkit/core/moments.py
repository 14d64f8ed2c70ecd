"""Mean and variance of every cell of a table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and biased variance of each cell, in the unit of ``x`` and of ``x`` squared.

    The cells are segments ``(N, K)`` as measured, or statistics groups ``(B, G)`` once pooled.
    """

    mean: Tensor
    var: Tensor

    def detach(self) -> Moments:
        """Return the same numbers without a gradient."""
        return Moments(self.mean.detach(), self.var.detach())

    def transform(self, scale: Tensor, center: Tensor) -> Moments:
        r"""Moments of :math:`y = scale \cdot (x - mean) + center`, without a look at ``x``."""
        return Moments(center, scale.square() * self.var)

    def blend(self, other: Moments, weight: float) -> Moments:
        r"""Moments of a mixture: ``weight`` parts of ``self``, ``1 - weight`` parts of ``other``.

        .. math::  m = \alpha m_1 + (1-\alpha) m_2, \quad
                   v = \alpha v_1 + (1-\alpha) v_2 + \alpha (1-\alpha) (m_1 - m_2)^2

        This is ``E[x^2] - mean^2`` in a form that cannot be negative.
        """
        step = (
            self.mean - other.mean
        )  # not two products of large means: an offset would cost digits
        spread = weight * self.var + (1 - weight) * other.var
        return Moments(other.mean + weight * step, spread + weight * (1 - weight) * step.square())
