"""What ours is measured against on a GPU: compositions of torch's norms, and a ResNet-50."""

import torch
from torch import nn
from torch.nn import functional


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


class Bottleneck(nn.Module):
    """Three convolutions with norms, and a way past them."""

    def __init__(self, before, width, stride, norm):
        super().__init__()
        after = 4 * width
        self.main = nn.Sequential(
            nn.Conv2d(before, width, 1, bias=False), norm(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, after, 1, bias=False), norm(after),
        )  # fmt: skip
        past = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), norm(after))
        self.past = nn.Identity() if stride == 1 and before == after else past

    def forward(self, x):  # noqa: D102 - torch's
        return functional.relu(self.main(x) + self.past(x), inplace=True)


def resnet50(norm, depths=(3, 4, 6, 3)):
    """ResNet-50 with any norm; the machine that this is for has no torchvision."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), norm(64), nn.ReLU(inplace=True)]
    blocks, before = [*stem, nn.MaxPool2d(3, 2, 1)], 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        for place in range(depth):
            blocks.append(Bottleneck(before, width, 2 if stage and not place else 1, norm))
            before = 4 * width
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000))
