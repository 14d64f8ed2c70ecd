r"""Composites as algebra on tables: several norms in a row, or mixed, are one affine map.

A norm maps every segment affinely, so the table gives the moments of its output, and with them the
next norm's statistics: ``mean' = center``, ``var' = scale^2 * var``. Every composite therefore
results in one ``(scale, center)`` per segment. It takes two passes over the map, and backward keeps
``x`` and tables.

Every rule is called as ``rule(table, weight, bias, *given)``; ``given`` are the running mean and
variance ``(1, C)`` if the rule reads them, and nothing in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from normkit.core.algebra import GroupStatistics, Rule, per_segment
from normkit.core.moments import Moments
from normkit.core.normalize import Affine, Algebra
from normkit.core.partition import Partition
from normkit.typing import PerChannel

Order = Literal["group-first", "batch-first", "parallel"]


class Composite(NamedTuple):
    """A composite's formula and options, without the rule of its batch stage.

    The formula is traced once for all calls with an equal composite; the fields are compared, so
    none of them is a tensor.

    Args:
        formula: Called with the batch stage's rule and the options, returns the algebra on tables.
            Its arguments are the moments, the parameters, and the tables that the rule takes.
        options: Numbers of groups, ``eps`` of other norms, an order.
        batch_eps: Added to the batch stage's variances.
        num_beside: Number of first channels that another norm normalises beside the batch stage.
        has_batch: Whether there is a batch stage.
    """

    formula: Callable[..., Algebra]
    options: tuple[float | str, ...]
    batch_eps: float
    num_beside: int = 0
    has_batch: bool = True

    def num_batch_channels(self, num_channels: int) -> int:
        """Number of channels that the batch stage normalises."""
        return num_channels - self.num_beside if self.has_batch else 0

    def algebra(self, batch: Rule) -> Algebra:
        """The algebra on tables if the batch stage has this rule."""
        return self.formula(batch, *self.options)


def batch_input(algebra: Algebra, table: Moments) -> Moments:
    """Moments of the batch stage's input, which running statistics track.

    If the input is not the map itself, the composite's algebra has a method for it.
    """
    own = getattr(algebra, "batch_input", None)
    return table if own is None else own(table)


def own_groups(num_groups: int, eps: float) -> GroupStatistics:
    """Statistics of runs of each example's channels."""
    return GroupStatistics(
        partition=Partition(num_groups=num_groups, examples_per_group=1), eps=eps
    )


def batch_then_group(batch: Rule, num_groups: int, eps: float) -> BatchThenGroup:
    """Formula of batch-channel normalization."""
    return BatchThenGroup(batch=batch, group=own_groups(num_groups, eps))


def group_and_batch(batch: Rule, num_groups: int, eps: float, order: Order) -> GroupAndBatch:
    """Formula of GroupNormPlus."""
    return GroupAndBatch(group=own_groups(num_groups, eps), batch=batch, order=order)


def switched(batch: Rule, eps: float, uses_batch: bool) -> SwitchedStatistics:
    """Formula of switchable normalization."""
    return SwitchedStatistics(
        layer=own_groups(1, eps), batch=batch if uses_batch else None, eps=eps
    )


def instance_beside_batch(batch: Rule, num_instance: int, eps: float) -> InstanceBesideBatch:
    """Formula of IBN-a."""
    return InstanceBesideBatch(instance=own_groups(num_instance, eps), batch=batch)


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
        """Compute scale and center of every segment."""
        first = self.batch(table, batch_weight, batch_bias, *given)
        return chain(first, self.group(table.transform(*first), group_weight, group_bias))


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
        """Compute scale and center of every segment."""
        group, batch = self._stages(table, given)
        share = torch.sigmoid(mix_logit.to(table.mean.dtype))
        scale = share * group.scale + (1 - share) * batch.scale
        center = share * group.center + (1 - share) * batch.center
        return rescale(Affine(scale, center), weight, bias)

    def batch_input(self, table: Moments) -> Moments:
        """Moments of the batch norm's input."""
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
        """Compute scale and center of every segment."""
        sources = [table, self.layer.groups(table)]  # tables that broadcast to (N, C)
        if self.batch is not None:
            sources.append(self.batch.groups(table, *given))
        mean = _mixture(mean_logits, [source.mean for source in sources])
        scale = torch.rsqrt(_mixture(var_logits, [source.var for source in sources]) + self.eps)
        return rescale(Affine(scale, (table.mean - mean) * scale), weight, bias)


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
        """Compute scale and center of every segment."""
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


def chain(first: Affine, second: Affine) -> Affine:
    """Apply ``first``, then ``second``, which normalises the output of ``first``."""
    return Affine(first.scale * second.scale, second.center)


def rescale(unit: Affine, weight: PerChannel | None, bias: PerChannel | None) -> Affine:
    """Apply each channel's weight and bias to the result."""
    scale, center = unit
    if weight is not None:
        factor = per_segment(weight, center)
        scale, center = scale * factor, center * factor
    return Affine(scale, center if bias is None else center + per_segment(bias, center))


def _mixture(logits: Tensor, tables: list[Tensor]) -> Tensor:
    shares = torch.softmax(logits.to(tables[0].dtype), dim=0)
    first, *rest = [share * table for share, table in zip(shares, tables, strict=True)]
    return sum(rest, start=first)
