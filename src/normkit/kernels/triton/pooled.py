"""Single-partition layers: statistics, pooling, affine and their transpose in one launch or two.

Groups that fit a program are read once (``tiles``), in one launch each way. For others the map is
read twice (``groups``), in two. Where the whole batch's statistics of channels are wanted beside
those of groups, one or two launches on tables lie between.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normkit.kernels.calls import Pooling
from normkit.kernels.operators import is_dense
from normkit.kernels.reference import table_dtype
from normkit.kernels.triton import passes
from normkit.kernels.triton.geometry import (
    Grouping,
    Layout,
    Limits,
    Map,
    Rows,
    Stream,
    Tile,
    ceil_div,
    power_of_two,
    result_like,
    row_blocks,
    stream_blocks,
    tile_blocks,
)
from normkit.kernels.triton.groups import (
    gradient_groups_kernel,
    measure_groups_kernel,
    normalize_groups_kernel,
    reduce_groups_kernel,
)
from normkit.kernels.triton.launch import (
    CONFIGS,
    Constants,
    accumulator,
    halves,
    launch,
    map_constants,
    num_processors,
    stream_constants,
)
from normkit.kernels.triton.passes import Follower, Parts, Statistics
from normkit.kernels.triton.plan import (
    Launch,
    Plans,
    alignment,
    current_stream,
    dtype_of,
    on_device,
)
from normkit.kernels.triton.streams import apply_kernel
from normkit.kernels.triton.tables import parameter_sums_kernel, pool_segments_kernel
from normkit.kernels.triton.tiles import tile_backward_kernel, tile_forward_kernel

FORWARD = Limits(32768, 1024)  # float32: 64 registers of each of at most 512 threads
BACKWARD = Limits(16384, 512)  # of two maps
PROGRAMS_THAT_REDUCE = 8  # a multiprocessor
PROGRAMS_THAT_WRITE = 16
ROWS_AT_ONCE = 1024  # cells of a table of parts that a program pools at a time

Affine = tuple[Tensor | None, Tensor | None]
Results = tuple[Tensor, Tensor, Tensor]


class Wanted(NamedTuple):
    """Which parameters' gradients are."""

    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        """Whether one is."""
        return self.weight or self.bias


def forward(
    x: Tensor, affine: Affine, pooling: Pooling, follower: Follower | None
) -> tuple[Tensor, Tensor]:
    """``y`` and the table of statistics, float64 ``(2, cells)``; the follower's buffers move."""
    weight, bias = affine
    if pooling.channel_statistics:
        return _forward_with_channels(x, affine, pooling, follower)
    mean, var, counter, momentum, _ = follower or _NOBODY
    kind = (
        x.shape, x.stride(), x.dtype, x.get_device(), pooling, momentum, dtype_of(weight),
        dtype_of(bias), dtype_of(mean), counter is None, alignment(x, weight, bias, mean, var),
    )  # fmt: skip
    plan = _FORWARD.find(kind, lambda: ForwardPlan(x, affine, pooling, follower))
    return plan(x, weight, bias, mean, var, counter)


_NOBODY = (None, None, None, 0.0, False)


