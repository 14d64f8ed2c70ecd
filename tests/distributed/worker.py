"""One of the processes of ``test_synchronized``: ``python -m distributed.worker RANK SIZE ...``."""

import sys
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cases import EVERY, MAIN, randn
from distributed.processes import work

SIZES = {2: [(5, 3), (8, 0)], 4: [(1, 1, 1, 1), (3, 0, 1, 2)]}
DTYPES = (torch.float64, torch.float32)
COMPILED = ("bn", "bgn", "gbgn-whole", "gn-tracked", "gnplus", "bcn", "bcn-micro", "sn", "ibn")
ANY_SIZE = ("bcn",)  # compiled for every batch size: a layer with both kinds of statistics


def rows(size):
    """Every case on two processes, one of each method on more."""
    return EVERY if size == 2 else MAIN


def dtypes(sizes):
    """All, once; else float64."""
    return DTYPES if sizes == (5, 3) else DTYPES[:1]


def whole(case, sizes, dtype, seed=0):
    """The whole batch, and the weights of its outputs in the loss."""
    shape = (sum(sizes), 6, 3, 3) if case.name == "bgn-cuts" else (sum(sizes), 6, 5, 3)
    return randn(*shape, seed=seed, mean=1.0).to(dtype), randn(*shape, seed=9).to(dtype)


def make(case, dtype, process_group="world"):
    layer = case.make(dtype=dtype)
    if hasattr(layer, "process_group"):
        layer.process_group = process_group
    return layer


def train(layer, x, weights):
    """One step's outputs and gradients, of a loss that is the sum over processes."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y.pow(2) * weights).sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "x.grad": x.grad, **gradients}


def part(sizes, rank):
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


def equality(rank, size):
    """Every layer on its part of the batch, two steps."""
    found = {}
    for case in rows(size):
        for sizes in SIZES[size]:
            for dtype in dtypes(sizes):
                layer = make(case, dtype)
                mine = part(sizes, rank)
                for seed in (0, 1):
                    x, weights = whole(case, sizes, dtype, seed)
                    layer.zero_grad()
                    step = train(layer, x[mine], weights[mine])
                buffers = {name: b.clone() for name, b in layer.named_buffers()}
                found[case.name, sizes, dtype] = step | buffers
    return found


def mask_of(sizes):
    """Valid positions of the whole batch: maps of four rows in the last process's part."""
    mask = torch.ones(sum(sizes), 5, 3, dtype=torch.bool)
    mask[sum(sizes[:-1]) :, 4] = False
    return mask


def masked(rank, size):
    """The layer with a mask of this process's part, and with smaller maps in its place."""
    found = {}
    sizes = SIZES[size][0]
    for case in MAIN:
        mine = part(sizes, rank)
        x, weights = (t[mine] for t in whole(case, sizes, torch.float64))
        layer = make(case, torch.float64)
        call = partial(layer, mask=mask_of(sizes)[mine])
        found[case.name, "mask"] = _through(layer, call, x, weights)
        layer, rows = make(case, torch.float64), 4 if rank == size - 1 else 5
        smaller = _through(layer, layer, x[:, :, :rows], weights[:, :, :rows])
        for name in ("y", "x.grad"):
            smaller[name] = torch.nn.functional.pad(smaller[name], (0, 0, 0, 5 - rows))
        found[case.name, "maps of different sizes"] = smaller
    return found


def ended(rank, size):
    """The layer with a residual and an activation after it."""
    found = {}
    sizes = SIZES[size][0]
    for case in MAIN:
        mine = part(sizes, rank)
        x, weights = (t[mine] for t in whole(case, sizes, torch.float64))
        found[case.name] = through_an_ending(make(case, torch.float64), x, weights)
    return found


def through_an_ending(layer, x, weights):
    """As ``_through``, with the weights as the residual too."""
    layer.activation = "silu"
    return _through(layer, partial(layer, residual=weights), x, weights)


def checkpointed(rank, size):
    """The layer inside of a checkpoint, in both modes; and twice before one backward."""
    found = {}
    sizes = SIZES[size][0]
    for case in MAIN:
        x, weights = (t[part(sizes, rank)] for t in whole(case, sizes, torch.float64))
        for reentrant in (True, False):
            layer = make(case, torch.float64)
            inside = partial(checkpoint, layer, use_reentrant=reentrant)
            found[case.name, reentrant] = _through(layer, inside, x, weights)
    return found


def _through(layer, call, x, weights):
    x = x.clone().requires_grad_()
    y = call(x)
    (y.pow(2) * weights).sum().backward()
    buffers = {name: b.clone() for name, b in layer.named_buffers()}
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "x.grad": x.grad, **gradients, **buffers}


def wrapped(rank, size):
    """Two forwards before one backward in DDP, with and without broadcast buffers."""
    found = {}
    sizes = SIZES[size][0]
    for case in MAIN:
        x, weights = (t[part(sizes, rank)] for t in whole(case, sizes, torch.float64))
        for broadcast in (True, False):
            ddp = DistributedDataParallel(make(case, torch.float64), broadcast_buffers=broadcast)
            ((ddp(x).pow(2) + ddp(x + 1).pow(3)) * weights).sum().backward()
            found[case.name, broadcast] = {n: p.grad for n, p in ddp.module.named_parameters()}
    return found


def compiled(rank, size):
    """What ``torch.compile`` makes of it, in one graph."""
    found = {}
    sizes = SIZES[size][0]
    for case in EVERY:
        if case.name in COMPILED:
            x, weights = (t[part(sizes, rank)] for t in whole(case, sizes, torch.float64))
            layer = make(case, torch.float64)
            torch.compiler.reset()
            dynamic = True if case.name in ANY_SIZE else None
            call = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
            found[case.name] = _through(layer, call, x, weights)
    return found


def refused(rank, size):
    """What is said about batches of one value, and inside of transforms."""
    bn = make(EVERY[0], torch.float32)
    found = {}
    try:
        bn(torch.ones(1 if rank == 0 else 0, 6))
    except ValueError as error:
        found["single"] = str(error)
    try:
        torch.func.jvp(bn, (torch.ones(2, 6, 3),), (torch.ones(2, 6, 3),))
    except ValueError as error:
        found["transform"] = str(error)
    x = torch.randn(2, 6, 3, requires_grad=True)
    (first,) = torch.autograd.grad(bn(x).pow(3).sum(), x, create_graph=True)
    found["first"] = first.isfinite().all()
    try:
        first.sum().backward()
    except ValueError as error:
        found["second"] = str(error)
    bn(torch.randn(1, 6))  # as many values as processes
    bn.eval()
    found["evaluates alone"] = bn(torch.randn(rank, 6)).shape[0]
    alone = make(EVERY[0], torch.float64, dist.new_group([rank], use_local_synchronization=True))
    found["alone"] = train(alone, *whole(EVERY[0], (4,), torch.float64))
    return found


JOBS = {f.__name__: f for f in (equality, masked, ended, checkpointed, wrapped, compiled, refused)}


if __name__ == "__main__":
    work(JOBS, *sys.argv[1:])
