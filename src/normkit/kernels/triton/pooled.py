"""Forward passes of single-partition layers: statistics, pooling, scale and shift, the ending.

If groups fit a program, the map is read once, in one launch (``tiles``). Otherwise it is read
twice, in two launches (``groups``). ``pooled_gradients`` has the backward passes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normkit.kernels.reference import table_dtype
from normkit.kernels.triton import passes
from normkit.kernels.triton.arguments import halves
from normkit.kernels.triton.constants import Constants
from normkit.kernels.triton.cuts import (
    numbers_of,
    row_constants,
    rows_of,
    stream_of,
    table_of,
    tile_constants,
    tile_of,
)
from normkit.kernels.triton.geometry import Grouping, Layout, Limits, Map, Tile, result_like
from normkit.kernels.triton.groups import (
    measure_groups_kernel,
    measure_segments_kernel,
    normalize_groups_kernel,
)
from normkit.kernels.triton.passes import Ending, Follower, Statistics, follower_arguments
from normkit.kernels.triton.plan import in_one_piece, launch
from normkit.kernels.triton.tiles import tile_forward_kernel

ONE_MAP = Limits(32768, 1024)  # float32: 64 registers of each of at most 512 threads
TWO_MAPS = Limits(16384, 512)

Affine = tuple[Tensor | None, Tensor | None]


class _Forward(NamedTuple):
    """What a forward pass reads and writes."""

    x: Map
    y: Map
    layout: Layout
    affine: Affine
    follower: Follower | None
    eps: float
    ending: Ending

    @property
    def flags(self) -> Constants:
        weight, bias = self.affine
        _, flags = follower_arguments(self.follower)
        affine = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
        return {**affine, **flags, **self.ending.flags}

    @property
    def buffers(self) -> tuple[object, ...]:
        """Buffers that are updated, their rate, and the residual."""
        return *follower_arguments(self.follower)[0], self.ending.tensor

    @property
    def strides(self) -> tuple[int, ...]:
        strides = self.layout.strides
        return *strides[0], *strides[-1], *self.ending.strides(self.layout)

    @property
    def floats(self) -> tuple[float, ...]:
        return *halves(self.eps), *halves(self.ending.slope)


def forward(  # noqa: PLR0913 - the operator's own arguments
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    examples_per_group: int,
    eps: float,
    channel_statistics: bool,
    activation: int = 0,
    slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``y`` and the table of statistics, float64 ``(2, cells)``; buffers are updated."""
    follower = None
    if running_mean is not None and running_var is not None:
        follower = Follower(running_mean, running_var, counter)
    grouping = Grouping.of(x, num_groups, examples_per_group)
    source, ending = Map.of(x), Ending.of(residual, activation, slope)
    target = Map.of(result_like(source.tensor))
    layout = Layout.of(grouping, source, *ending.maps, target)
    affine = table_of(weight), table_of(bias)
    call = _Forward(source, target, layout, affine, follower, eps, ending)
    cells = grouping.num_cells + (grouping.C if channel_statistics else 0)
    table = x.new_empty((2, cells), dtype=torch.float64)
    limits = ONE_MAP if residual is None else TWO_MAPS
    tile = None if channel_statistics else tile_of(layout, x, limits)
    if tile is None:
        _forward_in_two(call, table, channel_statistics)
    else:
        _forward_in_tiles(call, table, tile)
    return target.tensor, table


def _forward_in_tiles(call: _Forward, table: Tensor, tile: Tile) -> None:
    layout, x = call.layout, call.x.tensor
    launch(
        tile_forward_kernel,
        tile.num_programs,
        (x, call.y.tensor, *call.affine, table, *call.buffers),
        (*call.strides, *numbers_of(layout.grouping), table.shape[1], *call.floats),
        tile.num_warps,
        **call.flags,
        **tile_constants(tile, layout, x),
    )


def _forward_in_two(call: _Forward, table: Tensor, has_channels: bool) -> None:
    layout, x = call.layout, call.x.tensor
    whole = layout if has_channels else layout.with_whole_groups()
    rows = rows_of(whole, x)
    num_rows = whole.grouping.B * rows.R
    planes = num_rows * whole.grouping.G, num_rows * whole.grouping.K
    dtype = table_dtype(x.dtype)
    parts = segments = x.new_empty(3 * planes[0] + num_rows, dtype=dtype)
    numbers = (*whole.strides[0], *numbers_of(whole.grouping), *rows.numbers)
    constants = row_constants(rows, whole, x)
    if has_channels and whole.grouping.J > 1:  # otherwise groups are channels
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
    stream, constants = stream_of(layout, x, num_rows * grouping.Q if has_channels else rows.R)
    launch(
        normalize_groups_kernel,
        stream.num_programs,
        (x, call.y.tensor, *call.affine, parts, segments, table, *call.buffers),
        (*call.strides, grouping.K, grouping.Q, grouping.L, stream.splits, stream.span,
         grouping.E, grouping.J, grouping.G, rows.R, grouping.B, *planes, table.shape[1],
         *call.floats),
        HAS_CHANNELS=has_channels, **call.flags, **constants,
    )  # fmt: skip


def forward_given(  # noqa: PLR0913
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int = 0,
    slope: float = 0.0,
) -> Tensor:
    """Normalise by given statistics of the groups of every example, ``(G,)``."""
    source, ending = Map.of(x), Ending.of(residual, activation, slope)
    target = Map.of(result_like(source.tensor))
    layout = Layout.of(Grouping.of(x, mean.numel(), 0), source, *ending.maps, target)
    statistics = Statistics(in_one_piece(mean), in_one_piece(var), eps)
    affine = table_of(weight), table_of(bias)
    passes.apply_groups(source, target, layout, statistics, affine, ending)
    return target.tensor