class ForwardPlan:
    """A forward call of one kind."""

    def __init__(
        self, x: Tensor, affine: Affine, pooling: Pooling, follower: Follower | None
    ) -> None:
        self.copies = Map.of(x).tensor is not x
        x = x.contiguous() if self.copies else x
        self.is_dense, self.device = is_dense(x), x.get_device()
        grouping = Grouping.of(x, pooling.num_groups, pooling.examples_per_group)
        self.cells = (2, grouping.num_cells)
        maps = Map.of(x), Map.of(result_like(x))
        layout = Layout.of(grouping, *maps)
        weight, bias = affine
        flags = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
        moves = follower is not None
        flags |= {"HAS_RUNNING": moves, "HAS_COUNTER": moves and follower.counter is not None}
        rates = halves(follower.momentum if follower is not None else 0.0)
        tile = _tile(layout, x, FORWARD)
        self.measure: Launch | None = None
        self.num_parts, self.parts_dtype = 0, table_dtype(x.dtype)
        if tile is None:
            self._plan_two(x, layout, pooling.eps, rates, flags)
        else:
            self.finish = Launch(
                tile_forward_kernel,
                tile.num_programs,
                (*layout.strides[0], *layout.strides[1], *_cut(layout.grouping), grouping.num_cells,
                 *halves(pooling.eps), *rates),
                tile.num_warps,
                **flags, **_tile_constants(tile, layout, x),
            )  # fmt: skip

    def _plan_two(
        self,
        x: Tensor,
        layout: Layout,
        eps: float,
        rates: tuple[float, float],
        flags: dict[str, bool],
    ) -> None:
        whole = layout.with_whole_groups()
        rows = _rows(whole, x)
        plane = whole.grouping.B * rows.R * whole.grouping.G
        self.num_parts = 4 * plane
        self.measure = Launch(
            measure_groups_kernel,
            rows.num_programs,
            (*whole.strides[0], *_cut(whole.grouping), *rows.numbers, plane),
            **_row_constants(rows, whole, x),
        )
        stream, constants = _stream(layout, x, rows.R)
        grouping = layout.grouping
        self.finish = Launch(
            normalize_groups_kernel,
            stream.num_programs,
            (*layout.strides[0], *layout.strides[1], grouping.K, grouping.Q, grouping.L,
             stream.splits, stream.span, grouping.E, grouping.J, grouping.G, rows.R, plane,
             grouping.num_cells, *halves(eps), *rates),
            **flags, **constants,
        )  # fmt: skip

    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *buffers: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Allocate, start, return."""
        x = x.contiguous() if self.copies else x
        y = torch.empty_like(x) if self.is_dense else x.new_empty(x.shape)
        table = x.new_empty(self.cells, dtype=torch.float64)
        with on_device(self.device):
            stream = current_stream(self.device)
            if self.measure is None:
                self.finish(stream, x, y, weight, bias, table, *buffers)
            else:
                parts = x.new_empty(self.num_parts, dtype=self.parts_dtype)
                self.measure(stream, x, parts)
                self.finish(stream, x, y, weight, bias, parts, table, *buffers)
        return y, table


def _cut(grouping: Grouping) -> tuple[int, ...]:
    return (grouping.N, grouping.Q, grouping.L, grouping.E, grouping.J, grouping.G)


def _tile(layout: Layout, x: Tensor, limits: Limits) -> Tile | None:
    wide = table_dtype(x.dtype).itemsize // 4
    fitting = Limits(limits.elements // wide, limits.elements_per_warp // wide)
    return tile_blocks(layout, x.element_size(), fitting, num_processors(x.device))


def _tile_constants(tile: Tile, layout: Layout, x: Tensor) -> Constants:
    single = layout.grouping.J == 1
    blocks = {"BG": tile.BG, "BR": tile.BR, "BL": tile.BL, "SINGLE": single}
    return {**blocks, **map_constants(layout, x)}


def _rows(layout: Layout, x: Tensor) -> Rows:
    elements = CONFIGS[0].elements * 4 // table_dtype(x.dtype).itemsize
    return row_blocks(layout, elements, PROGRAMS_THAT_REDUCE * num_processors(x.device))


def _row_constants(rows: Rows, layout: Layout, x: Tensor) -> Constants:
    constants = map_constants(layout, x)
    constants["ALIGN"] = min(layout.alignment, rows.BL)  # divides a stretch, too
    return {"BG": rows.BG, "BJ": rows.BJ, "BL": rows.BL, **constants}


def _stream(layout: Layout, x: Tensor, num_rows: int) -> tuple[Stream, Constants]:
    """Blocks of programs that write, which also pool so many rows."""
    programs = PROGRAMS_THAT_WRITE * num_processors(x.device)
    stream = stream_blocks(layout, CONFIGS[0].elements, programs)
    rows = min(power_of_two(num_rows), max(ROWS_AT_ONCE // stream.BK, 1))
    return stream, {"BR": rows, **stream_constants(stream, x, layout)}


_FORWARD, _BACKWARD, _GIVEN, _GIVEN_BACKWARD = Plans(), Plans(), Plans(), Plans()


def backward(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    weight: Tensor | None,
    pooling: Pooling,
    wanted: Wanted,
) -> Results:
    """Gradients of x, weight and bias; empty where not wanted."""
    kind = (
        x.shape, x.stride(), x.dtype, x.get_device(), grad.stride(), grad.dtype, table.shape,
        pooling, wanted, dtype_of(weight), alignment(grad, x, table, weight),
    )  # fmt: skip
    plan = _BACKWARD.find(kind, lambda: BackwardPlan(grad, x, table, weight, pooling, wanted))
    return plan(grad, x, table, table, weight)


class BackwardPlan:
    """A backward call of one kind; the statistics may be constants."""

    def __init__(
        self,
        grad: Tensor,
        x: Tensor,
        table: Tensor | None,
        weight: Tensor | None,
        pooling: Pooling,
        wanted: Wanted,
    ) -> None:
        self.copies = tuple(Map.of(t).tensor is not t for t in (grad, x))
        grad, x = (t.contiguous() if c else t for t, c in zip((grad, x), self.copies, strict=True))
        self.is_dense, self.device, self.wanted = is_dense(x), x.get_device(), wanted
        self.dtype = table_dtype(x.dtype)
        grouping = Grouping.of(x, pooling.num_groups, pooling.examples_per_group)
        maps = Map.of(grad), Map.of(x), Map.of(result_like(x))
        self.layout = layout = Layout.of(grouping, *maps)
        self.strides = tuple(stride for strides in layout.strides for stride in strides)
        self.num_channels, self.eps = grouping.C, pooling.eps
        self.has_weight = weight is not None
        # Shapes of the tables of sums: of segments, and of groups.
        self.rows, self.group_rows, self.num_sums, self.added = (0, 0), (0, 0), 0, 0
        self.place = x.device
        self.reduce: Launch | None = None
        self.total: Launch | None = None
        tile = None if table is None else _tile(layout, x, BACKWARD)
        if tile is None:
            self._plan_two(x, table)
        else:
            self._plan_tile(x, tile, 0 if table is None else table.shape[1])

    def _plan_tile(self, x: Tensor, tile: Tile, num_cells: int) -> None:
        grouping, needs = self.layout.grouping, self.wanted.any
        by_run = grouping.J == 1
        rows = (grouping.B if by_run else grouping.N) if needs else 0
        self.num_sums = rows * grouping.K
        self.is_tile = True
        self.finish = Launch(
            tile_backward_kernel,
            tile.num_programs,
            (*self.strides, *_cut(grouping), grouping.K, num_cells, *halves(self.eps)),
            tile.num_warps,
            HAS_WEIGHT=self.has_weight, BY_RUN=needs and by_run, BY_ROW=needs and not by_run,
            **_tile_constants(tile, self.layout, x),
        )  # fmt: skip
        # one row of channels is a gradient already
        if needs and (rows > 1 or grouping.Q > 1):
            self.total = self._adding(rows)

    def _adding(self, rows: int) -> Launch:
        grouping = self.layout.grouping
        columns = min(power_of_two(grouping.C), 32)
        return Launch(
            parameter_sums_kernel,
            ceil_div(grouping.C, columns),
            (rows, grouping.C, grouping.Q),
            BK=columns, BR=min(power_of_two(rows * grouping.Q), 32), ACC=accumulator(self.dtype),
        )  # fmt: skip

    def _plan_two(self, x: Tensor, table: Tensor | None) -> None:
        layout, grouping, constant = self.layout, self.layout.grouping, table is None
        self.is_tile = False
        rows = _rows(layout._replace(strides=layout.strides[:2]), x)
        has_groups = grouping.J > 1 and not constant
        has_sums = self.wanted.any or (not has_groups and not constant)
        num_rows = grouping.B * rows.R
        self.rows = (num_rows if has_sums else 0, grouping.K)
        self.group_rows = (num_rows if has_groups else 0, grouping.G)
        var_at, cell_row = (0, 0) if table is None else (table.shape[1], grouping.G)
        planes = (num_rows * grouping.K, num_rows * grouping.G)
        flags = {"HAS_WEIGHT": self.has_weight, "HAS_GROUPS": has_groups}
        if has_sums or has_groups:
            self.reduce = Launch(
                reduce_groups_kernel,
                rows.num_programs,
                (*self.strides[:6], *_cut(grouping), *rows.numbers, var_at, cell_row, *planes,
                 *halves(self.eps)),
                HAS_SUMS=has_sums, **flags, **_row_constants(rows, layout, x),
            )  # fmt: skip
        adds = self.wanted.any and grouping.Q == 1
        self.added = grouping.C if adds else 0
        stream, constants = _stream(layout, x, max(rows.R, num_rows if adds else 1))
        self.finish = Launch(
            gradient_groups_kernel,
            stream.num_programs,
            (*self.strides, grouping.N, grouping.K, grouping.Q, grouping.L,
             stream.splits, stream.span, grouping.E, grouping.J, grouping.G, rows.R, grouping.B,
             var_at, cell_row, *planes, grouping.J * grouping.L, *halves(self.eps)),
            ADDS=adds, CONSTANT=constant, **flags, **constants,
        )  # fmt: skip
        if self.wanted.any and not adds:
            self.total = self._adding(num_rows)

    def __call__(
        self, grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None
    ) -> Results:
        """Allocate, start, return."""
        grad = grad.contiguous() if self.copies[0] else grad
        x = x.contiguous() if self.copies[1] else x
        dx = torch.empty_like(x) if self.is_dense else x.new_empty(x.shape)
        with on_device(self.device):
            stream = current_stream(self.device)
            if self.is_tile:
                found = self._by_tile(stream, (grad, x, dx, weight, mean))
            else:
                found = self._by_two(stream, (grad, x, dx, weight, mean, var))
        if self.wanted.weight and self.wanted.bias:
            return dx, *found
        dweight, dbias = (
            t if wanted else self._empty(0) for t, wanted in zip(found, self.wanted, strict=True)
        )
        return dx, dweight, dbias

    def _by_tile(
        self, stream: int | None, tensors: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, Tensor]:
        sums, sums_x = self._empty(self.num_sums), self._empty(self.num_sums)
        self.finish(stream, *tensors, sums, sums_x)
        if self.total is None:
            return sums_x, sums
        return self._added(stream, sums, sums_x)

    def _by_two(
        self, stream: int | None, tensors: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, Tensor]:
        grad, x, dx, weight, mean, var = tensors
        sums, groups = self._empty((2, *self.rows)), self._empty((2, *self.group_rows))
        dweight, dbias = self._empty(self.added), self._empty(self.added)
        if self.reduce is not None:
            self.reduce(stream, grad, x, weight, mean, var, sums, groups)
        self.finish(stream, grad, x, dx, weight, mean, var, sums, groups, dweight, dbias)
        if self.total is None:
            return dweight, dbias
        return self._added(stream, sums[0], sums[1])

    def _added(self, stream: int | None, *sums: Tensor) -> tuple[Tensor, Tensor]:
        dweight, dbias = self._empty(self.num_channels), self._empty(self.num_channels)
        if self.total is not None:
            self.total(stream, *sums, dweight, dbias)
        return dweight, dbias

    def _empty(self, shape: int | tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.place)


def forward_given(x: Tensor, statistics: Statistics, affine: Affine) -> Tensor:
    """Normalise by given statistics of the groups of every example, ``(G,)``."""
    weight, bias = affine
    mean, var = statistics.mean.contiguous(), statistics.var.contiguous()
    kind = (
        x.shape, x.stride(), x.dtype, x.get_device(), mean.shape, mean.dtype, var.dtype,
        statistics.eps, dtype_of(weight), dtype_of(bias), alignment(x, mean, var, weight, bias),
    )  # fmt: skip
    plan = _GIVEN.find(kind, lambda: GivenPlan(x, statistics, affine))
    return plan(x, mean, var, weight, bias)


class GivenPlan:
    """A forward call of one kind with given statistics."""

    def __init__(self, x: Tensor, statistics: Statistics, affine: Affine) -> None:
        self.copies = Map.of(x).tensor is not x
        x = x.contiguous() if self.copies else x
        self.is_dense, self.device = is_dense(x), x.get_device()
        maps = Map.of(x), Map.of(result_like(x))
        layout = Layout.of(Grouping.of(x, statistics.mean.numel(), 0), *maps)
        grouping = layout.grouping
        stream = stream_blocks(
            layout, CONFIGS[0].elements, PROGRAMS_THAT_WRITE * num_processors(x.device)
        )
        weight, bias = affine
        self.finish = Launch(
            apply_kernel,
            stream.num_programs,
            (*layout.strides[0], *layout.strides[1], grouping.K, grouping.Q, grouping.L,
             stream.splits, stream.span, grouping.E, grouping.J, grouping.G, 0, 0,
             *halves(statistics.eps)),
            POOLED=True, CENTERED=True, HAS_SCALE=weight is not None, HAS_CENTER=bias is not None,
            **stream_constants(stream, x, layout),
        )  # fmt: skip

    def __call__(self, x: Tensor, *tables: Tensor | None) -> Tensor:
        """Allocate, start, return."""
        x = x.contiguous() if self.copies else x
        y = torch.empty_like(x) if self.is_dense else x.new_empty(x.shape)
        with on_device(self.device):
            self.finish(current_stream(self.device), x, y, *tables)
        return y


def backward_given(
    grad: Tensor, x: Tensor, statistics: Statistics, weight: Tensor | None, wanted: Wanted
) -> Results:
    """Gradients of x, weight and bias, with constant statistics."""
    mean, var = statistics.mean.contiguous(), statistics.var.contiguous()
    pooling = Pooling(mean.numel(), 0, statistics.eps)
    kind = (
        x.shape, x.stride(), x.dtype, x.get_device(), grad.stride(), grad.dtype, mean.dtype,
        var.dtype, pooling, wanted, dtype_of(weight), alignment(grad, x, mean, var, weight),
    )  # fmt: skip
    plan = _GIVEN_BACKWARD.find(kind, lambda: BackwardPlan(grad, x, None, weight, pooling, wanted))
    return plan(grad, x, mean, var, weight)


def _forward_with_channels(
    x: Tensor, affine: Affine, pooling: Pooling, follower: Follower | None
) -> tuple[Tensor, Tensor]:
    """Measure segments, pool them into groups and into channels, normalise."""
    weight, bias = (None if t is None else t.contiguous() for t in affine)
    grouping = Grouping.of(x, pooling.num_groups, pooling.examples_per_group)
    num_cells = grouping.num_cells
    table = x.new_empty((2, num_cells + grouping.C), dtype=torch.float64)
    y = result_like(x)
    maps = Map.of(x), Map.of(y)
    layout = Layout.of(grouping, *maps)
    parts = passes.measure(maps[0], layout)
    of_groups = table[0, :num_cells], table[1, :num_cells]
    of_channels = table[0, num_cells:], table[1, num_cells:]
    grouping = layout.grouping
    _pool_groups(parts, layout, grouping.E, grouping.J, (of_groups, None))
    _pool_groups(parts, layout, grouping.N, grouping.Q, (of_channels, follower))
    passes.apply_groups(*maps, layout, Statistics(*of_groups, pooling.eps), (weight, bias))
    return y, table


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
