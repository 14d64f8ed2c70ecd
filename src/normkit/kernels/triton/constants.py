"""What kernels are compiled for, by name."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from normkit.kernels.triton.geometry import Layout, Stream

Constants = dict[str, Any]
ELEMENTS = 2048
"""Of a block that a program streams at a time."""


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What kernels compute maps of this dtype in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def stream_constants(stream: Stream, x: Tensor, layout: Layout) -> Constants:
    """For every streaming kernel."""
    constants = map_constants(layout, x)
    constants["ALIGN"] = min(layout.alignment, stream.BL)  # divides a program's span, too
    return {"BK": stream.BK, "BL": stream.BL, **constants}


def map_constants(layout: Layout, x: Tensor) -> Constants:
    """For every kernel on maps."""
    return {"ACC": accumulator(x.dtype), "WIDE": layout.wide, "ALIGN": layout.alignment}
