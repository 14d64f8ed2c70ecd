"""Which elements of a feature map share their mean and variance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from normkit.core.moments import Moments
from normkit.core.symbol import Symbol
from normkit.core.transforms import known_size
from normkit.errors import PartitionError
from normkit.typing import FeatureMap, GroupTable, SegmentTable


class Partition(NamedTuple):
    """Statistics groups: runs of examples times equal runs of the flattened ``(C, *S)`` axis.

    ===================  ===============  ======================
    layer                ``num_groups``   ``examples_per_group``
    ===================  ===============  ======================
    BatchNorm            C                None (whole batch)
    InstanceNorm         C                1
    LayerNorm            1                1
    GroupNorm            G                1
    BatchGroupNorm       G                None
    GhostBatchNorm       C                ghost batch size
    GBGN                 G                run of examples
    ===================  ===============  ======================

    Args:
        num_groups: Number of equal runs that an example is cut into. A run may cover many
            channels, or be a part of one.
        examples_per_group: Consecutive examples that share statistics; None is the whole batch.
            If it does not divide the batch, the last run is the smaller remainder.
    """

    num_groups: int
    examples_per_group: int | None = None

    def segment_size(self, shape: Sequence[int]) -> int:
        """Number of elements ``L`` in a segment: the largest run within one channel and one group.

        Raises:
            PartitionError: If the groups do not divide an example of this shape.
        """
        num_channels = shape[1]
        if num_channels % self.num_groups == 0:
            return math.prod(shape[2:])
        num_positions = math.prod([known_size(size) for size in shape[2:]])
        example_size = num_channels * num_positions
        example = f"an example of shape {tuple(shape[1:])} has {example_size} elements"
        require_divides(self.num_groups, example_size, example)
        return _greatest_common_divisor(num_positions, example_size // self.num_groups)

    def group_sizes(self, shape: Sequence[int]) -> tuple[int, int]:
        """Number of elements in a full group and in the last group, which may be smaller."""
        num_examples, per_example = shape[0], math.prod(shape[1:]) // self.num_groups
        if self.examples_per_group is None or self.examples_per_group >= num_examples:
            return num_examples * per_example, num_examples * per_example
        run = self.examples_per_group
        return run * per_example, ((num_examples - 1) % run + 1) * per_example

    def describe_group(self, shape: Sequence[int]) -> str:
        """Describe the smallest group of a feature map of this shape."""
        num_examples, num_channels, num_positions = shape[0], shape[1], math.prod(shape[2:])
        examples = (num_examples - 1) % self._examples(num_examples) + 1
        size = num_channels * num_positions // self.num_groups
        channels = f"{max(size // max(num_positions, 1), 1)} of {num_channels} channels"
        positions = f"{min(size, num_positions)} of {num_positions} positions"
        return f"a group of {examples} of {num_examples} examples, {channels}, {positions}"

    def pool(self, table: Moments) -> Moments:
        """Pool segments ``(N, K)`` into groups ``(B, G)`` by the law of total variance.

        Segments without a ``count`` have equally many elements, so plain means are exact. The
        variance is a sum of squares, so it is never negative and nothing cancels. A counted group
        without any value has mean 0 and variance 1.
        """
        if isinstance(table.mean, Symbol):
            over_examples = self.examples_per_group is None
            return Moments(*table.mean.pooled(table.var, self.num_groups, over_examples))
        num_examples = table.mean.shape[0]
        if self.examples_per_group is None:
            return self._pool_runs(table, 1, num_examples)
        if self.examples_per_group == 1:
            return self._pool_runs(table, num_examples, 1)
        return self._pool_with_remainder(table, self._examples(num_examples))

    def expand(self, groups: GroupTable, num_examples: int, num_segments: int) -> SegmentTable:
        """Repeat each group's value for its segments: ``(B, G)`` to ``(N, K)``, or ``(1, K)``."""
        rows, columns = groups.shape[0], num_segments // self.num_groups
        if isinstance(groups, Symbol):
            return groups.repeat_columns(columns)
        table = groups.unsqueeze(-1).expand(-1, -1, columns).reshape(rows, num_segments)
        if rows == 1 or self.examples_per_group == 1:
            return table
        return table.repeat_interleave(self._examples(num_examples), dim=0)[:num_examples]

    def _examples(self, num_examples: int) -> int:
        if self.examples_per_group is None:
            return max(num_examples, 1)
        return min(self.examples_per_group, max(num_examples, 1))

    def _pool_with_remainder(self, table: Moments, run: int) -> Moments:
        num_runs, rest = table.mean.shape[0] // run, table.mean.shape[0] % run
        if rest == 0:
            return self._pool_runs(table, num_runs, run)
        whole = num_runs * run
        first = self._pool_runs(table.map(lambda t: t[:whole]), num_runs, run)
        last = self._pool_runs(table.map(lambda t: t[whole:]), 1, rest)
        counts = (first.count, last.count)
        return Moments(
            torch.cat([first.mean, last.mean]),
            torch.cat([first.var, last.var]),
            None if first.count is None else torch.cat([c for c in counts if c is not None]),
        )

    def _pool_runs(self, table: Moments, num_runs: int, run: int) -> Moments:
        cells = (num_runs, run, self.num_groups, table.mean.shape[1] // self.num_groups)
        mean, var = table.mean.reshape(cells), table.var.reshape(cells)
        if table.count is not None:
            return _pool_counted(mean, var, table.count.reshape(cells))
        pooled = mean.mean(dim=(1, 3))
        between = (mean - pooled[:, None, :, None]).square()
        return Moments(pooled, (var + between).mean(dim=(1, 3)))


def _pool_counted(mean: Tensor, var: Tensor, count: Tensor) -> Moments:
    """Pool cells ``(B, run, G, columns)`` that have different numbers of values."""
    total = count.sum(dim=(1, 3))
    share = count / total.clamp(min=1)[:, None, :, None]
    pooled = (share * mean).sum(dim=(1, 3))
    between = (mean - pooled[:, None, :, None]).square()
    spread = (share * (var + between)).sum(dim=(1, 3))
    return Moments(pooled, torch.where(total > 0, spread, 1.0), total)


def divisors(size: int) -> list[int]:
    """All divisors of ``size``, in increasing order."""
    low = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    return low + [size // d for d in reversed(low) if d * d != size]


def _greatest_common_divisor(a: int, b: int) -> int:
    """Compute ``math.gcd`` in steps that ``torch.compile`` can trace."""
    while b:
        a, b = b, a % b
    return a


def largest_divisor(n: int, at_most: int) -> int:
    """Largest divisor of ``n`` that is at most ``at_most``.

    Raises:
        PartitionError: If ``n`` or ``at_most`` is below 1.

    Example:
        >>> largest_divisor(20, at_most=8)
        5
    """
    if n < 1 or at_most < 1:
        raise PartitionError(
            f"largest_divisor was given n={n}, at_most={at_most}; both must be at least 1"
        )
    return max(d for d in divisors(n) if d <= at_most)


def require_divides(num_groups: int, size: int, given: str) -> None:
    """Refuse a number of groups that does not cut ``size`` into equal parts.

    Raises:
        PartitionError: If it does not divide; the message lists the divisors that would.
    """
    if num_groups < 1 or size % num_groups:
        raise PartitionError(
            f"{given}, which {num_groups} groups do not divide; "
            f"choose a divisor: {_shortened(divisors(size))}{_nearest(num_groups, size)}"
        )


def require_variance(partition: Partition, shape: Sequence[int], name: str) -> None:
    """Refuse groups of a single value, whose variance is 0 and whose output is constant.

    Raises:
        PartitionError: If the smallest group has one element.
    """
    if math.prod(shape[1:]) != partition.num_groups:
        return  # each group has several values of every example
    _, smallest = partition.group_sizes(shape)
    if smallest == 1:
        _refuse_single(partition, shape, name)


def require_counted_variance(
    partition: Partition, shape: Sequence[int], groups: Moments, name: str
) -> None:
    """Refuse groups of a single value, where other processes may hold more values of a group.

    Args:
        partition: The groups.
        shape: Shape of this process's part of the batch.
        groups: Statistics of the groups over all processes, with counts.
        name: The called layer or function, for the error message.

    Raises:
        PartitionError: If a group has one element.
    """
    if groups.count is not None and bool((groups.count == 1).any()):
        _refuse_single(partition, (1, *shape[1:]), name)


def _refuse_single(partition: Partition, shape: Sequence[int], name: str) -> NoReturn:
    raise PartitionError(
        f"{name} expected more than 1 value per statistics group when training, got input of "
        f"shape {tuple(shape)}, where {partition.describe_group(shape)} is a single value; "
        f"{_ways_to_more_values(partition, shape)}"
    )


def _ways_to_more_values(partition: Partition, shape: Sequence[int]) -> str:
    """Ways to give the groups of this partition more values."""
    ways = ["a larger map"] if len(shape) > 2 else []
    if shape[1] > 1:
        ways.append("fewer groups, or a norm over several channels (GroupNorm, LayerNorm)")
    run = partition.examples_per_group
    if run is None or run > shape[0]:
        ways.append("a larger batch (DataLoader(drop_last=True) drops a last batch of one)")
    elif run > 1:
        ways.append(f"a batch size that leaves no rest of one when divided by {run}")
    if run != 1:
        ways.append(".eval() to normalise by running statistics")
    return f"use {'; or '.join(ways) or 'inputs with more channels or positions'}"


def has_single_values(x: FeatureMap) -> bool:
    """Whether a channel of an example is one value; if not, no group of channels can be one."""
    return x.numel() == x.shape[0] * x.shape[1]


def _nearest(num_groups: int, size: int) -> str:
    if num_groups < 1 or size < 1:
        return ""
    found = largest_divisor(size, num_groups)
    return f" (max={num_groups} in a spec, or largest_divisor({size}, {num_groups}), is {found})"


def _shortened(numbers: list[int], at_most: int = 24) -> str:
    if len(numbers) <= at_most:
        return str(numbers)
    head = ", ".join(map(str, numbers[: at_most - 1]))
    return f"[{head}, ..., {numbers[-1]}]"
