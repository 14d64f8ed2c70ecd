"""Single-partition layers: statistics, pooling, affine and their transpose in a few launches.

Groups that fit a program are read once (``tiles``), in one launch each way. For others the map is
read twice, and what lies between is done on tables: at most two launches forward, three backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normkit.kernels.calls import Pooling
from normkit.kernels.reference import table_dtype
from normkit.kernels.triton import passes
from normkit.kernels.triton.geometry import (
    Grouping,
    Layout,
    Limits,
    Map,
    Tile,
    ceil_div,
    power_of_two,
    result_like,
    tile_blocks,
)
from normkit.kernels.triton.launch import (
    Constants,
    accumulator,
    halves,
    launch,
    map_constants,
    num_processors,
)
from normkit.kernels.triton.passes import Follower, Parts, Statistics, Table
from normkit.kernels.triton.tables import (
    group_factors_kernel,
    parameter_sums_kernel,
    pool_segments_kernel,
)
from normkit.kernels.triton.tiles import tile_backward_kernel, tile_forward_kernel

FORWARD = Limits(32768, 1024)  # float32: 64 registers of each of at most 512 threads
BACKWARD = Limits(16384, 512)  # of two maps

Affine = tuple[Tensor | None, Tensor | None]
Results = tuple[Tensor, Tensor, Tensor]


def forward(
    x: Tensor, affine: Affine, pooling: Pooling, follower: Follower | None
) -> tuple[Tensor, Tensor]:
    """``y`` and the table of statistics, float64 ``(2, cells)``; the follower's buffers move."""
    weight, bias = (None if t is None else t.contiguous() for t in affine)
    grouping = Grouping.of(x, pooling.num_groups, pooling.examples_per_group)
    num_cells = grouping.num_cells + (grouping.C if pooling.channel_statistics else 0)
    table = x.new_empty((2, num_cells), dtype=torch.float64)
    y = result_like(x)
    maps = Map.of(x), Map.of(y)
    layout = Layout.of(grouping, *maps)
    tile = None if pooling.channel_statistics else _tile(layout, x, FORWARD)
    if tile is not None:
        _tile_forward(maps, layout, tile, (weight, bias), (table, pooling.eps, follower))
        return y, table
    _pool(maps[0], layout, table, pooling.channel_statistics, follower)
    mean, var = table[:, : grouping.num_cells]
    passes.apply_groups(*maps, layout, Statistics(mean, var, pooling.eps), (weight, bias))
    return y, table


