"""What kernels are given: memory, float64 numbers in two parts, and buffers that they change."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor


def allocation(
    shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """Return a function that allocates an empty tensor; the device must be the current one.

    It calls the function that inductor's generated code calls, where torch has it: that takes half
    the time of ``torch.empty_strided``.
    """
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    fast = getattr(guards, f"_empty_strided_{device.type}", None)
    if fast is None:
        return partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)
    return partial(fast, tuple(shape), tuple(strides), dtype)


@lru_cache(maxsize=1024)
def halves(value: float) -> tuple[float, float]:
    """A number as the sum of two float32 numbers, because kernels take no float64 arguments."""
    high = ctypes.c_float(value).value
    return high, value - high


def count_change(buffers: Iterable[Tensor | None]) -> None:
    """Tell autograd that kernels have changed these buffers, because it cannot see that."""
    moved = [buffer for buffer in buffers if buffer is not None]
    if moved:
        torch.autograd.graph.increment_version(moved)
