"""A process that trains until another process has ended."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import normkit as nk


def main(rank, size, folder):
    """Train for ever."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/m", rank=rank, world_size=size)
    layer = nk.BatchNorm(6, process_group="world")
    x = torch.randn(2, 6, 3, requires_grad=True)
    while True:
        layer(x).sum().backward()
        Path(folder, "running").touch()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
