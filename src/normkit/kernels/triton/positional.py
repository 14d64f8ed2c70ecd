"""``PositionalNorm``: one launch forward; backward one, and one that adds up what it has left."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from normkit.kernels.reference import table_dtype
from normkit.kernels.triton import passes
from normkit.kernels.triton.geometry import Map, ceil_div, power_of_two, result_like
from normkit.kernels.triton.launch import Constants, accumulator, halves, launch
from normkit.kernels.triton.positions import positions_backward_kernel, positions_forward_kernel

MOST_CHANNELS = 32768  # of a position, which one program holds
ELEMENTS = 8192  # of a block
MOST_POSITIONS = 64


class _Blocks(NamedTuple):
    """How a map ``(N, C, P)`` is shared: positions a program, and programs."""

    num_channels: int
    num_positions: int
    BC: int
    BP: int
    num_programs: int

    @classmethod
    def of(cls, x: Tensor) -> _Blocks:
        positions = math.prod(x.shape[2:])
        channels = power_of_two(x.shape[1])
        most = ELEMENTS // (table_dtype(x.dtype).itemsize // 4)
        width = max(min(power_of_two(positions), most // channels, MOST_POSITIONS), 1)
        programs = x.shape[0] * ceil_div(positions, width)
        return cls(x.shape[1], positions, channels, width, programs)

    @property
    def num_warps(self) -> int:
        return min(max(self.BC * self.BP // 512, 1), 16)


def _constants(blocks: _Blocks, *maps: Map) -> Constants:
    wide = any(m.is_wide for m in maps)
    acc = accumulator(maps[0].tensor.dtype)
    return {"BC": blocks.BC, "BP": blocks.BP, "ACC": acc, "WIDE": wide}


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``y`` and the positions' statistics, float64 ``(2, N * P)``."""
    y, blocks = result_like(x), _Blocks.of(x)
    source, target = Map.of(x), Map.of(y)
    table = x.new_empty((2, x.shape[0] * blocks.num_positions), dtype=torch.float64)
    affine = [None if t is None else t.contiguous() for t in (weight, bias)]
    launch(
        positions_forward_kernel,
        blocks.num_programs,
        (source.tensor, y, *affine, *table, *source.strides, *target.strides, blocks.num_channels,
         blocks.num_positions, *halves(eps)),
        blocks.num_warps,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        **_constants(blocks, source, target),
    )  # fmt: skip
    return y, table


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; empty where not wanted."""
    dx, blocks = result_like(x), _Blocks.of(x)
    maps = Map.of(grad), Map.of(x), Map.of(dx)
    strides = [stride for m in maps for stride in m.strides]
    rows = blocks.num_programs if any(wanted) else 0
    options = {"dtype": table_dtype(x.dtype), "device": x.device}
    sums, sums_x = (torch.empty(rows, blocks.num_channels, **options) for _ in range(2))
    launch(
        positions_backward_kernel,
        blocks.num_programs,
        (*(m.tensor for m in maps), None if weight is None else weight.contiguous(), sums, sums_x,
         *strides, blocks.num_channels, blocks.num_positions, *halves(eps)),
        blocks.num_warps,
        HAS_WEIGHT=weight is not None, NEEDS_SUMS=any(wanted), **_constants(blocks, *maps),
    )  # fmt: skip
    return dx, *_total(sums, sums_x, wanted)


def _total(sums: Tensor, sums_x: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """Sums over programs, in two steps and a fixed order: gradients of weight and bias."""
    nothing = [sums.new_empty(0) for _ in wanted]
    if not any(wanted):
        return nothing[0], nothing[1]
    for rows in (passes.ROWS_THAT_ADD, max(sums.shape[0], 1)):
        sums, sums_x = passes.sum_rows(sums, sums_x, min(rows, max(sums.shape[0], 1)))
    dweight, dbias = sums_x[0].clone(), sums[0].clone()  # results of an operator share no memory
    return dweight if wanted[0] else nothing[0], dbias if wanted[1] else nothing[1]
