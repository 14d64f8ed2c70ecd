"""What the measurements ask of a GPU: its name, its clock, its graphs; and one that pretends."""

import contextlib
import platform
import statistics
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton

ROOT = Path(__file__).parents[1]


def environment(pretends, commit=None):
    """What the figures were measured on, and with."""
    return {
        "device": torch.cuda.get_device_name(),
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda, "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or said_by("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "pretends": pretends,
    }  # fmt: skip


def said_by(*command):
    """The first line that a program prints; None where there is no such program."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.splitlines()[0].strip()
    return None


class Rounds(NamedTuple):
    """How often calls are timed: rounds, after some that do not count, and calls at once."""

    counted: int = 20
    warm_up: int = 5
    loops: int = 10


def times_us(calls, rounds):
    """Median microseconds from an idle GPU to the end of each call's kernels, in turns."""
    return _in_turns(calls, rounds, _until_done_us)


def host_us(calls, rounds):
    """Median microseconds until each call has returned, kernels started but not awaited."""
    return _in_turns(calls, rounds, lambda call: _until_returned_us(call, rounds.loops))


def _in_turns(calls, rounds, measure):
    found = {name: [] for name in calls}
    for turn in range(rounds.warm_up + rounds.counted):
        for name, call in calls.items():
            elapsed = measure(call)
            if turn >= rounds.warm_up:
                found[name].append(elapsed)
    return {name: round(statistics.median(values), 2) for name, values in found.items()}


def _until_done_us(call):
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3


def _until_returned_us(call, loops):
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - started) / loops * 1e6


def graphed(step):
    """A step as a CUDA graph: its kernels without the calls that start them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class _Event:
    """A moment, by the clock of the CPU."""

    def __init__(self, enable_timing=False):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


class _Stream:
    def wait_stream(self, other):
        pass


class _Graph:
    def replay(self):
        pass


def pretended():
    """A block in which ``torch.cuda`` answers as these measurements need it, without a GPU."""
    return patch.multiple(
        torch.cuda,
        Event=_Event,
        Stream=_Stream,
        CUDAGraph=_Graph,
        current_stream=_Stream,
        stream=contextlib.nullcontext,
        graph=contextlib.nullcontext,
        synchronize=lambda: None,
        reset_peak_memory_stats=lambda: None,
        max_memory_allocated=lambda: 0,
        memory_allocated=lambda: 0,
        get_device_name=lambda: "a pretended GPU",
    )
