"""Composites: two passes over the map each way, and between them two launches on tables.

Where a segment is shared by several programs, as on few and large channels, one more adds up its
parts. What is computed is ``core.composite``; the batch's statistics are its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkit.kernels.cpu.composite import Batch, Buffers, Composite, Differentiable, Slots
from normkit.kernels.cpu.functions import cast_gradient, recorder
from normkit.kernels.cpu.kinds import Kind
from normkit.kernels.triton import algebra, algebra_first, algebra_switched, passes
from normkit.kernels.triton.geometry import (
    Grouping,
    Layout,
    Map,
    ceil_div,
    power_of_two,
    result_like,
)
from normkit.kernels.triton.launch import halves, launch
from normkit.kernels.triton.passes import Follower, Parts, Table
from normkit.kernels.triton.tables import pool_segments_kernel

KINDS = frozenset(Kind) - {Kind.HALVES}
MOST_CHANNELS = 4096  # of a group, which one program holds
ROWS, COLUMNS = 32, 16


class Known(NamedTuple):
    """What a forward pass knows: float64 tables ``(N, C)``, ``(2, C)`` and ``(2, N * G)``."""

    mean: Tensor
    var: Tensor
    batch: Tensor
    groups: Tensor | None


class Call(NamedTuple):
    """A composite on a map of this cut, as kernels take it."""

    composite: Composite
    grouping: Grouping
    parameters: Slots

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


def can_compute(x: Tensor, composite: Composite) -> bool:
    """Whether these kernels compute a composite on a map."""
    return composite.kind in KINDS and x.shape[1] <= MOST_CHANNELS


def normalize_composite(
    x: Tensor,
    parameters: Slots,
    composite: Composite,
    batch: Batch,
    buffers: Buffers,
    differentiable: Differentiable,
) -> tuple[Tensor, Tensor]:
    """Normalise by a composite whose batch stage takes the input's statistics.

    Arguments are those of the C++ kernels' function of the same name.

    Returns:
        ``y``, and means above variances ``(2, C)`` of what the batch stage saw.
    """
    follower = None
    if buffers.running_mean is not None and buffers.running_var is not None:
        counter = buffers.num_batches_tracked
        follower = Follower(buffers.running_mean, buffers.running_var, counter, batch.rate)
    wanted = x.requires_grad or any(p is not None and p.requires_grad for p in parameters)
    if torch.is_grad_enabled() and wanted:
        return _RECORD(x, *parameters, composite, follower, differentiable)
    y, known = _forward(x, parameters, composite, follower)
    return y, known.batch


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        *parameters, composite, follower, differentiable = arguments
        y, known = _forward(x, tuple(parameters), composite, follower)
        ctx.save_for_backward(x, *known, *parameters)
        ctx.composite, ctx.differentiable = composite, differentiable
        ctx.mark_non_differentiable(known.batch)
        ctx.set_materialize_grads(False)
        return y, known.batch

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        if grads[0] is None:
            return (None,) * 8
        return *_gradients(ctx, grads[0]), None, None, None


_RECORD = recorder(_Composite)


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:  # noqa: ANN401
    x, mean, var, batch, groups, *parameters = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:5]
    if torch.is_grad_enabled():
        return ctx.differentiable(grad, x, batch, tuple(parameters), wanted)
    known = Known(mean, var, batch, groups)
    found = _backward(grad, x, known, tuple(parameters), ctx.composite)
    return [
        _as_parameter(gradient, given) if want and gradient is not None else None
        for gradient, given, want in zip(found, (x, *parameters), wanted, strict=True)
    ]


def _as_parameter(gradient: Tensor, parameter: Tensor) -> Tensor:
    if gradient.numel() != parameter.numel():  # a value for each group of channels
        gradient = gradient.view(parameter.numel(), -1).sum(1)
    shaped = gradient if gradient.shape == parameter.shape else gradient.view(parameter.shape)
    return cast_gradient(shaped, parameter.dtype)


def _forward(
    x: Tensor, parameters: Slots, composite: Composite, follower: Follower | None
) -> tuple[Tensor, Known]:
    y = result_like(x)
    maps = Map.of(x), Map.of(y)
    grouping = Grouping.of(x, x.shape[1], 1)
    layout = Layout.of(grouping, *maps)
    given = [None if p is None else p.contiguous() for p in parameters]
    call = Call(composite, grouping, (given[0], given[1], given[2], given[3]))
    parts = passes.measure(maps[0], layout)
    mean, var = _whole(parts, layout)
    batch = mean.new_empty(2, grouping.C)
    scale, center = mean.new_empty((2, *mean.shape)).unbind()
    known = Known(mean, var, batch, None)
    if composite.kind == Kind.GROUP_FIRST:
        known = _group_first(call, known, (scale, center), follower)
    else:
        if call.has_batch:
            passes.pool_rows(parts, layout, grouping.N, (batch[0], batch[1]), follower)
        _rows_forward(call, known, (scale, center))
    _count_change(follower)
    passes.apply_segments(*maps, layout, (_rows(mean), _rows(scale), _rows(center)))
    return y, known


def _whole(parts: Parts, layout: Layout) -> tuple[Tensor, Tensor]:
    """Moments ``(N, C)``, also where several programs have measured a channel."""
    if parts.stream.splits == 1:
        return parts.first, parts.second
    mean, var = parts.first.new_empty((2, layout.grouping.N, layout.grouping.K)).unbind()
    passes.pool_rows(parts, layout, 1, (mean, var))
    return mean, var


def _rows(table: Tensor) -> Table:
    return Table(table, table.shape[1])


def _count_change(follower: Follower | None) -> None:
    """Tell autograd of buffers that a kernel has moved."""
    for buffer in () if follower is None else (follower.mean, follower.var, follower.counter):
        if buffer is not None:
            torch.autograd.graph.increment_version(buffer)


def _warps(channels: int) -> int:
    return min(max(channels // 128, 1), 8)


def _rows_forward(call: Call, known: Known, out: tuple[Tensor, Tensor]) -> None:
    size = call.group_channels
    sizes = (call.grouping.C, size, call.repeat, *call.eps)
    kernel = algebra.rows_forward_kernel
    flags = {"KIND": int(call.composite.kind), **call.flags}
    if call.is_switched:
        kernel, sizes = algebra_switched.switched_forward_kernel, (size, *call.eps[:2])
        flags = {"HAS_BATCH": call.has_batch, **call.affine_flags}
    launch(
        kernel,
        call.num_groups,
        (known.mean, known.var, *known.batch, *call.parameters, *out, *sizes),
        _warps(size),
        BR=power_of_two(size),
        **flags,
    )


def _group_first(
    call: Call, known: Known, out: tuple[Tensor, Tensor], follower: Follower | None
) -> Known:
    """The group norm's statistics, then the batch norm's of what it made, and the mixture."""
    size, grouping = call.group_channels, call.grouping
    groups = known.mean.new_empty(2, call.num_groups)
    nobody, unmoved = passes.follower_arguments(None)
    launch(
        pool_segments_kernel,
        call.num_groups,
        (known.mean, known.var, *groups, *nobody, size, size * grouping.L, 0.0, 0.0),
        _warps(size), BR=power_of_two(size), **unmoved,
    )  # fmt: skip
    buffers, flags = passes.follower_arguments(follower)
    first, second, logit, _ = call.parameters
    launch(
        algebra_first.columns_forward_kernel,
        ceil_div(grouping.C, COLUMNS),
        (known.mean, known.var, *groups, first, second, logit, *out, *known.batch, *buffers,
         grouping.N, grouping.C, size, grouping.L, *call.eps,
         *halves(follower.momentum if follower else 0.0)),
        HAS1=first is not None, HAS2=second is not None,
        BK=COLUMNS, BR=_num_rows(grouping), **flags,
    )  # fmt: skip
    return known._replace(groups=groups)


def _num_rows(grouping: Grouping) -> int:
    return min(power_of_two(grouping.N), ROWS)


def _backward(
    grad: Tensor, x: Tensor, known: Known, parameters: Slots, composite: Composite
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the parameters, those of channels in float64 and not yet shaped."""
    dx = result_like(x)
    maps = Map.of(grad), Map.of(x), Map.of(dx)
    grouping = Grouping.of(x, x.shape[1], 1)
    layout = Layout.of(grouping, *maps)
    given = [None if p is None else p.contiguous() for p in parameters]
    call = Call(composite, grouping, (given[0], given[1], given[2], given[3]))
    parts = passes.reduce(maps[0], maps[1], layout, _rows(known.mean))
    sums = passes.sum_rows(parts.first, parts.second, parts.stream.splits)
    way = _backward_first if composite.kind == Kind.GROUP_FIRST else _backward_rows
    factors, found = way(call, known, sums)
    first, second, third = (_rows(factor) for factor in factors)
    passes.combine_segments(maps, layout, _rows(known.mean), (first, second, third))
    return dx, *found


