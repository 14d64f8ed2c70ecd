"""Composites: two passes over the map each way, and between them two launches on tables.

Where a segment is shared by several programs, as on few and large channels, one more adds up its
parts. What is computed is ``core.composite``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.kernels.calls import Batch, BatchSource, Buffers, Options, Slots
from normkit.kernels.reference import table_dtype
from normkit.kernels.triton import composite_tables, passes
from normkit.kernels.triton.composite_tables import Call, Known, Source
from normkit.kernels.triton.geometry import Grouping, Layout, Map, result_like
from normkit.kernels.triton.passes import Follower, Table

MOST_CHANNELS = 4096  # of a group, which one program holds


def forward(
    x: Tensor, parameters: Slots, options: Options, buffers: Buffers
) -> tuple[Tensor, Tensor]:
    """``y`` and the table of moments; running statistics move in the kernels."""
    composite, batch = options
    y = result_like(x)
    maps = Map.of(x), Map.of(y)
    grouping = Grouping.of(x, x.shape[1], 1)
    layout = Layout.of(grouping, *maps)
    known = Known.of(composite, x)
    source = _measure(maps[0], known, batch, buffers)
    scale, center = known.mean.new_empty((2, *known.mean.shape)).unbind()
    call = Call.of(composite, batch, grouping, parameters)
    composite_tables.forward(call, known, source, (scale, center))
    passes.apply_segments(*maps, layout, (_rows(known.mean), _rows(scale), _rows(center)))
    return y, known.table


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


def backward(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    parameters: Slots,
    options: Options,
    wanted: int,
) -> tuple[Tensor, ...]:
    """Gradient of x, and those of the parameters that are wanted, flat."""
    dx = result_like(x)
    maps = Map.of(grad), Map.of(x), Map.of(dx)
    grouping = Grouping.of(x, x.shape[1], 1)
    layout = Layout.of(grouping, *maps)
    known = Known.of(options[0], x, table)
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
