"""Backward passes of single-partition layers: the ending, the transpose of pooling, gradients.

The gradient of the activation's input is also the residual's gradient. With a residual it is
therefore stored: by the only launch if groups fit a program, otherwise by the first launch, and
the second reads it. Without a residual both launches compute it from ``x``.
"""

from __future__ import annotations

from typing import NamedTuple

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
from normkit.kernels.triton.geometry import (
    Grouping,
    Layout,
    Limits,
    Map,
    Rows,
    Tile,
    result_like,
)
from normkit.kernels.triton.group_gradients import gradient_groups_kernel, reduce_groups_kernel
from normkit.kernels.triton.passes import NO_ENDING, Ending
from normkit.kernels.triton.plan import in_one_piece, launch
from normkit.kernels.triton.tiles import tile_backward_kernel

TWO_MAPS = Limits(16384, 512)  # float32: 64 registers of each of at most 512 threads

Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]
Affine = tuple[Tensor | None, Tensor | None]


class _Backward(NamedTuple):
    """What a backward pass reads and writes; variances begin at cell ``var_at`` of their tensor.

    ``passed`` is memory for the gradient of the activation's input, in the layout of ``dx``.
    """

    grad: Map
    x: Map
    dx: Map
    layout: Layout
    statistics: tuple[Tensor, Tensor]
    affine: Affine
    eps: float
    wanted: tuple[bool, bool]
    is_constant: bool
    ending: Ending
    passed: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.grad.tensor, self.x.tensor, self.dx.tensor

    @property
    def strides(self) -> tuple[int, ...]:
        strides = self.layout.strides
        maps = strides[0], strides[1], strides[-1], self.ending.strides(self.layout)
        return tuple(stride for each in maps for stride in each)

    @property
    def flags(self) -> Constants:
        weight, bias = self.affine
        return {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}

    @property
    def ending_flags(self) -> Constants:
        return {**self.ending.flags, "PASSES": self.passed is not None}

    @property
    def floats(self) -> tuple[float, ...]:
        return *halves(self.eps), *halves(self.ending.slope)

    @property
    def var_at(self) -> int:
        return 0 if self.is_constant else self.statistics[1].shape[1]

    @property
    def cell_row(self) -> int:
        """Number of cells of a run of examples; 0 if all examples share one row."""
        return 0 if self.is_constant else self.layout.grouping.G


def backward(  # noqa: PLR0913 - the operator's own arguments
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    weight: Tensor | None,
    num_groups: int,
    examples_per_group: int,
    eps: float,
    *wanted: bool,
) -> Three:
    """Gradients of x, weight and bias; empty where not wanted."""
    pooling, nothing = (num_groups, examples_per_group, eps), (None, None, None)
    dx, _, dweight, dbias = backward_ended(
        grad, x, table, weight, *nothing, *pooling, 0, 0.0, False, *wanted
    )
    return dx, dweight, dbias


def backward_ended(  # noqa: PLR0913
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    result: Tensor | None,
    num_groups: int,
    examples_per_group: int,
    eps: float,
    activation: int,
    slope: float,
    *wanted: bool,
) -> Four:
    """Gradients of x, residual, weight and bias; empty where not wanted."""
    grouping = Grouping.of(x, num_groups, examples_per_group)
    table = in_one_piece(table)
    ending = Ending.of(residual, activation, slope, result)
    call = _backward(grouping, (grad, x), (table, table), (weight, bias), eps, wanted[1:], ending)
    tile = tile_of(call.layout, x, TWO_MAPS)
    return _in_two(call, wanted[0]) if tile is None else _in_tiles(call, tile, wanted[0])


def backward_given(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    *wanted: bool,
) -> Three:
    """Gradients of x, weight and bias, with constant statistics."""
    nothing = (None, None, None)
    dx, _, dweight, dbias = backward_given_ended(
        grad, x, mean, var, weight, *nothing, eps, 0, 0.0, False, *wanted
    )
    return dx, dweight, dbias


def backward_given_ended(  # noqa: PLR0913
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    result: Tensor | None,
    eps: float,
    activation: int,
    slope: float,
    *wanted: bool,
) -> Four:
    """Gradients of x, residual, weight and bias, with constant statistics."""
    grouping = Grouping.of(x, mean.numel(), 0)
    statistics = in_one_piece(mean), in_one_piece(var)
    ending = Ending.of(residual, activation, slope, result)
    call = _backward(grouping, (grad, x), statistics, (weight, bias), eps, wanted[1:], ending)
    return _in_two(call._replace(is_constant=True), wanted[0])


def _backward(  # noqa: PLR0913
    grouping: Grouping,
    maps: tuple[Tensor, Tensor],
    statistics: tuple[Tensor, Tensor],
    affine: Affine,
    eps: float,
    wanted: tuple[bool, ...],
    ending: Ending,
) -> _Backward:
    grad, x = (Map.of(t) for t in maps)
    dx = Map.of(result_like(x.tensor))
    layout = Layout.of(grouping, grad, x, *ending.maps, dx)
    weight, bias = affine
    held = table_of(weight), table_of(bias) if ending.reads_norm else None
    needs = wanted[0], wanted[1]
    return _Backward(
        grad, x, dx, layout, statistics, held, eps, needs, False, ending, None
    )  # fmt: skip


