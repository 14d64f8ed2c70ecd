"""Single-partition layers: statistics, pooling, affine and their transpose in one launch or two.

Groups that fit a program are read once (``tiles``), in one launch each way. For others the map is
read twice (``groups``), in two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from normkit.kernels.reference import table_dtype
from normkit.kernels.triton import passes
from normkit.kernels.triton.constants import (
    Constants,
    fold,
    map_constants,
    stream_constants,
)
from normkit.kernels.triton.geometry import (
    MOST_CHANNELS,
    Grouping,
    Layout,
    Limits,
    Map,
    Rows,
    Stream,
    Tile,
    power_of_two,
    result_like,
    row_blocks,
    tile_blocks,
)
from normkit.kernels.triton.group_gradients import gradient_groups_kernel, reduce_groups_kernel
from normkit.kernels.triton.groups import (
    measure_groups_kernel,
    measure_segments_kernel,
    normalize_groups_kernel,
)
from normkit.kernels.triton.passes import Follower, Statistics, follower_arguments
from normkit.kernels.triton.plan import halves, in_one_piece, launch, num_processors
from normkit.kernels.triton.tiles import tile_backward_kernel, tile_forward_kernel

FORWARD = Limits(32768, 1024)  # float32: 64 registers of each of at most 512 threads
BACKWARD = Limits(16384, 512)  # of two maps
ROWS_AT_ONCE = 1024  # cells of a table of parts that a program pools at a time
PROGRAMS_OF_ROWS = 3  # a multiprocessor: each leaves a row, and each of the next pools all of them

Affine = tuple[Tensor | None, Tensor | None]
Results = tuple[Tensor, Tensor, Tensor]


class _Forward(NamedTuple):
    """What a forward pass reads and writes."""

    x: Map
    y: Map
    layout: Layout
    affine: Affine
    follower: Follower | None
    eps: float

    @property
    def flags(self) -> Constants:
        weight, bias = self.affine
        _, flags = follower_arguments(self.follower)
        return {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, **flags}

    @property
    def buffers(self) -> tuple[object, ...]:
        return follower_arguments(self.follower)[0]


def forward(  # noqa: PLR0913 - the operator's own arguments
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    num_groups: int,
    examples_per_group: int,
    eps: float,
    channel_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """``y`` and the table of statistics, float64 ``(2, cells)``; the buffers move."""
    follower = None
    if running_mean is not None and running_var is not None:
        follower = Follower(running_mean, running_var, counter)
    grouping = Grouping.of(x, num_groups, examples_per_group)
    source = Map.of(x)
    target = Map.of(result_like(source.tensor))
    layout = Layout.of(grouping, source, target)
    call = _Forward(source, target, layout, _affine(weight, bias), follower, eps)
    cells = grouping.num_cells + (grouping.C if channel_statistics else 0)
    table = x.new_empty((2, cells), dtype=torch.float64)
    tile = None if channel_statistics else _tile(layout, x, FORWARD)
    if tile is None:
        _forward_in_two(call, table, channel_statistics)
    else:
        _forward_in_tiles(call, table, tile)
    return target.tensor, table


def _affine(weight: Tensor | None, bias: Tensor | None) -> Affine:
    return _in_one_piece(weight), _in_one_piece(bias)


def _in_one_piece(table: Tensor | None) -> Tensor | None:
    return None if table is None else in_one_piece(table)


def _forward_in_tiles(call: _Forward, table: Tensor, tile: Tile) -> None:
    layout, x = call.layout, call.x.tensor
    launch(
        tile_forward_kernel,
        tile.num_programs,
        (x, call.y.tensor, *call.affine, table, *call.buffers),
        (*_strides(layout), *_cut(layout.grouping), table.shape[1], *halves(call.eps)),
        tile.num_warps,
        **call.flags,
        **_tile_constants(tile, layout, x),
    )


def _forward_in_two(call: _Forward, table: Tensor, has_channels: bool) -> None:
    layout, x = call.layout, call.x.tensor
    whole = layout if has_channels else layout.with_whole_groups()
    rows = _rows(whole, x)
    num_rows = whole.grouping.B * rows.R
    planes = num_rows * whole.grouping.G, num_rows * whole.grouping.K
    dtype = table_dtype(x.dtype)
    parts = segments = x.new_empty(3 * planes[0] + num_rows, dtype=dtype)
    numbers = (*_strides(whole)[:3], *_cut(whole.grouping), *rows.numbers)
    constants = _row_constants(rows, whole, x)
    if has_channels and whole.grouping.J > 1:  # else a group's parts are a segment's
        segments = x.new_empty(3 * planes[1] + num_rows, dtype=dtype)
        for unused in ("FOLD", "UNIT"):
            del constants[unused]
        tensors = (x, parts, segments)
        launch(measure_segments_kernel, rows.num_programs, tensors, (*numbers, *planes),
               rows.num_warps, **constants)  # fmt: skip
    else:
        launch(measure_groups_kernel, rows.num_programs, (x, parts), (*numbers, planes[0]),
               rows.num_warps, **constants)  # fmt: skip
    grouping = layout.grouping
    stream, constants = _stream(layout, x, num_rows * grouping.Q if has_channels else rows.R)
    launch(
        normalize_groups_kernel,
        stream.num_programs,
        (x, call.y.tensor, *call.affine, parts, segments, table, *call.buffers),
        (*_strides(layout), grouping.K, grouping.Q, grouping.L, stream.splits, stream.span,
         grouping.E, grouping.J, grouping.G, rows.R, grouping.B, *planes, table.shape[1],
         *halves(call.eps)),
        HAS_CHANNELS=has_channels, **call.flags, **constants,
    )  # fmt: skip


def _strides(layout: Layout) -> tuple[int, ...]:
    return tuple(stride for strides in layout.strides for stride in strides)


def _cut(grouping: Grouping) -> tuple[int, ...]:
    return (grouping.N, grouping.Q, grouping.L, grouping.E, grouping.J, grouping.G)


def _tile(layout: Layout, x: Tensor, limits: Limits) -> Tile | None:
    wide = table_dtype(x.dtype).itemsize // 4
    fitting = Limits(limits.elements // wide, limits.elements_per_warp // wide)
    return tile_blocks(layout, x.element_size(), fitting, num_processors())


def _tile_constants(tile: Tile, layout: Layout, x: Tensor) -> Constants:
    single = layout.grouping.J == 1
    blocks = {"BG": tile.BG, "BR": tile.BR, "BL": tile.BL, "SINGLE": single}
    return {**blocks, **map_constants(layout, x)}


def _rows(layout: Layout, x: Tensor) -> Rows:
    processors = num_processors()
    elements = passes.block_elements(x)
    if layout.by_channel and 1 < layout.grouping.J < MOST_CHANNELS:
        elements = max(elements // 2, 1)  # threads lie along positions, so nothing is folded
    return row_blocks(layout, elements, PROGRAMS_OF_ROWS * processors, processors)


def _row_constants(rows: Rows, layout: Layout, x: Tensor) -> Constants:
    constants = map_constants(layout, x)
    constants["ALIGN"] = min(layout.alignment, rows.BL)  # divides a stretch, too
    is_mixed = rows.BG > 1 and rows.BJ > 1
    block = rows.BG * rows.BJ, rows.BL
    constants["FOLD"] = 1 if is_mixed else fold(block, x, layout, rows.num_warps)
    constants["UNIT"] = math.gcd(layout.grouping.J, rows.BJ, 16)
    return {"BG": rows.BG, "BJ": rows.BJ, "BL": rows.BL, **constants}


def _stream(layout: Layout, x: Tensor, num_rows: int) -> tuple[Stream, Constants]:
    """Blocks of programs that write, which also pool so many rows."""
    stream = passes.stream_of(layout, x, PROGRAMS_OF_ROWS)
    rows = min(power_of_two(num_rows), max(ROWS_AT_ONCE // stream.BK, 1))
    return stream, {"BR": rows, **stream_constants(stream, x, layout)}


def forward_given(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise by given statistics of the groups of every example, ``(G,)``."""
    source = Map.of(x)
    target = Map.of(result_like(source.tensor))
    layout = Layout.of(Grouping.of(x, mean.numel(), 0), source, target)
    statistics = Statistics(in_one_piece(mean), in_one_piece(var), eps)
    passes.apply_groups(source, target, layout, statistics, _affine(weight, bias))
    return target.tensor


