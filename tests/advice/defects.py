"""Models with one defect each, and the same ones without it."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normkit as nk


def conv(norm, bias=False, channels=8):
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=bias), norm, nn.ReLU())


def dense(norm, features=8, channels=3):
    return nn.Sequential(nn.Linear(channels, features, bias=False), norm)


def edited(model, edit):
    """The model after a change to its norm."""
    with torch.no_grad():
        edit(model[1])
    return model


def narrow(norm):
    """The norm with running statistics of 16 bits."""
    norm.running_mean, norm.running_var = norm.running_mean.half(), norm.running_var.half()
    return norm


def switched_off(norm):
    """The norm with buffers that training leaves alone."""
    norm.track_running_stats = False
    return norm


def trained(norm):
    """The norm after a batch."""
    norm.train()(torch.randn(8, 8, 4, 4, generator=torch.Generator().manual_seed(0)))
    return norm


def frozen(model):
    model.train()[1].eval()
    return model


def fixed(norm):
    return norm.requires_grad_(False)


class Checkpointed(nn.Module):
    """A block whose activations are computed twice."""

    def __init__(self, norm, on=True):
        super().__init__()
        self.block, self.on = conv(norm), on

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False) if self.on else self.block(x)


class Switched(nn.Module):
    """A block with a switch as timm's and transformers' have it."""

    def __init__(self, on):
        super().__init__()
        self.block, self.gradient_checkpointing = conv(nn.BatchNorm2d(8)), on

    def forward(self, x):
        return self.block(x)


class Elsewhere(nn.Module):
    """A norm that the forward does not call, or does."""

    def __init__(self, used):
        super().__init__()
        self.norm, self.used = nn.BatchNorm2d(3), used

    def forward(self, x):
        return self.norm(x) if self.used else x


class MyNorm(nn.Module):
    """A norm of an unknown class."""

    def forward(self, x):
        return x


class Dynamic(nn.Module):
    """A model that neither way of following can follow."""

    def __init__(self, stubborn):
        super().__init__()
        self.norm, self.stubborn, self.calls = nn.BatchNorm2d(3), stubborn, 0

    def forward(self, x):
        self.calls += 1
        if self.stubborn and self.calls > 1:
            raise RuntimeError("only once")
        return self.norm(x) if x.sum() > -1 else x


def dropped(norm, p=0.1):
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Dropout2d(p), norm)


MAP, VECTOR = (3, 8, 8), (3,)
BN, BN1 = nn.BatchNorm2d, nn.BatchNorm1d

DEFECTS = [
    # check, severity, name, batch size, input shape, the model, and the same repaired
    ("single values", "error", "1", 1, VECTOR, dense(BN1(8)), dense(nk.LayerNorm(8))),
    ("single values", "error", "1", 1, (3, 1, 1), conv(BN(8)), conv(nn.GroupNorm(1, 8))),
    ("single values", "error", "1", 4, (3, 1, 1), conv(nn.InstanceNorm2d(8)), conv(BN(8))),
    ("single values", "error", "1", 4, VECTOR, dense(nn.GroupNorm(8, 8)), dense(nk.LayerNorm(8))),
    ("single values", "error", "1", 4, VECTOR, dense(nk.InstanceNorm(8)), dense(nk.BatchNorm(8))),
    (
        "single values",
        "error",
        "1",
        33,
        VECTOR,
        dense(nk.GhostBatchNorm(8)),
        dense(nn.BatchNorm1d(8)),
    ),
    (
        "single values",
        "error",
        "1",
        4,
        VECTOR,
        dense(nn.LayerNorm(1), 1),
        dense(nn.LayerNorm(9), 9),
    ),
    (
        "groups that do not fit",
        "error",
        "1",
        32,
        (3, 5, 5),
        conv(nk.BatchGroupNorm(8, num_groups=16)),
        conv(nk.BatchGroupNorm(8, num_groups=10)),
    ),
    ("groups that do not fit", "error", "1", 32, MAP, conv(BN(9)), conv(BN(8))),
    ("few values", "warning", "1", 9, (3, 1, 1), conv(BN(8)), conv(nk.LayerNorm(8))),
    (
        "few values",
        "warning",
        "1",
        9,
        (3, 1, 1),
        conv(nn.GroupNorm(2, 8)),
        conv(nn.GroupNorm(1, 8)),
    ),
    ("few examples", "warning", "1", 2, MAP, conv(BN(8)), conv(nn.GroupNorm(2, 8))),
    (
        "few examples",
        "warning",
        "1",
        2,
        MAP,
        conv(nk.BatchGroupNorm(8, num_groups=4)),
        conv(nk.BatchGroupNorm(8, num_groups=1)),
    ),
    (
        "few examples",
        "warning",
        "1",
        2,
        MAP,
        conv(nk.BatchChannelNorm(8, num_groups=2)),
        conv(nk.BatchChannelNorm(8, num_groups=2, micro_batch=True)),
    ),
    (
        "last batch of one",
        "note",
        "1",
        64,
        VECTOR,
        dense(nn.BatchNorm1d(8)),
        dense(nk.LayerNorm(8)),
    ),
    (
        "statistics of the test batch",
        "warning",
        "1",
        32,
        MAP,
        conv(BN(8, track_running_stats=False)),
        conv(BN(8)),
    ),
    (
        "16-bit running statistics",
        "warning",
        "1",
        32,
        MAP,
        conv(narrow(BN(8))),
        conv(nk.BatchNorm(8)),
    ),
    (
        "broken values",
        "error",
        "1",
        32,
        MAP,
        edited(conv(BN(8)), lambda norm: norm.running_var[2].fill_(-1)),
        conv(BN(8)),
    ),
    (
        "channels without variance",
        "warning",
        "1",
        32,
        MAP,
        edited(conv(BN(8)), lambda norm: norm.running_var[2].fill_(0)),
        conv(BN(8)),
    ),
    (
        "constant channels",
        "note",
        "1",
        32,
        MAP,
        edited(conv(BN(8)), lambda norm: norm.weight[2].fill_(0)),
        conv(BN(8)),
    ),
    ("frozen for now", "warning", "1", 32, MAP, frozen(conv(BN(8))), conv(BN(8)).eval()),
    (
        "frozen for now",
        "warning",
        "1",
        32,
        MAP,
        conv(fixed(BN(8))),
        conv(fixed(nn.GroupNorm(2, 8))),
    ),
    ("frozen for now", "warning", "1", 32, MAP, conv(BN(8, momentum=0)), conv(BN(8, momentum=0.1))),
    (
        "average of all batches",
        "warning",
        "1",
        32,
        MAP,
        conv(BN(8, momentum=None)),
        conv(BN(8)),
    ),
    (
        "average of all batches",
        "note",
        "1",
        32,
        MAP,
        conv(nk.BatchNorm(8, momentum=None)),
        conv(nk.BatchNorm(8)),
    ),
    ("eps near 0", "warning", "1", 32, MAP, conv(BN(8, eps=0.0)), conv(BN(8))),
    (
        "eps near 0",
        "warning",
        "1",
        32,
        MAP,
        conv(nk.GroupNorm(8, num_groups=2, eps=1e-20)),
        conv(nk.GroupNorm(8, num_groups=2, eps=1e-12)),
    ),
    (
        "frozen for now",
        "warning",
        "1",
        32,
        MAP,
        conv(switched_off(BN(8))),
        conv(BN(8, track_running_stats=True)),
    ),
    ("not looked at", "note", "norm", 32, MAP, Elsewhere(False), Elsewhere(True)),
    ("not looked at", "note", "1", 32, MAP, conv(nn.RMSNorm(8)), conv(BN(8))),
    ("not looked at", "note", "1", 32, MAP, conv(MyNorm()), conv(nn.Identity())),
    ("model not followed", "note", "", 32, MAP, Dynamic(True), Dynamic(False)),
    (
        "repeated by checkpointing",
        "warning",
        "block.1",
        32,
        MAP,
        Checkpointed(BN(8)),
        Checkpointed(nk.BatchNorm(8)),
    ),
    (
        "repeated by checkpointing",
        "warning",
        "block.1",
        32,
        MAP,
        Switched(True),
        Switched(False),
    ),
    ("wasted bias", "note", "0", 32, MAP, conv(BN(8), bias=True), conv(BN(8))),
    (
        "wasted bias",
        "note",
        "0",
        32,
        MAP,
        conv(nk.InstanceBatchNorm(8), bias=True),
        conv(nk.GroupNorm(8, num_groups=2), bias=True),
    ),
    (
        "dropout before the norm",
        "warning",
        "2",
        32,
        MAP,
        dropped(BN(8)),
        dropped(nn.GroupNorm(2, 8)),
    ),
    ("dropout before the norm", "warning", "2", 32, MAP, dropped(BN(8)), dropped(BN(8), p=0.0)),
]
