"""The algebra of single-partition layers: from a table of moments to scale and center per segment.

Rules are compared and hashed by identity (``eq=False``), here and in ``composite``, because
``torch.compile`` of torch 2.11 hashes a dataclass before its fields are set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from normkit.core.moments import Moments
from normkit.core.normalize import Affine
from normkit.core.parameters import Parameters
from normkit.core.partition import Partition
from normkit.core.ranks import merge, merge_with_own, sum_gradients
from normkit.core.symbol import Symbol
from normkit.typing import GroupTable, PerChannel, SegmentTable


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupStatistics:
    r"""Normalise by the statistics of the input's own groups.

    .. math::  scale = \gamma_c / \sqrt{V_g + \epsilon}, \quad
               center = (mean - M_g) \cdot scale + \beta_c
    """

    partition: Partition
    eps: float

    def __call__(
        self, table: Moments, weight: PerChannel | None, bias: PerChannel | None
    ) -> Affine:
        """Compute scale and center of every segment."""
        return standardize(table, self.groups(table), self, weight, bias)

    def groups(self, table: Moments) -> Moments:
        """Statistics of every group, ``(B, G)``."""
        return self.partition.pool(table)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeighedStatistics:
    """Normalise by a mixture of the example's own statistics and the running ones.

    Source:
        Summers & Dinneen, Four Things Everyone Should Know to Improve Batch Normalization, eq. 3.
    """

    partition: Partition  # one example per group
    eps: float
    example_weight: float | Tensor

    def __call__(
        self,
        table: Moments,
        weight: PerChannel | None,
        bias: PerChannel | None,
        running_mean: GroupTable,
        running_var: GroupTable,
    ) -> Affine:
        """Compute scale and center of every segment."""
        groups = self.groups(table, running_mean, running_var)
        return standardize(table, groups, self, weight, bias)

    def groups(self, table: Moments, running_mean: GroupTable, running_var: GroupTable) -> Moments:
        """Statistics of every group, ``(B, G)``; one row if only running statistics are used."""
        running = Moments(running_mean, running_var)
        weight = self.example_weight
        if not isinstance(weight, Tensor) and weight == 0:
            return running
        own = self.partition.pool(table)
        if isinstance(weight, Tensor):
            return own.blend(running, weight.to(own.mean.dtype))
        # Blending with weight 0 would pass on running statistics that are NaN or infinite.
        return own if weight == 1 else own.blend(running, weight)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EstimatedStatistics:
    r"""Update running estimates with the batch, then normalise by them.

    .. math::  \hat m \leftarrow \hat m + r (\mu - \hat m), \quad
               \hat v \leftarrow \hat v + r (\overline{(x - \hat m_{old})^2} - \hat v)

    No gradient flows through the estimates.

    Source:
        Qiao, Wang, Liu, Shen & Yuille, Micro-Batch Training with Batch-Channel Normalization and
        Weight Standardization, Algorithm 1.
    """

    partition: Partition  # the whole batch
    eps: float

    def __call__(  # noqa: PLR0913 - the table, the parameters, and the arguments of ``groups``
        self,
        table: Moments,
        weight: PerChannel | None,
        bias: PerChannel | None,
        old_mean: GroupTable,
        old_var: GroupTable,
        rate: Tensor,
        rows: Tensor | None = None,
    ) -> Affine:
        """Compute scale and center of every segment."""
        groups = self.groups(table, old_mean, old_var, rate, rows)
        return standardize(table, groups, self, weight, bias)

    def groups(
        self,
        table: Moments,
        old_mean: GroupTable,
        old_var: GroupTable,
        rate: Tensor,
        rows: Tensor | None = None,
    ) -> Moments:
        """Estimates after this batch, ``(1, G)``.

        ``rows`` are the gathered statistics of all processes, if several have parts of the batch.
        The rate is an argument and not a field, because checkpoint recomputation calls the same
        rule with the rate 0.
        """
        batch = self.partition.pool(table.detach()) if rows is None else merge(rows)
        if rows is not None:
            batch = batch.map(lambda t: t.to(old_mean.dtype))
        if batch.count is not None:
            rate = rate * (batch.count > 0)  # without valid values a channel's estimate stays
        distance = (batch.mean - old_mean).square() + batch.var  # mean of (x - old_mean)^2
        mean = old_mean + rate * (batch.mean - old_mean)
        return Moments(mean, old_var + rate * (distance - old_var), batch.count)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SynchronizedStatistics:
    """Normalise by the statistics of the batches of all processes together."""

    partition: Partition  # the whole batch
    gathered: Partition  # the groups whose statistics are exchanged: the same, or smaller ones
    eps: float
    ranks: dist.ProcessGroup

    def __call__(
        self, table: Moments, weight: PerChannel | None, bias: PerChannel | None, rows: Tensor
    ) -> Affine:
        """Compute scale and center of every segment."""
        return standardize(table, self.groups(table, rows), self, weight, bias)

    def groups(self, table: Moments, rows: Tensor) -> Moments:
        """Statistics of every group, ``(1, G)``."""
        own = self.gathered.pool(table.counted(1))  # without counts an empty part would give NaN
        return self.partition.pool(merge_with_own(rows, own, self.ranks))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SynchronizedRuns:
    """Normalise by statistics of runs of examples, which may span several processes' batches."""

    partition: Partition  # runs of examples of all processes
    eps: float
    ranks: dist.ProcessGroup
    place: slice  # this process's examples among those of all processes

    def __call__(
        self,
        table: Moments,
        weight: PerChannel | None,
        bias: PerChannel | None,
        mean: SegmentTable,
        var: SegmentTable,
        count: SegmentTable,
    ) -> Affine:
        """Compute scale and center of every segment."""
        start, stop = self.place.start, self.place.stop
        whole = Moments(
            torch.cat((mean[:start], table.mean.to(mean.dtype), mean[stop:])),
            torch.cat((var[:start], table.var.to(var.dtype), var[stop:])),
            count,
        )
        groups = sum_gradients(self.partition.pool(whole), self.ranks)
        scale, center = standardize(whole, groups, self, weight, bias)
        mine = [t.expand_as(whole.mean)[self.place].to(table.mean.dtype) for t in (scale, center)]
        return Affine(*mine)


