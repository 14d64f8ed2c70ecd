"""Composites: two passes over the map each way, and between them two launches on tables.

Where a segment is shared by several programs, as on few and large channels, one more adds up its
parts. What is computed is ``core.composite``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.kernels.cpu.composite import Batch, Buffers, Composite, Differentiable, Slots
from normkit.kernels.cpu.functions import cast_gradient, recorder
from normkit.kernels.cpu.kinds import BatchSource, Kind
from normkit.kernels.triton import composite_tables, passes
from normkit.kernels.triton.composite_tables import Call, Known, Source
from normkit.kernels.triton.geometry import Grouping, Layout, Map, result_like
from normkit.kernels.triton.passes import Follower, Table

MOST_CHANNELS = 4096  # of a group, which one program holds


def can_compute(x: Tensor, composite: Composite) -> bool:
    """Whether these kernels compute a composite on a map."""
    return composite.kind == Kind.HALVES or x.shape[1] <= MOST_CHANNELS


def normalize_composite(
    x: Tensor,
    parameters: Slots,
    composite: Composite,
    batch: Batch,
    buffers: Buffers,
    differentiable: Differentiable,
) -> tuple[Tensor, Tensor]:
    """Normalise by a composite of norms; running statistics move in place.

    Arguments and results are those of the C++ kernels' function of the same name.
    """
    wanted = x.requires_grad or any(p is not None and p.requires_grad for p in parameters)
    if torch.is_grad_enabled() and wanted:
        return _RECORD(x, *parameters, (composite, batch), buffers, differentiable)
    y, known = _forward(x, parameters, (composite, batch), buffers)
    return y, known.table


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        *parameters, options, buffers, differentiable = arguments
        y, known = _forward(x, tuple(parameters), options, buffers)
        ctx.save_for_backward(x, known.table, known.groups, *parameters)
        ctx.options, ctx.differentiable = options, differentiable
        ctx.mark_non_differentiable(known.table)
        ctx.set_materialize_grads(False)
        return y, known.table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        if grads[0] is None:
            return (None,) * 8
        return *_gradients(ctx, grads[0]), None, None, None


_RECORD = recorder(_Composite)


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:  # noqa: ANN401
    x, table, groups, *parameters = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:5]
    if torch.is_grad_enabled():
        return ctx.differentiable(grad, x, table, tuple(parameters), wanted)
    found = _backward(grad, x, Known.of(table, x, groups), tuple(parameters), ctx.options)
    return [
        _as_parameter(gradient, given) if want and gradient is not None else None
        for gradient, given, want in zip(found, (x, *parameters), wanted, strict=True)
    ]


def _as_parameter(gradient: Tensor, parameter: Tensor) -> Tensor:
    if gradient.numel() != parameter.numel():  # a value for each group of channels
        gradient = gradient.view(parameter.numel(), -1).sum(1)
    shaped = gradient if gradient.shape == parameter.shape else gradient.view(parameter.shape)
    return cast_gradient(shaped, parameter.dtype)


Options = tuple[Composite, Batch]


def _forward(
    x: Tensor, parameters: Slots, options: Options, buffers: Buffers
) -> tuple[Tensor, Known]:
    composite, batch = options
    y = result_like(x)
    maps = Map.of(x), Map.of(y)
    grouping = Grouping.of(x, x.shape[1], 1)
    layout = Layout.of(grouping, *maps)
    num_cells = grouping.N * grouping.C + composite.num_batch_channels(x)
    known = Known.of(x.new_empty((2, num_cells), dtype=torch.float64), x)
    source = _measure(maps[0], known, batch, buffers)
    scale, center = known.mean.new_empty((2, *known.mean.shape)).unbind()
    call = Call.of(composite, batch, grouping, parameters)
    known = composite_tables.forward(call, known, source, (scale, center))
    _count_change(source.follower)
    passes.apply_segments(*maps, layout, (_rows(known.mean), _rows(scale), _rows(center)))
    return y, known


def _measure(x: Map, known: Known, batch: Batch, buffers: Buffers) -> Source:
    """Moments of channels, as ``primitives.moments`` finds them to the bit: a checkpoint asks."""
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


def _backward(
    grad: Tensor, x: Tensor, known: Known, parameters: Slots, options: Options
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the parameters, those of channels in float64 and not yet shaped."""
    dx = result_like(x)
    maps = Map.of(grad), Map.of(x), Map.of(dx)
    grouping = Grouping.of(x, x.shape[1], 1)
    layout = Layout.of(grouping, *maps)
    parts = passes.reduce(maps[0], maps[1], layout, _rows(known.mean))
    sums = passes.sum_rows(parts.first, parts.second, parts.stream.splits)
    factors, found = composite_tables.backward(Call.of(*options, grouping, parameters), known, sums)
    first, second, third = (_rows(factor) for factor in factors)
    passes.combine_segments(maps, layout, _rows(known.mean), (first, second, third))
    return dx, *found