Found = tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, ...]]


def _backward_rows(call: Call, known: Known, sums: tuple[Tensor, Tensor]) -> Found:
    """Factors, and gradients of the parameters, where the batch sees the map itself."""
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
            (known.mean, known.var, *known.batch, *call.parameters, *sums, k1, *tables, scalars,
             grouping.C, size, call.repeat, *call.eps),
            _warps(size),
            KIND=int(kind), BR=power_of_two(size), **flags,
        )  # fmt: skip
    found = known.mean.new_empty(4, grouping.C)
    launch(
        algebra.columns_backward_kernel,
        ceil_div(grouping.C, COLUMNS),
        (known.mean, known.batch[0], sums[0], k1, *tables, k2, k3, found, grouping.N, grouping.C,
         grouping.L),
        HAS_BATCH=call.has_batch, HAS_THIRD=kind == Kind.BATCH_THEN_GROUP,
        BK=COLUMNS, BR=_num_rows(grouping),
    )  # fmt: skip
    return (k1, k2, k3), _parameters(call, found, scalars)


def _switched_backward(
    call: Call, known: Known, sums: tuple[Tensor, Tensor], out: tuple[Tensor, ...]
) -> None:
    size, (first, _, mean_logits, var_logits) = call.group_channels, call.parameters
    launch(
        algebra_switched.switched_backward_kernel,
        call.num_groups,
        (known.mean, known.var, *known.batch, first, mean_logits, var_logits, *sums, *out, size,
         *call.eps[:2]),
        _warps(size),
        HAS1=first is not None, HAS_BATCH=call.has_batch, BR=power_of_two(size),
    )  # fmt: skip