Rule = GroupStatistics | WeighedStatistics | EstimatedStatistics | SynchronizedStatistics
"""How a stage gets its statistics: from its own groups, from these mixed with running statistics,
from running estimates, or from the groups of several processes."""


def standardize(
    table: Moments,
    groups: Moments,
    rule: Rule | SynchronizedRuns,
    weight: PerChannel | None,
    bias: PerChannel | None,
) -> Affine:
    """Give every group mean 0 and variance 1, then apply each channel's weight and bias."""
    shape = table.mean.shape

    def spread(values: GroupTable) -> SegmentTable:
        return rule.partition.expand(values, shape[0], shape[1])

    scale = spread(torch.rsqrt(groups.var + rule.eps))
    if weight is not None:
        scale = scale * per_segment(weight, table.mean)
    center = (table.mean - spread(groups.mean)) * scale
    return Affine(scale, center if bias is None else center + per_segment(bias, table.mean))


def fixed_tables(
    groups: Moments, partition: Partition, shape: Sequence[int], parameters: Parameters
) -> tuple[SegmentTable, SegmentTable, SegmentTable]:
    """Tables of mean, scale and center for normalising by given group statistics ``(B, G)``."""
    num_segments = math.prod(shape[1:]) // partition.segment_size(shape)
    mean, var = (partition.expand(t, shape[0], num_segments) for t in (groups.mean, groups.var))
    weight, bias, eps = parameters
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * per_segment(weight, mean)
    return mean, scale, torch.zeros_like(mean) if bias is None else per_segment(bias, mean)


def per_segment(values: PerChannel, like: SegmentTable) -> SegmentTable:
    """Repeat the value of each channel, ``(C,)``, over the channel's segments: ``(1, K)``."""
    if isinstance(values, Symbol):
        return values.repeat_columns(like.shape[1] // values.shape[1])
    repeats = like.shape[1] // values.shape[0]
    return values.to(like.dtype)[:, None].expand(-1, repeats).reshape(1, -1)
