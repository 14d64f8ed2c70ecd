"""The passes over a map: how each streaming kernel is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from normkit.kernels.reference import table_dtype
from normkit.kernels.triton.geometry import (
    Layout,
    Map,
    Stream,
    ceil_div,
    power_of_two,
    stream_blocks,
)
from normkit.kernels.triton.launch import (
    Config,
    Constants,
    accumulator,
    best_config,
    halves,
    launch,
    num_processors,
    stream_constants,
)
from normkit.kernels.triton.streams import (
    apply_kernel,
    combine_grad_kernel,
    moments_kernel,
    reduce_grad_kernel,
)
from normkit.kernels.triton.tables import pool_rows_kernel, sum_rows_kernel

PROGRAMS_THAT_REDUCE = 8  # a multiprocessor: each leaves a row for the next kernel to add up
PROGRAMS_THAT_WRITE = 16
ROWS_THAT_ADD = 256  # rows of a table that one program adds up


class Table(NamedTuple):
    """A table of one value for each group or segment; the row of all examples has stride 0."""

    values: Tensor
    row: int

    @classmethod
    def of(cls, values: Tensor) -> Table:
        """Of ``(N, K)`` or ``(1, K)``."""
        return cls(values.contiguous(), 0 if values.shape[0] == 1 else values.shape[1])


class Parts(NamedTuple):
    """Two tables ``(N * splits, K)`` of parts of segments, each of ``span`` elements."""

    first: Tensor
    second: Tensor
    stream: Stream


class Statistics(NamedTuple):
    """Of groups ``(B, G)``."""

    mean: Tensor
    var: Tensor
    eps: float


def _blocks(layout: Layout, config: Config, x: Tensor, programs: int) -> Stream:
    wanted = programs * num_processors(x.device)
    return stream_blocks(layout, config.elements, wanted)


def _config(
    name: str, layout: Layout, x: Tensor, programs: int, run: Callable[[Stream, Config], object]
) -> tuple[Stream, Config]:
    """The blocks of a call, by the best configuration for calls of its kind."""
    grouping = layout.grouping
    sizes = (power_of_two(n) for n in (grouping.N, grouping.K, grouping.L))
    key = (name, x.dtype, x.device, layout.by_channel, layout.wide, *sizes)
    config = best_config(key, x.device, lambda c: run(_blocks(layout, c, x, programs), c))
    return _blocks(layout, config, x, programs), config


def measure(x: Map, layout: Layout, out: tuple[Tensor, Tensor] | None = None) -> Parts:
    """Mean and variance of parts of segments, float64; in ``out`` where parts are whole."""
    grouping, tensor = layout.grouping, x.tensor

    def run(stream: Stream, config: Config) -> Parts:
        shape = (2, grouping.N * stream.splits, grouping.K)
        own = None if stream.splits > 1 else out
        mean, var = own or tensor.new_empty(shape, dtype=torch.float64).unbind()
        launch(
            moments_kernel,
            stream.num_programs,
            (tensor, mean, var, *layout.strides[0], grouping.K, grouping.Q, grouping.L,
             stream.splits, stream.span),
            config.num_warps,
            **stream_constants(stream, tensor, layout),
        )  # fmt: skip
        return Parts(mean, var, stream)

    return run(*_config("moments", layout, tensor, PROGRAMS_THAT_REDUCE, run))


class Follower(NamedTuple):
    """Buffers that a kernel moves while it writes what they follow.

    Args:
        mean: Running mean.
        var: Running variance, unbiased; of estimates biased.
        counter: Counts batches.
        momentum: Weight of the new value.
        are_estimates: Whether they are what the kernel writes, once moved.
    """

    mean: Tensor
    var: Tensor
    counter: Tensor | None
    momentum: float
    are_estimates: bool = False


def follower_arguments(follower: Follower | None) -> tuple[tuple[object, ...], Constants]:
    """A kernel's arguments for buffers that follow, or for none."""
    counter = None if follower is None else follower.counter
    flags = {"HAS_RUNNING": follower is not None, "HAS_COUNTER": counter is not None}
    if follower is None:
        return (None, None, None), flags
    return (follower.mean, follower.var, counter), flags


def pool_rows(
    parts: Parts,
    layout: Layout,
    num_examples: int,
    out: tuple[Tensor, Tensor],
    follower: Follower | None = None,
) -> None:
    """Pool parts of segments over runs of examples into two rows of ``B * K`` cells."""
    grouping, stream = layout.grouping, parts.stream
    buffers, flags = follower_arguments(follower)
    rates = halves(follower.momentum if follower else 0.0)
    columns = min(power_of_two(grouping.K), 32)
    rows = min(power_of_two(num_examples * stream.splits), 32)
    launch(
        pool_rows_kernel,
        ceil_div(grouping.N, num_examples) * ceil_div(grouping.K, columns),
        (parts.first, parts.second, *out, *buffers, grouping.N, stream.splits, stream.span,
         grouping.L, grouping.K, num_examples, *rates),
        ESTIMATED=follower is not None and follower.are_estimates,
        BK=columns, BR=rows, **flags,
    )  # fmt: skip


