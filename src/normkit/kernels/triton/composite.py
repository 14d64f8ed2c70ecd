"""Composites: two passes over the map each way, and between them two launches on tables.

Where a segment is shared by several programs, as on few and large channels, one more adds up its
parts. What is computed is ``core.composite``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.kernels.calls import BatchSource, Buffers, Options, Slots
from normkit.kernels.reference import table_dtype
from normkit.kernels.triton import composite_tables, passes
from normkit.kernels.triton.composite_tables import Call, Known, Source
from normkit.kernels.triton.geometry import Grouping, Layout, Map, result_like
from normkit.kernels.triton.passes import Follower, Parts, Table
from normkit.kernels.triton.plan import count_change, in_one_piece, planned

MOST_CHANNELS = 4096  # of a group, which one program holds


def forward(
    x: Tensor, parameters: Slots, options: Options, buffers: Buffers
) -> tuple[Tensor, Tensor]:
    """``y`` and the table of moments; running statistics move in the kernels.

    Estimates that are given, not followed, are moved in copies.
    """
    composite, batch = options
    given_mean, given_var, *running = buffers
    if batch.source == BatchSource.GIVEN:
        return planned(_forward, (x, *parameters, given_mean, given_var, None, None, None), options)
    if given_mean is not None and given_var is not None:
        running = given_mean.clone(), given_var.clone(), None
    kind = composite, batch._replace(rate=0.0)
    result = planned(_forward, (x, *parameters, None, None, *running), kind, batch.rate)
    count_change(running)
    return result


def _forward(x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    first, second, third, fourth, mean, var, *running, composite, batch = given
    running_mean, running_var, counter = running
    grouping = Grouping.of(x, x.shape[1], 1)
    source = Map.of(x)
    target = Map.of(result_like(source.tensor))
    layout = Layout.of(grouping, source, target)
    known = Known.of(composite, x)
    parts = _measure(source, known)
    statistics = None if mean is None else (in_one_piece(mean), in_one_piece(var))
    follower = None
    if running_mean is not None:
        is_estimate = batch.source != BatchSource.OWN
        follower = Follower(running_mean, running_var, counter, is_estimate)
    scale, center = known.mean.new_empty((2, *known.mean.shape)).unbind()
    call = Call.of(composite, batch, grouping, (first, second, third, fourth))
    composite_tables.forward(call, known, Source(*parts, statistics, follower), (scale, center))
    passes.apply_segments(source, target, layout, (_rows(known.mean), _rows(scale), _rows(center)))
    return target.tensor, known.table


def _measure(x: Map, known: Known) -> tuple[Parts, Layout]:
    """Moments of channels, as ``primitives.moments`` finds them to the bit: a checkpoint asks."""
    grouping = Grouping.of(x.tensor, x.tensor.shape[1], 1)
    layout = Layout.of(grouping, x)
    return passes.measure_whole(x, layout, (known.mean, known.var)), layout


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
    composite, batch = options
    if batch.source != BatchSource.GIVEN:  # then the rate is no example weight
        options = composite, batch._replace(rate=0.0)
    dx, *sums = planned(_backward, (grad, x, table, *parameters), options)
    found = composite_tables.parameter_gradients(composite, parameters, sums)
    dtype = table_dtype(x.dtype)
    return dx, *(
        _as_parameter(gradient, parameter, dtype)
        if wanted >> i & 1 and gradient is not None and parameter is not None
        else x.new_empty(0, dtype=dtype)
        for i, (gradient, parameter) in enumerate(zip(found, parameters, strict=True))
    )


def _backward(grad: Tensor, x: Tensor, table: Tensor, *given: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    first, second, third, fourth, composite, batch = given
    source = Map.of(x)
    maps = Map.of(grad), source, Map.of(result_like(source.tensor))
    grouping = Grouping.of(x, x.shape[1], 1)
    layout = Layout.of(grouping, *maps)
    known = Known.of(composite, x, in_one_piece(table))
    sums = passes.reduce_whole(maps[0], source, layout, _rows(known.mean))
    call = Call.of(composite, batch, grouping, (first, second, third, fourth))
    factors, found = composite_tables.backward(call, known, sums)
    k1, k2, k3 = (_rows(factor) for factor in factors)
    passes.combine_segments(maps, layout, _rows(known.mean), (k1, k2, k3))
    return maps[2].tensor, *found


def _as_parameter(gradient: Tensor, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    if gradient.numel() != parameter.numel():  # a value for each group of channels
        gradient = gradient.view(parameter.numel(), -1).sum(1)
    return gradient.flatten().to(dtype, copy=True)  # an operator's results share no memory
