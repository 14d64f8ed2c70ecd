"""What ours is measured against on a GPU: torch's norms and Liger's, and a ResNet-50 with any."""

import importlib.util

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase

import normkit as nk


class Chain(nn.Module):
    """Batch norm, then group norm, by torch: what BCN replaces."""

    def __init__(self, channels, num_groups):
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(channels), nn.GroupNorm(num_groups, channels)

    def forward(self, x):  # noqa: D102 - torch's
        return self.second(self.first(x))


class Runs(nn.Module):
    """Batch group norm by ``F.batch_norm`` over groups as channels, then the affine."""

    def __init__(self, channels, num_groups):
        super().__init__()
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):  # noqa: D102 - torch's
        grouped = x.reshape(x.shape[0], self.num_groups, -1)
        unit = functional.batch_norm(grouped, None, None, training=True).reshape(x.shape)
        return unit * self.weight[:, None, None] + self.bias[:, None, None]


class Positions(nn.LayerNorm):
    """Layer norm of each position, by permuted axes."""

    def forward(self, x):  # noqa: D102 - torch's
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def peers_of(groups):
    """By name: the spec of ours, and what makes torch's for so many channels."""
    return {
        "bn": ("bn", nn.BatchNorm2d),
        "gn": (f"gn:{groups}", lambda c: nn.GroupNorm(groups, c)),
        "ln": ("ln", lambda c: nn.GroupNorm(1, c)),
        "in": ("in", lambda c: nn.InstanceNorm2d(c, affine=True)),
        "bgn": ("bgn:8", lambda c: Runs(c, 8)),
        "pn": ("pn", Positions),
        "bcn": (f"bcn:{groups}", lambda c: Chain(c, groups)),
    }


def cast_(module, dtype):
    """Cast parameters for maps of a dtype: all but torch's batch and instance norm refuse others.

    These two keep float32, as in training under autocast.
    """
    for part in module.modules():
        if not isinstance(part, _NormBase):
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return module


def liger_group_norm():
    """Liger's group norm as ``(x, weight, bias, channels, groups, eps)``; None where it is not."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.ops.group_norm import LigerGroupNormFunction  # optional

    return LigerGroupNormFunction.apply


class Bottleneck(nn.Module):
    """Three convolutions with norms, and a way past them."""

    def __init__(self, before, width, stride, norm):
        super().__init__()
        after = 4 * width
        self.main = nn.Sequential(
            nn.Conv2d(before, width, 1, bias=False), norm(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, after, 1, bias=False),
        )  # fmt: skip
        self.norm = norm(after)
        past = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), norm(after))
        self.past = nn.Identity() if stride == 1 and before == after else past

    def forward(self, x):  # noqa: D102 - torch's
        return functional.relu(self.norm(self.main(x)) + self.past(x), inplace=True)


def resnet50(norm, depths=(3, 4, 6, 3), width=64):
    """ResNet-50 with any norm; the machine that this is for has no torchvision."""
    stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), norm(width), nn.ReLU(inplace=True)]
    blocks, before = [*stem, nn.MaxPool2d(3, 2, 1)], width
    for stage, depth in enumerate(depths):
        inner = width << stage
        for place in range(depth):
            blocks.append(Bottleneck(before, inner, 2 if stage and not place else 1, norm))
            before = 4 * inner
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000))


def norms_of(groups):
    """The norms that a ResNet-50 is trained with, by kind and by whose they are."""
    return {
        ("batch", "torch"): nn.BatchNorm2d,
        ("batch", "ours"): nk.BatchNorm,
        ("group", "torch"): lambda c: nn.GroupNorm(groups, c),
        ("group", "ours"): lambda c: nk.GroupNorm(c, num_groups=groups),
    }
