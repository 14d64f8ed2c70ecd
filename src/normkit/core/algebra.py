"""What single-partition layers do on tables: from moments to one scale and center per segment.

A rule is hashed by identity (``eq=False``), here and in ``composite``: to trace a call of one,
``torch.compile`` of torch 2.11 hashes it before its fields are set.
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
        """Scale and center of every segment."""
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
        """Scale and center of every segment."""
        groups = self.groups(table, running_mean, running_var)
        return standardize(table, groups, self, weight, bias)

    def groups(self, table: Moments, running_mean: GroupTable, running_var: GroupTable) -> Moments:
        """Statistics of every group, ``(B, G)``: one row where all is the running ones."""
        running = Moments(running_mean, running_var)
        weight = self.example_weight
        if not isinstance(weight, Tensor) and weight == 0:
            return running
        own = self.partition.pool(table)
        if isinstance(weight, Tensor):
            return own.blend(running, weight.to(own.mean.dtype))
        # At 1 the running statistics have no say, even where they are not finite.
        return own if weight == 1 else own.blend(running, weight)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EstimatedStatistics:
    r"""Normalise by running estimates that have just moved towards the batch.

    .. math::  \hat m \leftarrow \hat m + r (\mu - \hat m), \quad
               \hat v \leftarrow \hat v + r (\overline{(x - \hat m_{old})^2} - \hat v)

    No gradient flows through the estimates.

    Source:
        Qiao, Wang, Liu, Shen & Yuille, Micro-Batch Training with Batch-Channel Normalization and
        Weight Standardization, Algorithm 1.
    """

    partition: Partition  # the whole batch
    eps: float

    def __call__(  # noqa: PLR0913 - a table, the parameters, and what the rule is given
        self,
        table: Moments,
        weight: PerChannel | None,
        bias: PerChannel | None,
        old_mean: GroupTable,
        old_var: GroupTable,
        rate: Tensor,
        rows: Tensor | None = None,
    ) -> Affine:
        """Scale and center of every segment."""
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
        """Estimates after this batch, ``(1, G)``; ``rows`` are what several processes saw of it.

        The rate is data like the old estimates: a checkpoint's second look brings others.
        """
        batch = self.partition.pool(table.detach()) if rows is None else merge(rows)
        if rows is not None:
            batch = batch.map(lambda t: t.to(old_mean.dtype))
        if batch.count is not None:
            rate = rate * (batch.count > 0)  # a channel without valid values moves nothing
        distance = (batch.mean - old_mean).square() + batch.var  # mean of (x - old_mean)^2
        mean = old_mean + rate * (batch.mean - old_mean)
        return Moments(mean, old_var + rate * (distance - old_var), batch.count)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SynchronizedStatistics:
    """Normalise by the statistics of all processes' batches together."""

    partition: Partition  # the whole batch
    gathered: Partition  # what is exchanged: the same, or finer
    eps: float
    ranks: dist.ProcessGroup

    def __call__(
        self, table: Moments, weight: PerChannel | None, bias: PerChannel | None, rows: Tensor
    ) -> Affine:
        """Scale and center of every segment."""
        return standardize(table, self.groups(table, rows), self, weight, bias)

    def groups(self, table: Moments, rows: Tensor) -> Moments:
        """Statistics of every group, ``(1, G)``."""
        own = self.gathered.pool(table.counted(1))  # counted: an empty part has no mean
        return self.partition.pool(merge_with_own(rows, own, self.ranks))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SynchronizedRuns:
    """Normalise by the statistics of runs of examples that may span several processes' batches."""

    partition: Partition  # runs of examples of all processes
    eps: float
    ranks: dist.ProcessGroup
    place: slice  # of this process's examples

    def __call__(
        self,
        table: Moments,
        weight: PerChannel | None,
        bias: PerChannel | None,
        mean: SegmentTable,
        var: SegmentTable,
        count: SegmentTable,
    ) -> Affine:
        """Scale and center of every segment."""
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
"""Where a stage takes its statistics from: own groups, a mixture with running ones, estimates,
the groups of several processes."""


def standardize(
    table: Moments,
    groups: Moments,
    rule: Rule | SynchronizedRuns,
    weight: PerChannel | None,
    bias: PerChannel | None,
) -> Affine:
    """Scale and center that give every group mean 0 and variance 1, then the channel's affine."""
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
    """Tables of mean, scale and center that normalise by given group statistics ``(B, G)``."""
    num_segments = math.prod(shape[1:]) // partition.segment_size(shape)
    mean, var = (partition.expand(t, shape[0], num_segments) for t in (groups.mean, groups.var))
    weight, bias, eps = parameters
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * per_segment(weight, mean)
    return mean, scale, torch.zeros_like(mean) if bias is None else per_segment(bias, mean)


def per_segment(values: PerChannel, like: SegmentTable) -> SegmentTable:
    """Repeat one value a channel, ``(C,)``, over the channel's segments: ``(1, K)``."""
    if isinstance(values, Symbol):
        return values.repeat_columns(like.shape[1] // values.shape[1])
    repeats = like.shape[1] // values.shape[0]
    return values.to(like.dtype)[:, None].expand(-1, repeats).reshape(1, -1)
