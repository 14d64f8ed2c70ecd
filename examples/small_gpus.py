"""Small GPUs: accumulation, synchronization, DDP.

The batch that a norm sees is what one GPU holds at a time. Gradients can be accumulated, and
averaged over GPUs by DDP; batch statistics are not. Here they are taken over all parts, first in
one process, then in two.

    torchrun --nproc-per-node 2 examples/small_gpus.py
"""

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import normkit as nk
from normkit.lab.data import load

distributed.init_process_group("gloo")  # "nccl" on GPUs
rank, num_processes = distributed.get_rank(), distributed.get_world_size()
torch.set_num_threads(1)


def say(*text):
    if rank == 0:
        print(*text)


def make_model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


batch = load("digits").train.take(torch.arange(32))

# %% What the whole batch gives
# One process, 32 images at once: the numbers to compare with.

whole = make_model()
F.cross_entropy(whole(batch.inputs), batch.targets).backward()
say("running mean of the first channels:", [f"{value:.4f}" for value in whole[1].running_mean[:3]])

# > running mean of the first channels: ['-0.0342', '-0.0183', '0.0298']

# %% Accumulation
# Four forwards of eight images, one step. The running statistics would move four times and follow
# the last part most; `nk.accumulate_statistics` moves them once, by all 32. Each part is still
# normalised by its own eight: gradients are not those of the whole batch, and no tool can change
# that afterwards.

model = make_model()
with nk.accumulate_statistics(model, steps=4):
    for x, y in zip(batch.inputs.split(8), batch.targets.split(8), strict=True):
        (F.cross_entropy(model(x), y) / 4).backward()
distance = (model[1].running_mean - whole[1].running_mean).abs().max()
say("accumulated: the running mean is that of the whole batch:", bool(distance < 1e-6))
distance = (model[0].weight.grad - whole[0].weight.grad).abs().max()
say("accumulated: the gradient is that of the whole batch:", bool(distance < 1e-6))

# > accumulated: the running mean is that of the whole batch: True
# > accumulated: the gradient is that of the whole batch: False

# %% Two processes, synchronized
# Each process has 16 images. `nk.synchronize_` takes all batch statistics over both, on any
# backend; wrap the model in DDP afterwards. Statistics and gradients are now those of the whole
# batch.

model = make_model()
say(nk.synchronize_(model))
wrapped = DistributedDataParallel(model)
mine = slice(rank, None, num_processes)
F.cross_entropy(wrapped(batch.inputs[mine]), batch.targets[mine]).backward()
distance = (model[1].running_mean - whole[1].running_mean).abs().max()
say("synchronized: the running mean is that of the whole batch:", bool(distance < 1e-6))
distance = (model[0].weight.grad - whole[0].weight.grad).abs().max()
say("synchronized: the gradient is that of the whole batch:", bool(distance < 1e-6))

# > statistics over all processes: 1
# > replaced by layers of normkit: 1
# > synchronized: the running mean is that of the whole batch: True
# > synchronized: the gradient is that of the whole batch: True

# %% Or a norm that does not care
# Group norm takes no statistics over the batch: it computes the same in parts and on several
# processes, and nothing is exchanged.

model, other = (nk.convert_norm(make_model(), "gn:4").model for _ in range(2))
F.cross_entropy(other(batch.inputs), batch.targets).backward()
for x, y in zip(batch.inputs.split(8), batch.targets.split(8), strict=True):
    (F.cross_entropy(model(x), y) / 4).backward()
distance = (model[0].weight.grad - other[0].weight.grad).abs().max()
say("group norm, accumulated: the gradient is that of the whole batch:", bool(distance < 1e-6))
distributed.destroy_process_group()

# > group norm, accumulated: the gradient is that of the whole batch: True

# %% How to choose
# - The parts hold 16 images or more: leave batch norm alone, and accumulate its statistics.
# - They hold few, over several GPUs with a fast connection: synchronize.
# - They hold one or two on one GPU: take another norm. [BatchNorm fails me at batch
# 2](batch_of_two.py) finds out which.
