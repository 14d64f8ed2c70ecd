"""How kernels are started: on the tensor's device and the current stream, without waiting."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from normkit.kernels.triton.geometry import Layout, Stream
from normkit.kernels.triton.plan import INTERPRETED

INTERPRETED_PROCESSORS = 2


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    kernel: Any,  # noqa: ANN401 - compiled or interpreted
    num_programs: int,
    arguments: Sequence[object],
    num_warps: int = 4,
    **constants: Any,  # noqa: ANN401 - numbers, flags and dtypes
) -> None:
    """Start a kernel; the first argument is a tensor on its device."""
    with _on_device_of(arguments[0]):
        kernel[(num_programs,)](*arguments, **constants, num_warps=num_warps)


def _on_device_of(tensor: object) -> AbstractContextManager[object]:
    if not isinstance(tensor, Tensor) or not tensor.is_cuda:
        return nullcontext()
    if tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def halves(value: float) -> tuple[float, float]:
    """A number as the sum of two that float32 holds; kernels take no float64."""
    high = ctypes.c_float(value).value
    return high, value - high


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What kernels compute maps of this dtype in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


class Config(NamedTuple):
    """How many elements a program takes at a time, and with how many warps."""

    elements: int
    num_warps: int


Constants = dict[str, Any]
"""What a kernel is compiled for."""

CONFIGS = (Config(2048, 4), Config(4096, 8), Config(1024, 4))
"""What is tried for a kind of call; the first is taken where nothing can be tried."""

_found: dict[tuple[object, ...], Config] = {}
TRIALS = 5


def best_config(
    key: tuple[object, ...], device: torch.device, run: Callable[[Config], object]
) -> Config:
    """The fastest configuration of a kind of call, tried once in a process.

    ``run`` starts the kernel, whose results do not depend on how often it ran. While a CUDA graph
    is captured, in the interpreter and where the CPU computes, nothing is tried.
    """
    found = _found.get(key)
    if found is not None:
        return found
    if INTERPRETED or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return CONFIGS[0]
    with torch.cuda.device(device):
        times = {config: _time_ms(run, config) for config in CONFIGS}
    _found[key] = min(times, key=lambda config: times[config])
    return _found[key]


def _time_ms(run: Callable[[Config], object], config: Config) -> float:
    """Fastest of a few runs, by the device's clock."""
    run(config)  # compiles
    times = []
    for _ in range(TRIALS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(config)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return min(times)


def stream_constants(stream: Stream, x: Tensor, layout: Layout) -> Constants:
    """What every streaming kernel is compiled for."""
    constants = map_constants(layout, x)
    constants["ALIGN"] = min(layout.alignment, stream.BL)  # divides a program's span, too
    return {"BK": stream.BK, "BL": stream.BL, **constants}


def map_constants(layout: Layout, x: Tensor) -> Constants:
    """What every kernel on maps is compiled for."""
    return {"ACC": accumulator(x.dtype), "WIDE": layout.wide, "ALIGN": layout.alignment}