def apply_groups(
    x: Map, y: Map, layout: Layout, statistics: Statistics, affine: tuple[Tensor | None, ...]
) -> None:
    """Normalise by the statistics of groups, then the channels' scale and shift."""
    weight, bias = affine
    grouping = layout.grouping
    tables = (statistics.mean, statistics.var, weight, bias)
    indices = (grouping.E, grouping.J, grouping.G, 0, 0, *halves(statistics.eps))
    flags = {
        "POOLED": True,
        "CENTERED": True,
        "HAS_SCALE": weight is not None,
        "HAS_CENTER": bias is not None,
    }
    _apply((x, y), layout, tables, indices, flags)


def apply_segments(x: Map, y: Map, layout: Layout, tables: tuple[Table, Table, Table]) -> None:
    """``scale * (x - mean) + center`` with tables of segments."""
    mean, scale, center = tables
    values = (mean.values, None, scale.values, center.values)
    indices = (1, 1, mean.row, scale.row, center.row, 0.0, 0.0)
    flags = {"POOLED": False, "CENTERED": True, "HAS_SCALE": True, "HAS_CENTER": True}
    _apply((x, y), layout, values, indices, flags)


def _apply(
    maps: tuple[Map, Map],
    layout: Layout,
    tables: tuple[Tensor | None, ...],
    indices: tuple[object, ...],
    flags: Constants,
) -> None:
    grouping = layout.grouping
    x, y = (m.tensor for m in maps)
    strides = (*layout.strides[0], *layout.strides[1])

    def run(stream: Stream, config: Config) -> None:
        launch(
            apply_kernel,
            stream.num_programs,
            (x, y, *tables, *strides, grouping.K, grouping.Q, grouping.L, stream.splits,
             stream.span, *indices),
            config.num_warps,
            **flags,
            **stream_constants(stream, x, layout),
        )  # fmt: skip

    run(*_config("apply", layout, x, PROGRAMS_THAT_WRITE, run))


def reduce(grad: Map, x: Map, layout: Layout, mean: Table) -> Parts:
    """``sum(grad)`` and ``sum(grad * (x - mean))`` of parts of segments."""
    grouping, tensor = layout.grouping, x.tensor
    grad_strides, strides = layout.strides[:2]

    def run(stream: Stream, config: Config) -> Parts:
        shape = (2, grouping.N * stream.splits, grouping.K)
        sums, sums_x = tensor.new_empty(shape, dtype=table_dtype(tensor.dtype))
        launch(
            reduce_grad_kernel,
            stream.num_programs,
            (grad.tensor, tensor, mean.values, sums, sums_x, *grad_strides, *strides, grouping.K,
             grouping.Q, grouping.L, stream.splits, stream.span, grouping.E, grouping.J, mean.row),
            config.num_warps,
            **stream_constants(stream, tensor, layout),
        )  # fmt: skip
        return Parts(sums, sums_x, stream)

    return run(*_config("reduce_grad", layout, tensor, PROGRAMS_THAT_REDUCE, run))


def sum_rows(first: Tensor, second: Tensor, run_rows: int) -> tuple[Tensor, Tensor]:
    """Sums of runs of so many rows of two tables."""
    num_rows, num_columns = first.shape
    if run_rows == 1:
        return first, second
    num_runs = ceil_div(num_rows, run_rows)
    columns, rows = min(power_of_two(num_columns), 32), min(power_of_two(run_rows), 32)
    found = first.new_empty(2, num_runs, num_columns)
    launch(
        sum_rows_kernel,
        num_runs * ceil_div(num_columns, columns),
        (first, second, found[0], found[1], num_rows, run_rows, num_columns),
        BK=columns, BR=rows, ACC=accumulator(first.dtype),
    )  # fmt: skip
    return found[0], found[1]


def combine_segments(
    maps: tuple[Map, Map, Map], layout: Layout, mean: Table, factors: tuple[Table, Table, Table]
) -> None:
    """``k1 * grad + k2 * (x - mean) + k3`` with tables of segments."""
    tables = (mean.values, None, None, *(factor.values for factor in factors))
    indices = (1, 1, mean.row, *(factor.row for factor in factors), 0.0, 0.0)
    _combine(maps, layout, tables, indices, {"POOLED": False, "HAS_WEIGHT": False})


def _combine(
    maps: tuple[Map, Map, Map],
    layout: Layout,
    tables: tuple[Tensor | None, ...],
    indices: tuple[object, ...],
    flags: Constants,
) -> None:
    grouping = layout.grouping
    tensors = [m.tensor for m in maps]
    strides = [stride for strides in layout.strides for stride in strides]

    def run(stream: Stream, config: Config) -> None:
        launch(
            combine_grad_kernel,
            stream.num_programs,
            (*tensors, *tables, *strides, grouping.K, grouping.Q, grouping.L, stream.splits,
             stream.span, *indices),
            config.num_warps,
            **flags,
            **stream_constants(stream, tensors[1], layout),
        )  # fmt: skip

    run(*_config("combine_grad", layout, tensors[1], PROGRAMS_THAT_WRITE, run))
