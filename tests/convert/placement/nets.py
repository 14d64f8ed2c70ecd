"""Networks for looking at where norms are placed."""

import copy
from collections import OrderedDict
from functools import cache

import torch
from torch import nn
from torch.nn import functional

from normkit.lab.torchvision_ops import register_missing_operators

register_missing_operators()
import timm  # noqa: E402 - its operators must be there first
import torchvision  # noqa: E402
from torchvision.models import resnet  # noqa: E402

RESNET18 = {"layer1": 2, "layer2": 2, "layer3": 2, "layer4": 2}
RESNET50 = {"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3}


def build(name):
    """A network of torchvision or timm without values, which costs little time."""
    return copy.deepcopy(_built(name))


@cache
def _built(name):
    library, _, inner = name.partition(":")
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(inner, num_classes=10)
        return torchvision.models.get_model(inner, weights=None, num_classes=10)


def each(stages, norm):
    """Names of one norm in every block, for the blocks of each stage."""
    return [f"{stage}.{i}.{norm}" for stage, count in stages.items() for i in range(count)]


def changed(done):
    return [change.name for change in done.changes]


def small(name, last=2):
    """Four narrow stages of blocks of each kind: basic, bottleneck, inverted, and timm's.

    ``last=1`` leaves the first stage of the inverted ones with a block without a shortcut.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "timm":
            kind, widths = timm.models.resnet.Bottleneck, (4, 4, 8, 8)
            options = {"stem_type": "deep", "stem_width": 4, "channels": widths, "avg_down": True}
            return timm.models.ResNet(kind, (2, 1, 1, 1), num_classes=10, **options)
        if name == "inverted":
            rows = [[1, 16, 1, 1], [2, 8, last, 2], [2, 8, 2, 2], [2, 16, 1, 2], [2, 16, 1, 2]]
            return torchvision.models.MobileNetV2(10, 0.25, rows)
        kind = {"basic": resnet.BasicBlock, "bottleneck": resnet.Bottleneck}[name]
        parts = {"conv1": nn.Conv2d(3, 16, 3, 2), "bn1": nn.BatchNorm2d(16), "act": nn.ReLU()}
        for number, count in enumerate((2, 1, 1, 1), 1):
            planes, stride = 16 // kind.expansion, 1 if number == 1 else 2
            skip = nn.Sequential(nn.Conv2d(16, 16, 1, stride, bias=False), nn.BatchNorm2d(16))
            blocks = [kind(16, planes, stride, skip), *(kind(16, planes) for _ in range(count - 1))]
            parts[f"layer{number}"] = nn.Sequential(*blocks)
        return nn.Sequential(OrderedDict(parts))


class DistributedDataParallel(nn.Sequential):
    """Named like the wrapper, which needs a process group."""


class Block(nn.Module):
    """A basic block that calls its activation as a function."""

    def __init__(self, width=8, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.norm_a = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_b = nn.BatchNorm2d(width)
        self.skip = nn.Sequential(nn.Conv2d(width, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x):
        """Compute the output."""
        y = self.norm_b(self.conv2(self.norm_a(self.conv1(x)).relu()))
        skip = self.skip(x)
        missing = y.shape[1] - skip.shape[1]  # asks about the longer way, and is not on it
        return torch.add(functional.pad(skip, (0, 0, 0, 0, 0, missing)), y).relu()


class Late(nn.Module):
    """Calls its blocks in another order than it defines them, and its stem in the end's place."""

    def __init__(self):
        super().__init__()
        self.second, self.first = Block(), Block()
        self.start = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

    def forward(self, x):
        """Compute the output."""
        return self.second(self.first(self.start(x)))


class Hidden(Late):
    """Does what ``torch.fx`` cannot follow."""

    def forward(self, x):
        """Compute the output."""
        return super().forward(x) if x.sum() < 1e9 else x


def train_step(model, x, optimizer=None):
    """One step; the output before it."""
    y = model.train()(x)
    y.square().mean().backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return y.detach()


def images(size=64, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def state_of(model):
    """Modules, parameters and buffers by name, and copies of all values."""
    modules = dict(model.named_modules())
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return modules, tensors, {name: value.clone() for name, value in model.state_dict().items()}


def assert_as_before(model, before):
    modules, tensors, values = before
    now_modules, now_tensors, now_values = state_of(model)
    assert list(now_modules) == list(modules)
    assert all(now_modules[name] is module for name, module in modules.items())
    assert all(now_tensors[name] is tensor for name, tensor in tensors.items())
    assert list(now_values) == list(values)
    assert all(torch.equal(now_values[name], value) for name, value in values.items())
