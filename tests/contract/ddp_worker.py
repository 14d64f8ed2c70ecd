"""One of the processes of ``test_distributed``: ``python -m contract.ddp_worker RANK FOLDER``."""

import sys

import torch
from torch.nn.parallel import DistributedDataParallel

from cases import EVERY, randn
from distributed.processes import work

PROCESSES = 2


def batch_of(rank):
    """The batch that this process sees."""
    return randn(4, 6, 5, 3, seed=rank, mean=rank)


def gradients_of(case, broadcast, rank):
    """Two forwards before one backward, as a GAN's discriminator has them."""
    layer = DistributedDataParallel(case.make(dtype=torch.float64), broadcast_buffers=broadcast)
    (layer(batch_of(rank)).pow(3).sum() + layer(batch_of(rank) + 1).sum()).backward()
    return {name: p.grad for name, p in layer.module.named_parameters()}


def trained(rank, size):
    """Train every layer for one step, with and without broadcast buffers."""
    return {
        (case.name, broadcast): gradients_of(case, broadcast, rank)
        for case in EVERY
        for broadcast in (True, False)
    }


if __name__ == "__main__":
    work({"trained": trained}, *sys.argv[1:])
