"""Peak memory of a training step."""

import gc
import os
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


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


def _allocations(step: Callable[[], object]) -> list[int]:
    """Bytes taken (positive) and given back (negative) by torch, in order of time."""
    with (
        _quiet_kineto(),
        no_collection(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        step()
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def _peak_of(allocations: Iterable[int]) -> int:
    alive = peak = 0
    for num_bytes in allocations:
        alive += num_bytes
        peak = max(peak, alive)
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
