"""Constants that kernels are compiled for, by name."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from normkit.kernels.triton.geometry import Layout, Stream

Constants = dict[str, Any]
ELEMENTS = 4096
"""Elements, of two bytes, of the block that a program streams at a time: 64 bytes a thread."""
VECTOR_BYTES = 16  # the most that a thread loads at a time


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which kernels compute maps of this dtype."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def stream_constants(stream: Stream, x: Tensor, layout: Layout) -> Constants:
    """Constants of every streaming kernel."""
    constants = map_constants(layout, x)
    constants["ALIGN"] = min(layout.alignment, stream.BL)  # must also divide a program's span
    constants["ONCE"] = stream.span <= stream.BL
    constants["FOLD"] = fold((stream.BK, stream.BL), x, layout)
    return {"BK": stream.BK, "BL": stream.BL, **constants}


def fold(block: tuple[int, int], x: Tensor, layout: Layout, num_warps: int = 4) -> int:
    """Into how many parts a row of a block ``(rows, elements)`` can be cut and added up.

    Elements of a row that are added up lie in registers of the same thread, so this costs no
    exchange between threads. Threads lie along the axis that is contiguous in memory.
    """
    rows, elements = block
    if rows > 1 and not layout.by_channel:
        return 1
    at_a_time = 32 * num_warps * max(VECTOR_BYTES // x.element_size(), 1)
    return min(max(rows * elements // at_a_time, 1), elements)


def map_constants(layout: Layout, x: Tensor) -> Constants:
    """Constants of every kernel on maps."""
    return {"ACC": accumulator(x.dtype), "WIDE": layout.wide, "ALIGN": layout.alignment}