class _Backward(NamedTuple):
    """What a backward pass reads and writes; ``var`` lies ``VAR_AT`` cells into its tensor."""

    maps: tuple[Map, Map, Map]
    layout: Layout
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    eps: float
    wanted: tuple[bool, bool]
    is_constant: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(m.tensor for m in self.maps)

    @property
    def var_at(self) -> int:
        return 0 if self.is_constant else self.var.shape[1]

    @property
    def cell_row(self) -> int:
        """Cells of a run of examples; 0 where all share one row."""
        return 0 if self.is_constant else self.layout.grouping.G


def backward(  # noqa: PLR0913
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    weight: Tensor | None,
    num_groups: int,
    examples_per_group: int,
    eps: float,
    *wanted: bool,
) -> Results:
    """Gradients of x, weight and bias; empty where not wanted."""
    grouping = Grouping.of(x, num_groups, examples_per_group)
    table = in_one_piece(table)
    call = _backward(grouping, (grad, x), (table, table), weight, eps, wanted)
    tile = _tile(call.layout, x, BACKWARD)
    if tile is None:
        return _backward_in_two(call)
    return _backward_in_tiles(call, tile)


def backward_given(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    *wanted: bool,
) -> Results:
    """Gradients of x, weight and bias, with constant statistics."""
    grouping = Grouping.of(x, mean.numel(), 0)
    statistics = in_one_piece(mean), in_one_piece(var)
    call = _backward(grouping, (grad, x), statistics, weight, eps, wanted)
    return _backward_in_two(call._replace(is_constant=True))


