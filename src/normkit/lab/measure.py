"""Peak memory of a training step."""

import gc
import os
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

ALLOCATION = _EventType.Allocation


def peak_step_bytes(
    step: Callable[[], object], model: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Bytes alive at the peak of one training step, everything the step keeps included.

    The step runs twice, the second time measured, so that the optimizer's state exists. On CUDA
    this is the allocator's peak. On the CPU it is what the step allocates on top of parameters,
    buffers and optimizer state at its worst moment, counted from torch's own allocation events;
    scratch space that a backend takes behind torch's back is not in it.

    Args:
        step: Forward, backward and update; gradients are dropped before it.
        model: The network that it trains.
        optimizer: What it updates with.
    """
    device = next(model.parameters()).device
    step()
    optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    return _kept_bytes(model, optimizer) + _peak_of(_allocations(step))


def _kept_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    state = [v for values in optimizer.state.values() for v in values.values()]
    tensors = [*model.parameters(), *model.buffers(), *state]
    return _num_bytes(t for t in tensors if isinstance(t, Tensor))


def _num_bytes(tensors: Iterable[Shaped[Tensor, "..."]]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _allocations(step: Callable[[], object]) -> list[tuple[int, int]]:
    """Blocks taken (positive) and given back (negative) by torch, in order of time.

    Returns:
        The address and the bytes of each.
    """
    with (
        _quiet_kineto(),
        no_collection(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        step()
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [e for e in _all_of(results.experimental_event_tree()) if e.tag == ALLOCATION]
    blocks = [event.extra_fields for event in sorted(events, key=lambda event: event.start_time_ns)]
    return [(block.ptr, block.alloc_size) for block in blocks]


def _all_of(events: Iterable[Any]) -> Generator[Any]:
    for event in events:
        yield event
        yield from _all_of(event.children)


def _peak_of(allocations: Iterable[tuple[int, int]]) -> int:
    """The most bytes alive at once of the blocks that are taken here.

    A block that is only given back here is not counted: torch may remember another one, of another
    size, that lay at its address when something else was measured.
    """
    alive: dict[int, int] = {}
    total = peak = 0
    for address, num_bytes in allocations:
        if num_bytes > 0:
            total += num_bytes
            alive[address] = num_bytes
        else:
            total -= alive.pop(address, 0)
        peak = max(peak, total)
    return peak


@contextmanager
def no_collection() -> Generator[None]:
    """Switch off Python's garbage collector, which would disturb what is measured."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _quiet_kineto() -> Generator[None]:
    """Keep the profiler's library, which reads this variable once, from writing to stderr."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
        else:
            os.environ["KINETO_LOG_LEVEL"] = before
