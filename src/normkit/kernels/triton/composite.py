"""Composites: two passes over the map each way, and between them two launches on tables.

Where a segment is shared by several programs, as on few and large channels, one more adds up its
parts. What is computed is ``core.composite``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.kernels.cpu.composite import Batch, Buffers, Composite, Options, Slots
from normkit.kernels.cpu.kinds import BatchSource, Kind
from normkit.kernels.reference import table_dtype
from normkit.kernels.triton import composite_tables, passes
from normkit.kernels.triton.composite_tables import Call, Known, Source
from normkit.kernels.triton.geometry import Grouping, Layout, Map, result_like
from normkit.kernels.triton.passes import Follower, Table

MOST_CHANNELS = 4096  # of a group, which one program holds


def can_compute(x: Tensor, composite: Composite) -> bool:
    """Whether these kernels compute a composite on a map."""
    return composite.kind == Kind.HALVES or x.shape[1] <= MOST_CHANNELS


def forward(
    x: Tensor, parameters: Slots, options: Options, buffers: Buffers
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise; running statistics move in the kernels.

    Returns:
        ``y``, the table of moments, and means and variances ``(2, N * G)`` of groups that come
        before the batch, else ``(2, 0)``.
    """
    composite, batch = options
    y = result_like(x)
    maps = Map.of(x), Map.of(y)
    grouping = Grouping.of(x, x.shape[1], 1)
    layout = Layout.of(grouping, *maps)
    num_cells = grouping.N * grouping.C + composite.num_batch_channels(x)
    num_groups = num_kept_groups(x, composite)
    groups = x.new_empty((2, num_groups), dtype=torch.float64)
    known = Known.of(x.new_empty((2, num_cells), dtype=torch.float64), groups, x)
    source = _measure(maps[0], known, batch, buffers)
    scale, center = known.mean.new_empty((2, *known.mean.shape)).unbind()
    call = Call.of(composite, batch, grouping, parameters)
    composite_tables.forward(call, known, source, (scale, center))
    _count_change(source.follower)
    passes.apply_segments(*maps, layout, (_rows(known.mean), _rows(scale), _rows(center)))
    return y, known.table, groups


def num_kept_groups(x: Tensor, composite: Composite) -> int:
    """Groups whose statistics backward reads."""
    return x.shape[0] * composite.num_groups if composite.kind == Kind.GROUP_FIRST else 0


def _measure(x: Map, known: Known, batch: Batch, buffers: Buffers) -> Source:
    """Moments of channels, as ``primitives.moments`` finds them to the bit: a checkpoint asks.

    Estimates that are given, not followed, are moved in copies.
    """
    grouping = Grouping.of(x.tensor, x.tensor.shape[1], 1)
    layout = Layout.of(grouping, x)
    parts = passes.measure(x, layout, (known.mean, known.var))
    if parts.stream.splits > 1:
        passes.pool_rows(parts, layout, 1, (known.mean, known.var))
    given, follower = None, None
    given_mean, given_var, mean, var, counter = buffers
    if batch.source == BatchSource.GIVEN:
        if given_mean is None or given_var is None:
            raise RuntimeError("given statistics are a mean and a variance")
        given = given_mean.contiguous(), given_var.contiguous()
    elif given_mean is not None and given_var is not None:
        follower = Follower(given_mean.clone(), given_var.clone(), None, batch.rate, True)
    elif mean is not None and var is not None:
        estimated = batch.source == BatchSource.ESTIMATES
        follower = Follower(mean, var, counter, batch.rate, estimated)
    return Source(parts, layout, given, follower)


def _rows(table: Tensor) -> Table:
    return Table(table, table.shape[1])


def _count_change(follower: Follower | None) -> None:
    """Tell autograd of buffers that a kernel has moved."""
    for buffer in () if follower is None else (follower.mean, follower.var, follower.counter):
        if buffer is not None:
            torch.autograd.graph.increment_version(buffer)


def backward(
    grad: Tensor,
    x: Tensor,
    kept: tuple[Tensor, Tensor],
    parameters: Slots,
    options: Options,
    wanted: int,
) -> tuple[Tensor, ...]:
    """Gradient of x, and those of the parameters that are wanted, flat."""
    dx = result_like(x)
    maps = Map.of(grad), Map.of(x), Map.of(dx)
    grouping = Grouping.of(x, x.shape[1], 1)
    layout = Layout.of(grouping, *maps)
    known = Known.of(*kept, x)
    parts = passes.reduce(maps[0], maps[1], layout, _rows(known.mean))
    sums = passes.sum_rows(parts.first, parts.second, parts.stream.splits)
    call = Call.of(*options, grouping, parameters)
    factors, found = composite_tables.backward(call, known, sums)
    first, second, third = (_rows(factor) for factor in factors)
    passes.combine_segments(maps, layout, _rows(known.mean), (first, second, third))
    dtype = table_dtype(x.dtype)
    return dx, *(
        _as_parameter(gradient, parameter, dtype)
        if wanted >> i & 1 and gradient is not None and parameter is not None
        else x.new_empty(0, dtype=dtype)
        for i, (gradient, parameter) in enumerate(zip(found, parameters, strict=True))
    )


def _as_parameter(gradient: Tensor, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    if gradient.numel() != parameter.numel():  # a value for each group of channels
        gradient = gradient.view(parameter.numel(), -1).sum(1)
    return gradient.flatten().to(dtype, copy=True)  # an operator's results share no memory
