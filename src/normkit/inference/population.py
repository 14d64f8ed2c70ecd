"""Statistics over all inputs of a layer, merged exactly from batches of any size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit.core.moments import Moments
from normkit.core.partition import Partition
from normkit.kernels.cpu import primitives
from normkit.kernels.select import decide
from normkit.layers.base import TrackingLayer, is_estimated
from normkit.typing import FeatureMap


class Sums(NamedTuple):
    """Sums over some inputs of a layer; the sums over two sets of inputs can be merged.

    Args:
        num_values: Number of values behind each mean; for torch's instance norms, of examples.
        num_inputs: Number of inputs that were not empty.
        mean: Mean of each statistics group ``(G,)``, float64.
        squares: Sum of the squared distances from the mean; for torch's instance norms, sum of the
            examples' unbiased variances.
    """

    num_values: int
    num_inputs: int
    mean: Tensor
    squares: Tensor


SMALL = 1 << 17  # For fewer values the calls around the C++ kernel cost more than it saves.
EMPTY = Sums(0, 0, torch.zeros(()), torch.zeros(()))


class Population:
    r"""Mean and variance of each of a layer's statistics groups over all of its inputs.

    Batches are merged in float64 and weighted by their counts, so that their sizes and order do
    not matter:

    .. math::  n = n_1 + n_2, \quad \delta = \mu_2 - \mu_1, \quad \mu = \mu_1 + \delta n_2 / n,
               \quad S = S_1 + S_2 + \delta^2 n_1 n_2 / n, \quad \sigma^2 = S / n

    The buffers of torch's instance norms are averages of the examples' statistics with equal
    weights; for them this class computes the same averages.

    Args:
        layer: A layer with running statistics: a norm of torch, or one of normkit, which may be a
            part of a composite. None for the statistics of each channel of any map.
    """

    def __init__(self, layer: nn.Module | None = None) -> None:
        self._layer = layer
        self._averages_examples = isinstance(layer, _InstanceNorm)
        self.sums = EMPTY

    @property
    def count(self) -> int:
        """Number of values behind each mean; for torch's instance norms, of examples."""
        return self.sums.num_values

    @torch.no_grad()
    def add(self, x: FeatureMap, valid: Tensor | None = None) -> None:
        """Add an input of the layer.

        Args:
            x: The input ``(N, C, *S)``.
            valid: The positions that count, ``(N, 1, *S)``; None counts all. Groups that cut
                through a channel's positions need None.
        """
        if x.numel() == 0:
            return
        wide, num_groups = self._grouped(x, valid)
        if valid is not None:
            wide = wide.movedim(1, -1)[valid.squeeze(1)]  # (num_valid, C)
            if wide.numel() == 0:
                return
        count = wide.numel() // num_groups
        if self._averages_examples:
            mean, squares = _two_passes(wide.reshape(wide.shape[0], num_groups, -1), (2,))
            var = squares / max(count // wide.shape[0] - 1, 1)
            self.merge(Sums(wide.shape[0], 1, mean.mean(dim=0), var.sum(dim=0)))
        elif wide.numel() < SMALL or decide(wide).kernels != "cpu":
            cells = wide.reshape(wide.shape[0], num_groups, -1)
            self.merge(Sums(count, 1, *_two_passes(cells, (0, 2))))
        else:
            groups = Partition(num_groups=num_groups)
            table = Moments(*primitives.moments(wide, groups.segment_size(wide.shape)))
            batch = groups.pool(table)
            self.merge(Sums(count, 1, batch.mean[0], batch.var[0] * count))

    def merge(self, other: Sums) -> None:
        """Add the sums over other inputs, for instance another rank's."""
        own = self.sums
        if own.num_values == 0 or other.num_values == 0:
            self.sums = own if other.num_values == 0 else other
            return
        total, step = own.num_values + other.num_values, other.mean - own.mean
        squares = own.squares + other.squares
        if not self._averages_examples:
            # The means of the two sets differ, which adds to the distances from the common mean.
            squares = squares + step.square() * (own.num_values * other.num_values / total)
        mean = own.mean + step * (other.num_values / total)
        self.sums = Sums(total, own.num_inputs + other.num_inputs, mean, squares)

    @property
    def moments(self) -> Moments:
        """Mean and biased variance, ``(G,)`` in float64."""
        return Moments(self.sums.mean, self.sums.squares / max(self.count, 1))

    @property
    def buffers(self) -> Moments:
        """The layer's running mean and variance if all inputs were one batch, ``(G,)``.

        The variance is unbiased, except for the estimates of micro-batch normalization.
        """
        if self._averages_examples or is_estimated(self._layer):
            return self.moments  # The variances of instance norms are unbiased already.
        return Moments(self.sums.mean, self.sums.squares / max(self.count - 1, 1))

    def _grouped(self, x: FeatureMap, valid: Tensor | None) -> tuple[FeatureMap, int]:
        """The values whose statistics are taken, in float64, and the number of groups."""
        layer, wide = self._layer, x.double()
        if isinstance(layer, TrackingLayer):
            return layer.tracked_input(wide, valid), layer.running_partition.num_groups
        return wide, x.shape[1]


def _two_passes(cells: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean, and sum of squared distances from it; many times faster than ``torch.var_mean``."""
    mean = cells.mean(dim=dims, keepdim=True)
    return mean.squeeze(dims), (cells - mean).square_().sum(dim=dims)