def _backward(
    grouping: Grouping,
    maps: tuple[Tensor, Tensor],
    statistics: tuple[Tensor, Tensor],
    weight: Tensor | None,
    eps: float,
    wanted: tuple[bool, ...],
) -> _Backward:
    grad, x = (Map.of(t) for t in maps)
    dx = Map.of(result_like(x.tensor))
    layout = Layout.of(grouping, grad, x, dx)
    weight = _in_one_piece(weight)
    need_weight, need_bias = wanted
    return _Backward(
        (grad, x, dx), layout, *statistics, weight, eps, (need_weight, need_bias), False
    )


def _backward_in_tiles(call: _Backward, tile: Tile) -> Results:
    layout, grouping, (grad, x, dx) = call.layout, call.layout.grouping, call.tensors
    needs, by_run = any(call.wanted), grouping.J == 1
    rows = (grouping.B if by_run else grouping.N) if needs else 0
    sums = passes.flat_sums(x, rows * grouping.K)
    launch(
        tile_backward_kernel,
        tile.num_programs,
        (grad, x, dx, call.weight, call.mean, *sums),
        (*_strides(layout), *_cut(grouping), grouping.K, call.var_at, *halves(call.eps)),
        tile.num_warps,
        HAS_WEIGHT=call.weight is not None, BY_RUN=needs and by_run, BY_ROW=needs and not by_run,
        **_tile_constants(tile, layout, x),
    )  # fmt: skip
    return dx, *passes.parameter_gradients(sums, rows, (grouping.C, grouping.Q), call.wanted)


class _Sums(NamedTuple):
    """Parts of sums over segments, and over groups; two planes of rows each, or none."""

    rows: Rows
    of_segments: Tensor
    of_groups: Tensor

    @property
    def planes(self) -> tuple[int, int]:
        return self.of_segments.numel() // 2, self.of_groups.numel() // 2


def _backward_in_two(call: _Backward) -> Results:
    grouping, (_, x, dx) = call.layout.grouping, call.tensors
    sums = _reduced(call)
    adds = any(call.wanted)
    num_rows = grouping.B * sums.rows.R * grouping.Q if adds else 1
    dweight, dbias = passes.flat_sums(x, grouping.C if adds else 0)
    _write_gradient(call, sums, (dweight, dbias), num_rows)
    need_weight, need_bias = call.wanted
    return dx, dweight if need_weight else x.new_empty(0), dbias if need_bias else x.new_empty(0)


def _reduced(call: _Backward) -> _Sums:
    """What a gradient's second launch reads: the first, where there is need of one."""
    layout, grouping, (grad, x, _) = call.layout, call.layout.grouping, call.tensors
    rows = _rows(layout._replace(strides=layout.strides[:2]), x)
    has_groups = grouping.J > 1 and not call.is_constant
    has_sums = any(call.wanted) or (not has_groups and not call.is_constant)
    num_rows, dtype = grouping.B * rows.R, table_dtype(x.dtype)
    sums = _Sums(
        rows,
        x.new_empty((2, num_rows if has_sums else 0, grouping.K), dtype=dtype),
        x.new_empty((2, num_rows if has_groups else 0, grouping.G), dtype=dtype),
    )
    if has_sums or has_groups:
        launch(
            reduce_groups_kernel,
            rows.num_programs,
            (grad, x, call.weight, call.mean, call.var, sums.of_segments, sums.of_groups),
            (*_strides(layout)[:6], *_cut(grouping), *rows.numbers, call.var_at, call.cell_row,
             *sums.planes, *halves(call.eps)),
            rows.num_warps,
            HAS_WEIGHT=call.weight is not None, HAS_SUMS=has_sums, HAS_GROUPS=has_groups,
            **_row_constants(rows, layout, x),
        )  # fmt: skip
    return sums


def _write_gradient(
    call: _Backward, sums: _Sums, out: tuple[Tensor, Tensor], num_rows: int
) -> None:
    layout, grouping, rows = call.layout, call.layout.grouping, sums.rows
    stream, constants = _stream(layout, call.tensors[1], max(rows.R, num_rows))
    launch(
        gradient_groups_kernel,
        stream.num_programs,
        (*call.tensors, call.weight, call.mean, call.var, sums.of_segments, sums.of_groups, *out),
        (*_strides(layout), grouping.N, grouping.K, grouping.Q, grouping.L, stream.splits,
         stream.span, grouping.E, grouping.J, grouping.G, rows.R, grouping.B, call.var_at,
         call.cell_row, *sums.planes, grouping.J * grouping.L, *halves(call.eps)),
        HAS_WEIGHT=call.weight is not None, HAS_GROUPS=sums.of_groups.numel() > 0,
        ADDS=out[0].numel() > 0, CONSTANT=call.is_constant, **constants,
    )  # fmt: skip