def _parameters(call: Call, found: Tensor, scalars: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the four parameters from sums ``(4, C)`` and six sums a program."""
    kind, (_, _, third, fourth) = call.composite.kind, call.parameters
    if kind == Kind.BATCH_THEN_GROUP:
        return found.unbind()
    if kind in (Kind.BATCH_FIRST, Kind.PARALLEL):
        return found[0], found[1], scalars[:, 0].sum(), None
    total = scalars.sum(dim=0)
    of_mean, of_var = (
        _softmax_gradient(logits, part)
        for logits, part in zip((third, fourth), (total[:3], total[3:]), strict=True)
    )
    return found[0], found[1], of_mean, of_var


def _softmax_gradient(logits: Tensor | None, of_shares: Tensor) -> Tensor | None:
    if logits is None:
        return None
    shares = torch.softmax(logits.double().flatten(), dim=0)
    weighed = shares * of_shares[: shares.numel()]
    return weighed - shares * weighed.sum()


def _backward_first(call: Call, known: Known, sums: tuple[Tensor, Tensor]) -> Found:
    """Factors, and gradients of the parameters, where the group norm comes first."""
    grouping, size = call.grouping, call.group_channels
    k1, k2, k3, to_center, to_root, dvar = known.mean.new_empty((6, *known.mean.shape)).unbind()
    found = known.mean.new_empty(3, grouping.C)
    first, _, logit, _ = call.parameters
    launch(
        algebra_first.columns_first_backward_kernel,
        ceil_div(grouping.C, COLUMNS),
        (known.mean, known.var, *_required(known.groups), *known.batch, first, logit, *sums,
         to_center, to_root, dvar, k1, found, grouping.N, grouping.C, size, *call.eps),
        HAS1=first is not None, BK=COLUMNS, BR=_num_rows(grouping),
    )  # fmt: skip
    launch(
        algebra_first.rows_first_backward_kernel,
        call.num_groups,
        (known.mean, known.var, to_center, to_root, dvar, k1, sums[0], k2, k3, grouping.C, size,
         grouping.L, *call.eps[2:]),
        _warps(size), BR=power_of_two(size),
    )  # fmt: skip
    return (k1, k2, k3), (found[0], found[1], found[2].sum(), None)


def _required(groups: Tensor | None) -> Tensor:
    if groups is None:
        raise RuntimeError("the statistics of the groups were not kept by the forward pass")
    return groups