def _tile(layout: Layout, x: Tensor, limits: Limits) -> Tile | None:
    wide = table_dtype(x.dtype).itemsize // 4
    fitting = Limits(limits.elements // wide, limits.elements_per_warp // wide)
    return tile_blocks(layout, x.element_size(), fitting, num_processors(x.device))


def _tile_constants(tile: Tile, layout: Layout, x: Tensor) -> Constants:
    return {
        "BG": tile.BG,
        "BR": tile.BR,
        "BL": tile.BL,
        "SINGLE": layout.grouping.J == 1,
        **map_constants(layout, x),
    }


def _tile_forward(
    maps: tuple[Map, Map],
    layout: Layout,
    tile: Tile,
    affine: Affine,
    rest: tuple[Tensor, float, Follower | None],
) -> None:
    (x, y), (weight, bias), (table, eps, follower) = maps, affine, rest
    grouping = layout.grouping
    buffers, flags = passes.follower_arguments(follower)
    rates = halves(follower.momentum if follower else 0.0)
    launch(
        tile_forward_kernel,
        tile.num_programs,
        (x.tensor, y.tensor, weight, bias, table, *buffers, *layout.strides[0], *layout.strides[1],
         grouping.N, grouping.Q, grouping.L, grouping.E, grouping.J, grouping.G, table.shape[1],
         *halves(eps), *rates),
        tile.num_warps,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **flags,
        **_tile_constants(tile, layout, x.tensor),
    )  # fmt: skip


def _pool(
    x: Map, layout: Layout, table: Tensor, by_channel: bool, follower: Follower | None
) -> None:
    """Measure segments and pool them into groups, and into channels if wanted."""
    grouping = layout.grouping
    parts = passes.measure(x, layout)
    num_cells = grouping.num_cells
    of_groups = table[0, :num_cells], table[1, :num_cells]
    _pool_groups(
        parts, layout, grouping.E, grouping.J, (of_groups, None if by_channel else follower)
    )
    if by_channel:
        of_channels = table[0, num_cells:], table[1, num_cells:]
        _pool_groups(parts, layout, grouping.N, grouping.Q, (of_channels, follower))


def _pool_groups(
    parts: Parts,
    layout: Layout,
    num_examples: int,
    num_segments: int,
    rest: tuple[tuple[Tensor, Tensor], Follower | None],
) -> None:
    """Pool over runs of so many examples, then over runs of so many segments."""
    grouping, (out, follower) = layout.grouping, rest
    if num_segments == 1:
        return passes.pool_rows(parts, layout, num_examples, out, follower)
    num_runs = ceil_div(grouping.N, num_examples)
    pooled = parts.first, parts.second
    if num_examples * parts.stream.splits > 1:
        mean, var = parts.first.new_empty((2, num_runs, grouping.K))
        pooled = mean, var
        passes.pool_rows(parts, layout, num_examples, pooled)
    buffers, flags = passes.follower_arguments(follower)
    rates = halves(follower.momentum if follower else 0.0)
    launch(
        pool_segments_kernel,
        num_runs * grouping.K // num_segments,
        (*pooled, *out, *buffers, num_segments, num_examples * num_segments * grouping.L, *rates),
        BR=min(power_of_two(num_segments), 1024), **flags,
    )  # fmt: skip
    return None


class Wanted(NamedTuple):
    """Which parameters' gradients are."""

    weight: bool
    bias: bool


def backward(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    weight: Tensor | None,
    pooling: Pooling,
    wanted: Wanted,
) -> Results:
    """Gradients of x, weight and bias; empty where not wanted."""
    grouping = Grouping.of(x, pooling.num_groups, pooling.examples_per_group)
    dx = result_like(x)
    maps = Map.of(grad), Map.of(x), Map.of(dx)
    layout = Layout.of(grouping, *maps)
    weight = None if weight is None else weight.contiguous()
    tile = _tile(layout, x, BACKWARD)
    if tile is not None:
        dweight, dbias = _tile_backward(maps, layout, tile, (table, weight, pooling.eps), wanted)
        return dx, dweight, dbias
    mean, var = table[:, : grouping.num_cells]
    statistics = Statistics(mean, var, pooling.eps)
    sums = _summed(maps, layout, mean)
    factors = _group_factors(sums, layout, statistics, weight)
    passes.combine_groups(maps, layout, statistics, weight, factors)
    dweight, dbias = _parameter_sums(sums, layout, statistics, wanted)
    return dx, dweight, dbias


def _summed(maps: tuple[Map, ...], layout: Layout, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over runs of examples, ``(B, K)``."""
    grad, x, *_ = maps
    parts = passes.reduce(grad, x, layout, Table(mean, layout.grouping.G))
    return passes.sum_rows(parts.first, parts.second, layout.grouping.E * parts.stream.splits)


def _tile_backward(
    maps: tuple[Map, Map, Map],
    layout: Layout,
    tile: Tile,
    rest: tuple[Tensor, Tensor | None, float],
    wanted: Wanted,
) -> tuple[Tensor, Tensor]:
    (grad, x, dx), (table, weight, eps) = maps, rest
    grouping = layout.grouping
    needs, by_run = wanted.weight or wanted.bias, grouping.J == 1
    rows = (grouping.B if by_run else grouping.N) if needs else 0
    options = {"dtype": table_dtype(x.tensor.dtype), "device": x.tensor.device}
    sums, sums_x = (torch.empty(rows, grouping.K, **options) for _ in range(2))  # no views: results
    launch(
        tile_backward_kernel,
        tile.num_programs,
        (grad.tensor, x.tensor, dx.tensor, weight, table, sums, sums_x,
         *(stride for strides in layout.strides for stride in strides), grouping.N, grouping.Q,
         grouping.L, grouping.E, grouping.J, grouping.G, grouping.K, table.shape[1], *halves(eps)),
        tile.num_warps,
        HAS_WEIGHT=weight is not None, BY_RUN=needs and by_run, BY_ROW=needs and not by_run,
        **_tile_constants(tile, layout, x.tensor),
    )  # fmt: skip
    return _parameter_sums((sums, sums_x), layout, None, wanted)


def _parameter_sums(
    sums: tuple[Tensor, Tensor], layout: Layout, statistics: Statistics | None, wanted: Wanted
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias; with statistics the sums have yet to be divided by the std."""
    grouping, (first, second) = layout.grouping, sums
    nothing = [first.new_empty(0) for _ in wanted]
    if not any(wanted):
        return nothing[0], nothing[1]
    if statistics is None and first.numel() == grouping.C:
        dweight, dbias = second.view(-1), first.view(-1)
    else:
        dweight, dbias = first.new_empty(grouping.C), first.new_empty(grouping.C)
        var, eps = (None, 0.0) if statistics is None else (statistics.var, statistics.eps)
        num_rows = first.shape[0]
        columns = min(power_of_two(grouping.C), 32)
        launch(
            parameter_sums_kernel,
            ceil_div(grouping.C, columns),
            (first, second, var, dweight, dbias, num_rows, grouping.C, grouping.Q, grouping.J,
             grouping.G, *halves(eps)),
            SCALED=statistics is not None, BK=columns,
            BR=min(power_of_two(num_rows * grouping.Q), 32), ACC=accumulator(first.dtype),
        )  # fmt: skip
    return dweight if wanted.weight else nothing[0], dbias if wanted.bias else nothing[1]


def _group_factors(
    sums: tuple[Tensor, Tensor], layout: Layout, statistics: Statistics, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    grouping = layout.grouping
    k2, k3 = sums[0].new_empty((2, grouping.num_cells)).unbind()
    launch(
        group_factors_kernel,
        grouping.num_cells,
        (*sums, weight, statistics.var, k2, k3, grouping.J, grouping.G, grouping.Q,
         grouping.group_size, grouping.rest_size, grouping.B, *halves(statistics.eps)),
        num_warps=1 if grouping.J <= 64 else 4,
        HAS_WEIGHT=weight is not None, BR=min(power_of_two(grouping.J), 1024),
        ACC=accumulator(sums[0].dtype),
    )  # fmt: skip
    return k2, k3


def forward_given(x: Tensor, statistics: Statistics, affine: Affine) -> Tensor:
    """Normalise by given statistics of the groups of every example, ``(G,)``."""
    y = result_like(x)
    maps = Map.of(x), Map.of(y)
    layout = Layout.of(Grouping.of(x, statistics.mean.numel(), 0), *maps)
    weight, bias = (None if t is None else t.contiguous() for t in affine)
    passes.apply_groups(*maps, layout, _contiguous(statistics), (weight, bias))
    return y


def backward_given(
    grad: Tensor, x: Tensor, statistics: Statistics, weight: Tensor | None, wanted: Wanted
) -> Results:
    """Gradients of x, weight and bias, with constant statistics."""
    dx = result_like(x)
    maps = Map.of(grad), Map.of(x), Map.of(dx)
    layout = Layout.of(Grouping.of(x, statistics.mean.numel(), 0), *maps)
    statistics = _contiguous(statistics)
    weight = None if weight is None else weight.contiguous()
    outer = layout._replace(strides=(layout.strides[0], layout.strides[2]))
    passes.scale_groups(maps[0], maps[2], outer, statistics, weight)
    if not any(wanted):
        nothing = [x.new_empty(0, dtype=table_dtype(x.dtype)) for _ in wanted]
        return dx, nothing[0], nothing[1]
    sums = _summed(maps, layout, statistics.mean)
    return dx, *_parameter_sums(sums, layout, statistics, wanted)


def _contiguous(statistics: Statistics) -> Statistics:
    mean, var, eps = statistics
    return Statistics(mean.contiguous(), var.contiguous(), eps)
