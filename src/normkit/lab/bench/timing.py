"""Timing several calls in turns, so that disturbances of the machine affect all of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from normkit.lab.frozen import Frozen
from normkit.lab.measure import no_collection

WARM_UPS = 2
LEAST_REPEATS = 5
LOW, HIGH = 0.2, 0.8


class Times(Frozen):
    """Seconds that a call takes: the median and the 20th and 80th percentile."""

    median_s: float
    low_s: float
    high_s: float
    repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call that is timed, and its preparation, which is not timed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """When timing stops: after ``seconds`` or ``repeats``, but not before five repeats."""

    seconds: float
    repeats: int
    clock: Callable[[], float] = time.perf_counter
    """Reads the time on a CPU; use ``time.process_time`` if other programs use the machine."""


def time_in_turns(
    calls: Mapping[str, Call], budget: Budget, device: torch.device
) -> dict[str, Times]:
    """Time each call once per round; the order alternates from round to round.

    Args:
        calls: The calls by name.
        budget: When to stop.
        device: The device; on a GPU a call is timed until the GPU has finished it.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    with no_collection():
        for _ in range(min(WARM_UPS, budget.repeats)):
            for name in order:
                _time_once(calls[name], device, budget.clock)
        started = time.perf_counter()
        while _goes_on(len(samples[order[0]]), time.perf_counter() - started, budget):
            order.reverse()
            for name in order:
                samples[name].append(_time_once(calls[name], device, budget.clock))
    return {name: summarise(values) for name, values in samples.items()}


def _goes_on(num_done: int, elapsed_s: float, budget: Budget) -> bool:
    if num_done < min(LEAST_REPEATS, budget.repeats):
        return True
    return num_done < budget.repeats and elapsed_s < budget.seconds


def summarise(seconds: Sequence[float]) -> Times:
    """Median, 20th and 80th percentile of a call's times."""
    return Times(
        median_s=statistics.median(seconds),
        low_s=percentile(seconds, LOW),
        high_s=percentile(seconds, HIGH),
        repeats=len(seconds),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies, interpolated linearly."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def _time_once(call: Call, device: torch.device, clock: Callable[[], float]) -> float:
    call.prepare()
    return _by_events(call, device) if device.type == "cuda" else _by_clock(call, clock)


def _by_clock(call: Call, clock: Callable[[], float]) -> float:
    started = clock()
    result = call.run()
    elapsed_s = clock() - started
    del result  # freeing the memory is not timed, for any call
    return elapsed_s


def _by_events(call: Call, device: torch.device) -> float:
    """Time a call by the GPU's clock, from an idle GPU to the end of the work it has started."""
    with torch.cuda.device(device):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        result = call.run()
        stop.record()
        stop.synchronize()
    del result
    return start.elapsed_time(stop) / 1e3
