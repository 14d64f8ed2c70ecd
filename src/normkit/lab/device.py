"""Where something computes, on how many threads, and from which random state."""

import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch

from normkit.errors import SpecError

CPU = torch.device("cpu")


def parse_device(name: str) -> torch.device:
    """Read a device's name; ``"auto"`` is CUDA where there is one, else the CPU.

    Raises:
        SpecError: If torch knows no such device, or it is not there.
    """
    known = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        return torch.device("cuda:0" if len(known) > 1 else "cpu")
    if name not in [*known, "cuda"] or (name == "cuda" and len(known) == 1):
        raise SpecError(f"there is no device {name!r} here; choose auto or {', '.join(known)}")
    return torch.device(name)


@contextmanager
def threads_of(num_threads: int) -> Generator[None]:
    """Run the block with this many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Generator[None]:
    """Give torch, Python and NumPy the seed, and the caller their random states back."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - what a user's code draws from
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002 - as above
