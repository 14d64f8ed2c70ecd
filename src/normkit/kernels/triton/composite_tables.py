"""Composites between the passes over a map: which kernels work on tables, in which order.

Two launches each way; forward one where the batch stage is given its statistics and comes first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from normkit.kernels.calls import Batch, BatchSource, Composite, Kind, Slots
from normkit.kernels.triton import (
    algebra,
    algebra_first,
    algebra_halves,
    algebra_switched,
    passes,
)
from normkit.kernels.triton.geometry import Grouping, Layout, ceil_div, power_of_two
from normkit.kernels.triton.passes import Follower, Parts
from normkit.kernels.triton.plan import halves, in_one_piece, launch
from normkit.kernels.triton.tables import pool_segments_kernel

ROWS, COLUMNS = 32, 16
Pair = tuple[Tensor, Tensor]


class Known(NamedTuple):
    """What a forward pass knows, float64: the operator's table and its parts.

    Means and variances of channels are ``(N, C)``; of groups that come before the batch
    ``(2, N * G)``, else ``(2, 0)``; of what the batch stage took ``(2, B)``.
    """

    table: Tensor
    mean: Tensor
    var: Tensor
    batch: Tensor
    groups: Tensor

    @classmethod
    def of(cls, composite: Composite, x: Tensor, table: Tensor | None = None) -> Self:
        """The parts of a map's table, or of a new one."""
        shape = (x.shape[0], x.shape[1])
        is_first = composite.kind == Kind.GROUP_FIRST
        sizes = (
            math.prod(shape),
            x.shape[0] * composite.num_groups if is_first else 0,
            composite.num_batch_channels(x),
        )
        if table is None:
            table = x.new_empty((2, sum(sizes)), dtype=torch.float64)
        cells, groups, batch = table.split(sizes, dim=1)
        mean, var = cells.unflatten(1, shape).unbind()
        return cls(table, mean, var, batch, groups)


