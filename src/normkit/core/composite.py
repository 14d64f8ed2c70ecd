r"""Composites as algebra: what several norms in a row, or mixed, do to one segment.

A norm maps every segment affinely, so the next norm's statistics follow from the table:
``mean' = center``, ``var' = scale^2 * var``. Whatever the composite, one ``(scale, center)`` per
segment comes out: it costs two passes over the map, and backward keeps ``x`` and tables.

Every rule is called as ``rule(table, weight, bias, *given)``; ``given`` are the running mean and
variance ``(1, C)`` where the rule looks at them, and nothing in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from normkit.core.algebra import GroupStatistics, Rule, per_segment
from normkit.core.moments import Moments
from normkit.core.normalize import Affine
from normkit.typing import PerChannel

Order = Literal["group-first", "batch-first", "parallel"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchThenGroup:
    """A channel-wise norm, then a group norm of its output: batch-channel normalization."""

    batch: Rule
    group: GroupStatistics

    def __call__(
        self,
        table: Moments,
        batch_weight: PerChannel | None,
        batch_bias: PerChannel | None,
        group_weight: Tensor | None,
        group_bias: Tensor | None,
        *given: Tensor,
    ) -> Affine:
        """Scale and center of every segment."""
        first = self.batch(table, batch_weight, batch_bias, *given)
        return chain(first, self.group(table.transform(*first), group_weight, group_bias))

    @staticmethod
    def batch_input(table: Moments) -> Moments:
        """Moments of what the batch norm sees."""
        return table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupAndBatch:
    r"""A learned mixture of a group norm and a batch norm, one of which may feed the other.

    .. math::  y = (s \cdot GN + (1 - s) \cdot BN) \gamma + \beta, \quad s = sigmoid(mix)
    """

    group: GroupStatistics
    batch: Rule
    order: Order

    def __call__(
        self,
        table: Moments,
        weight: PerChannel | None,
        bias: PerChannel | None,
        mix_logit: Tensor,
        *given: Tensor,
    ) -> Affine:
        """Scale and center of every segment."""
        group, batch = self._stages(table, given)
        share = torch.sigmoid(mix_logit.to(table.mean.dtype))
        scale = share * group.scale + (1 - share) * batch.scale
        center = share * group.center + (1 - share) * batch.center
        return rescale(Affine(scale, center), weight, bias)

    def batch_input(self, table: Moments) -> Moments:
        """Moments of what the batch norm sees."""
        if self.order != "group-first":
            return table
        return table.transform(*self.group(table, None, None))

    def _stages(self, table: Moments, given: tuple[Tensor, ...]) -> tuple[Affine, Affine]:
        if self.order == "group-first":
            group = self.group(table, None, None)
            batch = self.batch(table.transform(*group), None, None, *given)
            return group, chain(group, batch)
        batch = self.batch(table, None, None, *given)
        if self.order == "parallel":
            return self.group(table, None, None), batch
        return chain(batch, self.group(table.transform(*batch), None, None)), batch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SwitchedStatistics:
    r"""Normalise by a learned mixture of the statistics of instance, layer and batch norm.

    .. math::  \mu = \sum_k softmax(a)_k \mu_k, \quad \sigma^2 = \sum_k softmax(b)_k \sigma_k^2
    """

    layer: GroupStatistics
    batch: Rule | None
    eps: float

    def __call__(
        self,
        table: Moments,
        weight: PerChannel | None,
        bias: PerChannel | None,
        mean_logits: Tensor,
        var_logits: Tensor,
        *given: Tensor,
    ) -> Affine:
        """Scale and center of every segment."""
        sources = [table, self.layer.groups(table)]  # tables that broadcast to (N, C)
        if self.batch is not None:
            sources.append(self.batch.groups(table, *given))
        mean = _mixture(mean_logits, [source.mean for source in sources])
        scale = torch.rsqrt(_mixture(var_logits, [source.var for source in sources]) + self.eps)
        return rescale(Affine(scale, (table.mean - mean) * scale), weight, bias)

    @staticmethod
    def batch_input(table: Moments) -> Moments:
        """Moments of what the batch norm sees."""
        return table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InstanceBesideBatch:
    """An instance norm on the first channels, a batch norm on the others: IBN-a."""

    instance: GroupStatistics
    batch: Rule

    def __call__(
        self,
        table: Moments,
        instance_weight: PerChannel | None,
        instance_bias: PerChannel | None,
        batch_weight: PerChannel | None,
        batch_bias: PerChannel | None,
        *given: Tensor,
    ) -> Affine:
        """Scale and center of every segment."""
        first, rest = self.split(table)
        left = self.instance(first, instance_weight, instance_bias)
        right = self.batch(rest, batch_weight, batch_bias, *given)
        scale = torch.cat([left.scale, right.scale.expand_as(rest.mean)], dim=1)
        return Affine(scale, torch.cat([left.center, right.center], dim=1))

    def batch_input(self, table: Moments) -> Moments:
        """Moments of the batch norm's channels."""
        return self.split(table)[1]

    def split(self, table: Moments) -> tuple[Moments, Moments]:
        """Moments of the instance norm's channels, and of the batch norm's."""
        half = self.instance.partition.num_groups
        return table.map(lambda t: t[:, :half]), table.map(lambda t: t[:, half:])


CompositeAlgebra = BatchThenGroup | GroupAndBatch | SwitchedStatistics | InstanceBesideBatch
"""What a composite does on tables; ``batch_input`` is what its batch norm sees."""


def chain(first: Affine, second: Affine) -> Affine:
    """Do ``second``, which normalises the output of ``first``, after ``first``."""
    return Affine(first.scale * second.scale, second.center)


def rescale(unit: Affine, weight: PerChannel | None, bias: PerChannel | None) -> Affine:
    """Add the channel's scale and shift after everything else."""
    scale, center = unit
    if weight is not None:
        factor = per_segment(weight, center)
        scale, center = scale * factor, center * factor
    return Affine(scale, center if bias is None else center + per_segment(bias, center))


def _mixture(logits: Tensor, tables: list[Tensor]) -> Tensor:
    shares = torch.softmax(logits.to(tables[0].dtype), dim=0)
    first, *rest = [share * table for share, table in zip(shares, tables, strict=True)]
    return sum(rest, start=first)