def _in_tiles(call: _Backward, tile: Tile, needs_residual: bool) -> Four:
    layout, grouping, (grad, x, dx) = call.layout, call.layout.grouping, call.tensors
    call = call._replace(passed=result_like(x) if needs_residual else None)
    needs, by_run = any(call.wanted), grouping.J == 1
    rows = (grouping.B if by_run else grouping.N) if needs else 0
    sums = passes.flat_sums(x, rows * grouping.K)
    launch(
        tile_backward_kernel,
        tile.num_programs,
        (grad, x, dx, *call.affine, call.statistics[0], *sums, call.ending.tensor, call.passed),
        (*call.strides, *numbers_of(grouping), grouping.K, call.var_at, *call.floats),
        tile.num_warps,
        BY_RUN=needs and by_run, BY_ROW=needs and not by_run, **call.flags, **call.ending_flags,
        **tile_constants(tile, layout, x),
    )  # fmt: skip
    sizes = grouping.C, grouping.Q
    found = passes.parameter_gradients(sums, rows, sizes, call.wanted)
    return dx, _or_nothing(call.passed, x), *found


def _or_nothing(passed: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=table_dtype(x.dtype)) if passed is None else passed


class _Sums(NamedTuple):
    """Rows of partial sums over segments and over groups; each has two planes, or is empty."""

    rows: Rows
    of_segments: Tensor
    of_groups: Tensor

    @property
    def planes(self) -> tuple[int, int]:
        return self.of_segments.numel() // 2, self.of_groups.numel() // 2


def _in_two(call: _Backward, needs_residual: bool) -> Four:
    grouping, (_, x, dx) = call.layout.grouping, call.tensors
    if needs_residual or call.ending.added is not None:
        call = call._replace(passed=result_like(x))
    sums = _reduced(call)
    adds = any(call.wanted)
    num_rows = grouping.B * sums.rows.R * grouping.Q if adds else 1
    dweight, dbias = passes.flat_sums(x, grouping.C if adds else 0)
    _write_gradient(_behind(call), sums, (dweight, dbias), num_rows)
    need_weight, need_bias = call.wanted
    return (
        dx,
        _or_nothing(call.passed if needs_residual else None, x),
        dweight if need_weight else x.new_empty(0, dtype=dweight.dtype),
        dbias if need_bias else x.new_empty(0, dtype=dbias.dtype),
    )


def _behind(call: _Backward) -> _Backward:
    """The second launch; it reads the gradient of the activation's input if that was stored."""
    if call.passed is None:
        return call
    strides = call.layout.strides
    layout = call.layout._replace(strides=(strides[-1], strides[1], strides[-1]))
    grad = call.dx._replace(tensor=call.passed)
    affine = call.affine[0], None
    return call._replace(grad=grad, layout=layout, affine=affine, ending=NO_ENDING)


def _reduced(call: _Backward) -> _Sums:
    """Do the first launch, if the second needs sums or a stored gradient; return the sums."""
    grouping, (grad, x, _) = call.layout.grouping, call.tensors
    writes, strides = call.passed is not None, call.layout.strides
    layout = call.layout._replace(strides=(*strides[2:], *strides[:2]) if writes else strides[:2])
    rows = rows_of(layout, x)
    has_groups = grouping.J > 1 and not call.is_constant
    has_sums = any(call.wanted) or (not has_groups and not call.is_constant)
    num_rows, dtype = grouping.B * rows.R, table_dtype(x.dtype)
    sums = _Sums(
        rows,
        x.new_empty((2, num_rows if has_sums else 0, grouping.K), dtype=dtype),
        x.new_empty((2, num_rows if has_groups else 0, grouping.G), dtype=dtype),
    )
    if has_sums or has_groups or writes:
        launch(
            reduce_groups_kernel,
            rows.num_programs,
            (grad, x, *call.affine, *call.statistics, sums.of_segments, sums.of_groups,
             call.ending.tensor, call.passed),
            (*call.strides, *numbers_of(grouping), *rows.numbers, call.var_at, call.cell_row,
             *sums.planes, *call.floats),
            rows.num_warps,
            HAS_SUMS=has_sums, HAS_GROUPS=has_groups, **call.flags, **call.ending_flags,
            **row_constants(rows, layout, x),
        )  # fmt: skip
    return sums


def _write_gradient(
    call: _Backward, sums: _Sums, out: tuple[Tensor, Tensor], num_rows: int
) -> None:
    layout, grouping, rows = call.layout, call.layout.grouping, sums.rows
    stream, constants = stream_of(layout, call.tensors[1], max(rows.R, num_rows))
    launch(
        gradient_groups_kernel,
        stream.num_programs,
        (*call.tensors, *call.affine, *call.statistics, sums.of_segments, sums.of_groups, *out),
        (*call.strides[:9], grouping.N, grouping.K, grouping.Q, grouping.L, stream.splits,
         stream.span, grouping.E, grouping.J, grouping.G, rows.R, grouping.B, call.var_at,
         call.cell_row, *sums.planes, grouping.J * grouping.L, *call.floats),
        HAS_GROUPS=sums.of_groups.numel() > 0, ADDS=out[0].numel() > 0, CONSTANT=call.is_constant,
        ACT=call.ending.activation, **call.flags, **constants,
    )  # fmt: skip
