"""What kernels are compiled for, by name."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from normkit.kernels.triton.geometry import Layout, Stream

Constants = dict[str, Any]
ELEMENTS = 4096
"""Of two bytes, of a block that a program streams at a time: 64 bytes a thread."""
VECTOR_BYTES = 16  # that a thread loads at a time, at most


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What kernels compute maps of this dtype in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def stream_constants(stream: Stream, x: Tensor, layout: Layout) -> Constants:
    """For every streaming kernel."""
    constants = map_constants(layout, x)
    constants["ALIGN"] = min(layout.alignment, stream.BL)  # divides a program's span, too
    constants["ONCE"] = stream.span <= stream.BL
    constants["FOLD"] = fold((stream.BK, stream.BL), x, layout)
    return {"BK": stream.BK, "BL": stream.BL, **constants}


def fold(block: tuple[int, int], x: Tensor, layout: Layout, num_warps: int = 4) -> int:
    """Parts of the rows of a block ``(rows, elements)`` that a thread has in its registers.

    Threads are spread over whatever lies side by side in memory, then over the rest of a row.
    """
    rows, elements = block
    if rows > 1 and not layout.by_channel:
        return 1
    at_a_time = 32 * num_warps * max(VECTOR_BYTES // x.element_size(), 1)
    return min(max(rows * elements // at_a_time, 1), elements)


def map_constants(layout: Layout, x: Tensor) -> Constants:
    """For every kernel on maps."""
    return {"ACC": accumulator(x.dtype), "WIDE": layout.wide, "ALIGN": layout.alignment}