class Call(NamedTuple):
    """A composite on a map of this cut, as kernels take it."""

    composite: Composite
    batch: Batch
    grouping: Grouping
    parameters: Slots

    @classmethod
    def of(cls, composite: Composite, batch: Batch, grouping: Grouping, given: Slots) -> Self:
        """With parameters as kernels read them."""
        first, second, third, fourth = (None if p is None else in_one_piece(p) for p in given)
        return cls(composite, batch, grouping, (first, second, third, fourth))

    @property
    def group_channels(self) -> int:
        """Channels of a group; of a switched norm all."""
        return self.grouping.C // (1 if self.is_switched else self.composite.num_groups)

    @property
    def is_switched(self) -> bool:
        """Whether statistics, not norms, are mixed."""
        return self.composite.kind in (Kind.SWITCHED, Kind.SWITCHED_WITHOUT_BATCH)

    @property
    def has_batch(self) -> bool:
        """Whether the batch's statistics have a part."""
        return self.composite.kind != Kind.SWITCHED_WITHOUT_BATCH

    @property
    def is_own(self) -> bool:
        """Whether the batch's statistics are the input's own, through which a gradient flows."""
        return self.has_batch and self.batch.source == BatchSource.OWN

    @property
    def is_weighed(self) -> bool:
        """Whether the example's own statistics are blended with the given ones."""
        return self.batch.source == BatchSource.GIVEN and self.batch.rate != 0

    @property
    def share(self) -> tuple[float, float]:
        """Of the example's own statistics, in two parts."""
        return halves(self.batch.rate if self.is_weighed else 0.0)

    @property
    def num_groups(self) -> int:
        """Groups of all examples."""
        return self.grouping.N * self.grouping.C // self.group_channels

    @property
    def eps(self) -> tuple[float, ...]:
        """Of the batch and of the group, in two parts each."""
        return *halves(self.composite.batch_eps), *halves(self.composite.group_eps)

    @property
    def repeat(self) -> int:
        """Channels that share a value of the third and fourth parameter."""
        third = self.parameters[2]
        return 1 if third is None else max(self.grouping.C // third.numel(), 1)

    @property
    def flags(self) -> dict[str, bool]:
        """Which parameters there are."""
        return {f"HAS{i}": p is not None for i, p in enumerate(self.parameters, start=1)}

    @property
    def affine_flags(self) -> dict[str, bool]:
        """Of the first two."""
        return {name: self.flags[name] for name in ("HAS1", "HAS2")}


class Source(NamedTuple):
    """What a forward pass takes the batch stage's statistics from.

    Args:
        parts: Moments of parts of channels.
        layout: How those were measured.
        given: Mean and variance that somebody else gives.
        follower: Buffers that follow the batch, or move first.
    """

    parts: Parts
    layout: Layout
    given: Pair | None
    follower: Follower | None


def _warps(channels: int) -> int:
    return min(max(channels // 128, 1), 8)


def forward(call: Call, known: Known, source: Source, out: Pair) -> None:
    """Scale and center of every channel into ``out``; the rest of ``known`` is written."""
    if call.composite.kind == Kind.GROUP_FIRST:
        _group_first(call, known, source, out)
    elif call.composite.kind == Kind.HALVES:
        _halves_forward(call, known, source, out)
    else:
        _others_forward(call, known, source, out)


def _others_forward(call: Call, known: Known, source: Source, out: Pair) -> None:
    if call.has_batch and source.given is None:
        passes.pool_rows(
            source.parts, source.layout, call.grouping.N, (known.batch[0], known.batch[1]),
            source.follower,
        )  # fmt: skip
    _rows_forward(call, known, source.given, out)


def _rows_forward(call: Call, known: Known, given: Pair | None, out: Pair) -> None:
    size = call.group_channels
    sizes = (call.grouping.C, size, call.repeat, *call.eps, *call.share)
    kernel = algebra.rows_forward_kernel
    flags = {"KIND": int(call.composite.kind), **call.flags}
    if call.is_switched:
        kernel = algebra_switched.switched_forward_kernel
        sizes = (size, *call.eps[:2], *call.share)
        flags = {"HAS_BATCH": call.has_batch, **call.affine_flags}
    batch, kept = (known.batch, (None, None)) if given is None else (given, known.batch)
    launch(
        kernel,
        call.num_groups,
        (known.mean, known.var, *batch, *kept, *call.parameters, *out),
        sizes,
        _warps(size),
        KEEPS=given is not None, WEIGHED=call.is_weighed, BR=power_of_two(size), **flags,
    )  # fmt: skip


def _group_first(call: Call, known: Known, source: Source, out: Pair) -> None:
    """The group norm's statistics, then the batch norm's of what it made, and the mixture."""
    size, grouping = call.group_channels, call.grouping
    launch(
        pool_segments_kernel,
        call.num_groups,
        (known.mean, known.var, *known.groups),
        (size,),
        _warps(size),
        BR=power_of_two(size),
    )
    buffers, flags = passes.follower_arguments(source.follower)
    first, second, logit, _ = call.parameters
    launch(
        algebra_first.columns_forward_kernel,
        ceil_div(grouping.C, COLUMNS),
        (known.mean, known.var, *known.groups, *(source.given or (None, None)), first, second,
         logit, *out, *known.batch, *buffers),
        (grouping.N, grouping.C, size, grouping.L, *call.eps, *call.share),
        HAS1=first is not None, HAS2=second is not None, OWN=call.is_own, WEIGHED=call.is_weighed,
        BK=COLUMNS, BR=_num_rows(grouping), **flags,
    )  # fmt: skip


def _halves_forward(call: Call, known: Known, source: Source, out: Pair) -> None:
    grouping = call.grouping
    buffers, flags = passes.follower_arguments(source.follower)
    launch(
        algebra_halves.halves_forward_kernel,
        ceil_div(grouping.C, COLUMNS),
        (known.mean, known.var, *(source.given or (None, None)), *call.parameters, *out,
         *known.batch, *buffers),
        (grouping.N, grouping.C, call.composite.num_groups, grouping.L, *call.eps, *call.share),
        OWN=call.is_own, WEIGHED=call.is_weighed, CENTERED=not (call.is_own or call.is_weighed),
        BK=COLUMNS, BR=_num_rows(grouping), **call.flags, **flags,
    )  # fmt: skip


def _num_rows(grouping: Grouping) -> int:
    return min(power_of_two(grouping.N), ROWS)


Found = tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""Factors of the gradient, of the map less its mean and of one; what ``parameter_gradients`` reads:
sums of channels ``(rows, C)`` and perhaps of groups ``(groups, 6)``."""


def backward(call: Call, known: Known, sums: Pair) -> Found:
    """Factors and gradients from sums of the gradient, and of its product with the map."""
    ways = {Kind.GROUP_FIRST: _backward_first, Kind.HALVES: _backward_halves}
    return ways.get(call.composite.kind, _backward_rows)(call, known, sums)


def _backward_rows(call: Call, known: Known, sums: Pair) -> Found:
    """Factors, and sums, where the batch sees the map itself."""
    grouping, size, kind = call.grouping, call.group_channels, call.composite.kind
    k1, k2, k3, *tables = known.mean.new_empty((10, *known.mean.shape)).unbind()
    scalars = known.mean.new_empty(call.num_groups, 6)
    if call.is_switched:
        _switched_backward(call, known, sums, (k1, *tables[:-1], scalars))
    else:
        flags = {name: there for name, there in call.flags.items() if name != "HAS4"}
        launch(
            algebra.rows_backward_kernel,
            call.num_groups,
            (known.mean, known.var, *known.batch, *call.parameters, *sums, k1, *tables, scalars),
            (grouping.C, size, call.repeat, *call.eps, *call.share),
            _warps(size),
            KIND=int(kind), WEIGHED=call.is_weighed, BR=power_of_two(size), **flags,
        )  # fmt: skip
    found = known.mean.new_empty(4, grouping.C)
    launch(
        algebra.columns_backward_kernel,
        ceil_div(grouping.C, COLUMNS),
        (known.mean, known.batch[0], sums[0], k1, *tables, k2, k3, found),
        (grouping.N, grouping.C, grouping.L, *call.share),
        OWN=call.is_own, WEIGHED=call.is_weighed, HAS_THIRD=kind == Kind.BATCH_THEN_GROUP,
        BK=COLUMNS, BR=_num_rows(grouping),
    )  # fmt: skip
    return (k1, k2, k3), (found, scalars)


def _switched_backward(call: Call, known: Known, sums: Pair, out: tuple[Tensor, ...]) -> None:
    size, (first, _, mean_logits, var_logits) = call.group_channels, call.parameters
    launch(
        algebra_switched.switched_backward_kernel,
        call.num_groups,
        (known.mean, known.var, *known.batch, first, mean_logits, var_logits, *sums, *out),
        (size, *call.eps[:2], *call.share),
        _warps(size),
        HAS1=first is not None, HAS_BATCH=call.has_batch, WEIGHED=call.is_weighed,
        BR=power_of_two(size),
    )  # fmt: skip


def parameter_gradients(
    composite: Composite, parameters: Slots, sums: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of the four parameters from what a backward pass has summed."""
    of_channels, *of_groups = sums
    kind, (_, _, third, fourth) = composite.kind, parameters
    if kind == Kind.BATCH_THEN_GROUP:
        return of_channels.unbind()
    if kind == Kind.GROUP_FIRST:
        return of_channels[0], of_channels[1], of_channels[2].sum(), None
    if kind == Kind.HALVES:
        half = composite.num_groups
        return *of_channels[:, :half].unbind(), *of_channels[:, half:].unbind()
    total = of_groups[0].sum(dim=0)
    if kind in (Kind.BATCH_FIRST, Kind.PARALLEL):
        return of_channels[0], of_channels[1], total[0], None
    of_mean, of_var = (
        _softmax_gradient(logits, part)
        for logits, part in zip((third, fourth), (total[:3], total[3:]), strict=True)
    )
    return of_channels[0], of_channels[1], of_mean, of_var


def _softmax_gradient(logits: Tensor | None, of_shares: Tensor) -> Tensor | None:
    if logits is None:
        return None
    shares = torch.softmax(logits.double().flatten(), dim=0)
    weighed = shares * of_shares[: shares.numel()]
    return weighed - shares * weighed.sum()


def _backward_first(call: Call, known: Known, sums: Pair) -> Found:
    """Factors, and sums, where the group norm comes first."""
    grouping, size = call.grouping, call.group_channels
    k1, k2, k3, to_center, to_root, dvar = known.mean.new_empty((6, *known.mean.shape)).unbind()
    found = known.mean.new_empty(3, grouping.C)
    first, _, logit, _ = call.parameters
    launch(
        algebra_first.columns_first_backward_kernel,
        ceil_div(grouping.C, COLUMNS),
        (known.mean, known.var, *known.groups, *known.batch, first, logit, *sums,
         to_center, to_root, dvar, k1, found),
        (grouping.N, grouping.C, size, *call.eps, *call.share),
        HAS1=first is not None, OWN=call.is_own, WEIGHED=call.is_weighed,
        BK=COLUMNS, BR=_num_rows(grouping),
    )  # fmt: skip
    launch(
        algebra_first.rows_first_backward_kernel,
        call.num_groups,
        (known.mean, known.var, to_center, to_root, dvar, k1, sums[0], k2, k3),
        (grouping.C, size, grouping.L, *call.eps[2:]),
        _warps(size), BR=power_of_two(size),
    )  # fmt: skip
    return (k1, k2, k3), (found,)


def _backward_halves(call: Call, known: Known, sums: Pair) -> Found:
    """Factors, and sums, where each norm has channels of its own."""
    grouping, half = call.grouping, call.composite.num_groups
    k1, k2, k3 = known.mean.new_empty((3, *known.mean.shape)).unbind()
    found = known.mean.new_empty(2, grouping.C)
    first, _, third, _ = call.parameters
    launch(
        algebra_halves.halves_backward_kernel,
        ceil_div(grouping.C, COLUMNS),
        (known.mean, known.var, *known.batch, first, third, *sums, k1, k2, k3, found),
        (grouping.N, grouping.C, half, grouping.L, *call.eps, *call.share),
        HAS1=first is not None, HAS3=third is not None, OWN=call.is_own, WEIGHED=call.is_weighed,
        BK=COLUMNS, BR=_num_rows(grouping),
    )  # fmt: skip
    return (k1, k2, k3), (found,)
