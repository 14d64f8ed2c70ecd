"""One of the processes of ``test_models``: ``python -m distributed.models_worker ...``."""

import sys

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import normkit as nk
from cases import randn
from distributed.processes import work

PARTS = {(5, 3): 3, (8, 0): 2, (2, 4): 5}
"""Sizes of the processes' parts, and micro-batches: a seed for each."""


def network():
    """Norms of torch and of ours, single and composite."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6, momentum=None),
        nn.ReLU(),
        nk.BatchChannelNorm(6, num_groups=3),
        nn.Conv2d(6, 6, 3),
        nk.GroupNormPlus(6, num_groups=3),
        nk.GroupNorm(6, num_groups=3, track_running_stats=True),
        nk.BatchGroupNorm(6, num_groups=2),
    ).double()


def whole(sizes, seed):
    return randn(sum(sizes), 3, 9, 8, seed=seed, mean=seed)


def part(sizes, rank, seed):
    return whole(sizes, seed).split(sizes)[rank]


def loss(y):
    return y.pow(3).sum()


def state(model, gradients):
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return {name: g.clone() for name, g in gradients.items()} | buffers


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters()}


def synchronised(rank, size):
    """A step of the converted network in DDP."""
    found = {}
    for sizes, seed in PARTS.items():
        model = network()
        nk.synchronize_(model)
        ddp = DistributedDataParallel(model)
        y = ddp(part(sizes, rank, seed))
        loss(y).backward()
        found[sizes] = {"y": y.detach()} | state(model, gradients_of(model))
    return found


def accumulated(rank, size):
    """The same in three micro-batches, of which the buffers see one."""
    model = network()
    nk.synchronize_(model)
    ddp = DistributedDataParallel(model)
    with nk.accumulate_statistics(ddp, steps=len(PARTS)):
        for sizes, seed in PARTS.items():
            loss(ddp(part(sizes, rank, seed))).backward()
    return dict(model.named_buffers())


def sharded(rank, size):
    """A step of the network with its parameters sharded over the processes."""
    found = {}
    mesh = init_device_mesh("cpu", (size,))
    for sizes, seed in PARTS.items():
        model = network()
        nk.synchronize_(model)
        for layer in (model[0], model[4]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        y = model(part(sizes, rank, seed))
        loss(y).backward()
        gradients = {name: g.full_tensor() for name, g in gradients_of(model).items()}
        found[sizes] = {"y": y.detach()} | state(model, gradients)
    return found


JOBS = {f.__name__: f for f in (synchronised, accumulated, sharded)}


if __name__ == "__main__":
    work(JOBS, *sys.argv[1:])
