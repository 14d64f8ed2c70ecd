"""Host time of calls of the Triton kernels, without a GPU: what happens between the launches.

    PYTHONPATH=src python benchmarks/host.py

Kernels are compiled for compute capability 9.0 and started as on a GPU, up to the call of the
driver, which only counts. Beside it, in turns, torch's ``BatchNorm2d`` computes a tiny map on the
CPU: all of its call. Prints a table and writes ``benchmarks/results/host.json``.
"""

import argparse
import ctypes
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import normkit as nk
from normkit.kernels import select
from normkit.kernels.triton import plan

NORMS = (
    "bn", "in", "ln", "gn:32", "pn", "bgn:32", "ghost:2", "gbgn:32:examples=2", "bcn:32",
    "bcn:32:micro", "gnplus:32", "sn", "ibn",
)  # fmt: skip
SHAPES = ((32, 256, 56, 56), (32, 256, 14, 14), (2, 512, 7, 7))
PROCESSORS = 132
CAPABILITY = 90


class CountingDriver:
    """A GPU's driver that starts nothing."""

    def __init__(self):
        self.launches = []
        self.utils = SimpleNamespace(
            load_binary=lambda *arguments: (1, 1, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    def get_current_device(self):
        """There is one."""
        return 0

    def get_current_stream(self, device):
        """The default one."""
        return 0

    def get_current_target(self):
        """What is compiled for."""
        return GPUTarget("cuda", CAPABILITY, 32)

    def launcher_cls(self, source, metadata):
        """What starts a compiled kernel: here it is counted."""
        return lambda *arguments: self.launches.append(metadata.name)


def keep_memory():
    """Let the C library keep what is freed, as a GPU's allocator does; large maps cost it calls."""
    library = ctypes.CDLL(None)
    library.mallopt(-4, 0)  # M_MMAP_MAX
    library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def pretend():
    """Let tensors on the CPU be computed by the Triton kernels."""
    keep_memory()
    counting = CountingDriver()
    select._why_not_triton = functools.cache(lambda device: None)
    driver.set_active(counting)
    select._BEST["cpu"] = "triton"
    plan._current_stream = lambda device: 0
    plan._num_processors = lambda device: PROCESSORS
    return counting


def both_ways(module, x):
    """A step: forward and backward of a module."""
    leaf = x.requires_grad_()
    parameters, grad = list(module.parameters()), torch.empty_like(x)
    return lambda: torch.autograd.grad(module(leaf), [leaf, *parameters], grad)


def count(counting, layer, x):
    """Launches of a forward and of a backward pass."""
    leaf = x.requires_grad_()
    counting.launches.clear()
    y = layer(leaf)
    forward = len(counting.launches)
    torch.autograd.grad(y, [leaf, *layer.parameters()], torch.empty_like(x))
    return forward, len(counting.launches) - forward


def times_us(calls, repeats, loops):
    """Median microseconds of the processor for each call, taken in turns.

    Not of the clock: other programs would count, and a GPU's host thread waits for none.
    """
    found = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.thread_time()
            for _ in range(loops):
                call()
            found[name].append((time.thread_time() - started) / loops * 1e6)
    return {name: statistics.median(values) for name, values in found.items()}


def measure(norm, shape, counting, options):
    """One row of the record."""
    layer = nk.build(norm, shape[1])
    x = torch.empty(shape, dtype=torch.bfloat16)
    step = both_ways(layer, x)
    step()  # compiles
    forward, backward = count(counting, layer, x)
    tiny = both_ways(nn.BatchNorm2d(512), torch.randn(2, 512, 1, 1))

    def ours():
        for _ in range(options.inner):
            step()

    def theirs():
        for _ in range(options.inner):
            tiny()

    found = times_us({"ours": ours, "torch": theirs}, options.repeats, 1)
    times = {name: value / options.inner for name, value in found.items()}
    return {
        "norm": norm,
        "shape": list(shape),
        "host_us": round(times["ours"], 1),
        "torch_cpu_us": round(times["torch"], 1),
        "of_torch_cpu": round(times["ours"] / times["torch"], 3),
        "launches_forward": forward,
        "launches_backward": backward,
    }


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--norms", default=",".join(NORMS), help="their specs, with commas between")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--inner", type=int, default=50, help="calls in a turn")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "host.json")
    return parser.parse_args()


def main():
    """Measure the norms on every shape."""
    options = arguments()
    torch.set_num_threads(1)
    counting = pretend()
    rows = []
    for norm in options.norms.split(","):
        for shape in SHAPES:
            rows.append(measure(norm, shape, counting, options))
            print("  ".join(str(value) for value in rows[-1].values()), flush=True)
    record = {
        "what": "processor time of a call both ways, launches counted and not started, beside "
        "torch's BatchNorm2d on (2, 512, 1, 1) on the CPU, both ways",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
