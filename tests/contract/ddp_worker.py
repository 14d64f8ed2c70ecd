"""One of the processes of ``test_distributed``: ``python -m contract.ddp_worker RANK FOLDER``."""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cases import EVERY, randn

PROCESSES = 2


def batch_of(rank):
    """The batch that this process sees."""
    return randn(4, 6, 5, 3, seed=rank, mean=rank)


def gradients_of(case, broadcast, rank):
    """Two forwards before one backward, as a GAN's discriminator has them."""
    layer = DistributedDataParallel(case.make(dtype=torch.float64), broadcast_buffers=broadcast)
    (layer(batch_of(rank)).pow(3).sum() + layer(batch_of(rank) + 1).sum()).backward()
    return {name: p.grad for name, p in layer.module.named_parameters()}


def main(rank, folder):
    """Train every layer for one step, with and without broadcast buffers."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    found = {
        (case.name, broadcast): gradients_of(case, broadcast, rank)
        for case in EVERY
        for broadcast in (True, False)
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
