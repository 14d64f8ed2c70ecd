"""``PositionalNorm``: one launch forward, and two backward, of which the second adds up parts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from normkit.kernels.reference import table_dtype
from normkit.kernels.triton import passes
from normkit.kernels.triton.arguments import halves
from normkit.kernels.triton.constants import Constants, accumulator
from normkit.kernels.triton.geometry import Map, ceil_div, power_of_two, result_like
from normkit.kernels.triton.passes import Ending
from normkit.kernels.triton.plan import in_one_piece, launch, num_processors
from normkit.kernels.triton.positions import positions_backward_kernel, positions_forward_kernel

MOST_CHANNELS = 32768  # that one program can hold
ELEMENTS = 8192  # of a block
MOST_POSITIONS = 64  # of a block
PROGRAMS_THAT_REDUCE = 4  # per multiprocessor


class _Blocks(NamedTuple):
    """How a map ``(N, C, P)`` is cut into blocks of channels by positions."""

    num_channels: int
    num_positions: int
    BC: int
    BP: int
    num_blocks: int

    @classmethod
    def of(cls, x: Tensor) -> _Blocks:
        positions = math.prod(x.shape[2:])
        channels = power_of_two(x.shape[1])
        most = ELEMENTS // (table_dtype(x.dtype).itemsize // 4)
        width = max(min(power_of_two(positions), most // channels, MOST_POSITIONS), 1)
        blocks = x.shape[0] * ceil_div(positions, width)
        return cls(x.shape[1], positions, channels, width, blocks)

    @property
    def num_warps(self) -> int:
        return min(max(self.BC * self.BP // 512, 1), 16)


def _constants(blocks: _Blocks, *maps: Map) -> Constants:
    wide = any(m.is_wide for m in maps)
    acc = accumulator(maps[0].tensor.dtype)
    return {"BC": blocks.BC, "BP": blocks.BP, "ACC": acc, "WIDE": wide}


def _strides(ending: Ending) -> tuple[int, ...]:
    return (0, 0, 0) if ending.added is None else ending.added.strides


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``y`` and the positions' statistics, float64 ``(2, N * P)``."""
    return forward_ended(x, weight, bias, None, eps, 0, 0.0)


def forward_ended(  # noqa: PLR0913 - the operator's own arguments
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """``act(y + residual)`` and the positions' statistics."""
    y, blocks = result_like(x), _Blocks.of(x)
    source, target, ending = Map.of(x), Map.of(y), Ending.of(residual, activation, slope)
    table = x.new_empty((2, x.shape[0] * blocks.num_positions), dtype=torch.float64)
    affine = [None if t is None else in_one_piece(t) for t in (weight, bias)]
    launch(
        positions_forward_kernel,
        blocks.num_blocks,
        (source.tensor, y, *affine, *table, ending.tensor),
        (*source.strides, *target.strides, *_strides(ending), blocks.num_channels,
         blocks.num_positions, *halves(eps), *halves(slope)),
        blocks.num_warps,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **ending.flags,
        **_constants(blocks, source, *ending.maps, target),
    )  # fmt: skip
    return y, table


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, *wanted: bool
) -> tuple[Tensor, ...]:
    """Gradients of x, weight and bias; empty where not wanted."""
    dx, _, *found = backward_ended(grad, x, weight, None, None, None, eps, 0, 0.0, False, *wanted)
    return dx, *found


def backward_ended(  # noqa: PLR0913
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    result: Tensor | None,
    eps: float,
    activation: int,
    slope: float,
    need_residual: bool,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x, residual, weight and bias; empty where not wanted."""
    dx, blocks = result_like(x), _Blocks.of(x)
    ending = Ending.of(residual, activation, slope, result)
    held = [None if t is None else in_one_piece(t) for t in (weight, bias)]
    passed = result_like(x) if need_residual else None
    maps = Map.of(grad), Map.of(x), Map.of(dx)
    strides = [stride for m in maps for stride in m.strides]
    items = 1
    if any(wanted):
        items = ceil_div(blocks.num_blocks, PROGRAMS_THAT_REDUCE * num_processors())
    programs = ceil_div(blocks.num_blocks, items)
    rows = programs if any(wanted) else 0
    sums = passes.flat_sums(x, rows * blocks.num_channels)
    launch(
        positions_backward_kernel,
        programs,
        (*(m.tensor for m in maps), *held, *sums, ending.tensor, passed),
        (*strides, *_strides(ending), blocks.num_channels, blocks.num_positions, items,
         blocks.num_blocks, *halves(eps), *halves(slope)),
        blocks.num_warps,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, NEEDS_SUMS=any(wanted),
        PASSES=need_residual, **ending.flags, **_constants(blocks, *maps, *ending.maps),
    )  # fmt: skip
    dresidual = x.new_empty(0, dtype=table_dtype(x.dtype)) if passed is None else passed
    return dx, dresidual, *passes.parameter_gradients(sums, rows, (blocks.num_channels, 1), wanted)
