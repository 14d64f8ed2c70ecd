"""One of the processes of ``test_ranks``: ``python -m inference.ranks_worker RANK FOLDER``."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import normkit as nk
from distributed.processes import work

PROCESSES = 2


def net(first=nn.SyncBatchNorm):
    """A model with torch's synchronised norm, which cannot train on a CPU, and ours."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), first(6), nn.ReLU(), nk.BatchChannelNorm(6, num_groups=2)
    )


def examples():
    """All data."""
    return torch.randn(13, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 + 1


SPLITS = {
    "even": [[4, 4], [5]],
    "uneven": [[1], [8, 1, 3]],
    "nothing on one": [[], [6, 7]],
    "an empty batch": [[0], [13, 0]],
}


def batches_of(split, rank):
    """The batches of a rank, one after the other from all data."""
    sizes = SPLITS[split]
    parts = iter(examples().split([size for several in sizes for size in several]))
    return [[next(parts) for _ in several] for several in sizes][rank]


def outcome_of(rank, batches, group=None, sequential=False):
    """New statistics of each layer, or the error."""
    model = DistributedDataParallel(net(nn.BatchNorm2d)) if sequential else net()
    try:
        patch = nk.recalibrate(model, batches, sequential=sequential, group=group)
    except (nk.NormError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    rows = {row.name: [row.num_values, *row.new.values()] for row in patch.layers}
    return rows | {"num_batches": patch.num_batches}


class Broken:
    """Batches whose second one cannot be read on rank 1."""

    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        yield examples()[:2]
        if self.rank == 1:
            raise OSError("the disk is gone")
        yield examples()[2:]


def recalibrated(rank, size):
    """Recalibrate in every way."""
    found = {
        (split, sequential): outcome_of(rank, batches_of(split, rank), sequential=sequential)
        for split in SPLITS
        for sequential in (False, True)
    }
    for sequential in (False, True):
        found["broken", sequential] = outcome_of(rank, Broken(rank), sequential=sequential)
    found["no batch"] = outcome_of(rank, [])
    own = [dist.new_group([r]) for r in range(PROCESSES)]
    found["own group"] = outcome_of(rank, batches_of("even", rank), group=own[rank])
    found["other group"] = outcome_of(rank, batches_of("even", rank), group=own[1 - rank])
    return found


if __name__ == "__main__":
    work({"recalibrated": recalibrated}, *sys.argv[1:])
