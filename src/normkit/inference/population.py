"""Statistics of everything a layer sees, whatever the batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normkit.core.moments import Moments
from normkit.functional import group_norm
from normkit.layers.base import TrackingLayer
from normkit.layers.batch_channel import EstimatedBatchNorm
from normkit.layers.group_plus import GroupNormPlus
from normkit.typing import FeatureMap


class Population:
    r"""Mean and variance of each of a layer's statistics groups over all of its inputs.

    Batches are merged by their counts in float64, so that their sizes and order do not matter:

    .. math::  n = n_1 + n_2, \quad \delta = \mu_2 - \mu_1, \quad \mu = \mu_1 + \delta n_2 / n,
               \quad S = S_1 + S_2 + \delta^2 n_1 n_2 / n, \quad \sigma^2 = S / n

    Args:
        layer: A layer with running statistics: torch's batch norms or one of ours. Composites
            that hold such a layer are asked through it.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self.count = 0
        self._mean = torch.zeros(())
        self._squares = torch.zeros(())

    @torch.no_grad()
    def add(self, x: FeatureMap) -> None:
        """Take an input ``(N, C, *S)`` of the layer into account."""
        if x.numel() == 0:
            return
        cells = self._cells(x)
        count = cells.shape[0] * cells.shape[2]
        var, mean = torch.var_mean(cells, dim=(0, 2), correction=0)
        self._merge(count, mean, var * count)

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if self.count == 0:
            self.count, self._mean, self._squares = count, mean, squares
            return
        total, step = self.count + count, mean - self._mean
        self._mean = self._mean + step * (count / total)
        self._squares = self._squares + squares + step.square() * (self.count * count / total)
        self.count = total

    @property
    def moments(self) -> Moments:
        """Mean and biased variance, ``(G,)`` in float64."""
        return Moments(self._mean, self._squares / max(self.count, 1))

    @property
    def buffers(self) -> Moments:
        """What the layer's running mean and variance are of one batch of everything.

        The variance is unbiased, except of the estimates of micro-batch normalization.
        """
        if isinstance(self._layer, EstimatedBatchNorm):
            return self.moments
        return Moments(self._mean, self._squares / max(self.count - 1, 1))

    def _cells(self, x: Tensor) -> Tensor:
        """Values of each statistics group, ``(N, G, L)``."""
        layer = self._layer
        wide = x.double()
        if isinstance(layer, GroupNormPlus) and layer.order == "group-first":
            wide = group_norm(wide, layer.num_groups, eps=layer.eps)
        groups = x.shape[1]
        if isinstance(layer, TrackingLayer):
            groups = layer.running_partition.num_groups
        return wide.reshape(x.shape[0], groups, -1)
