"""A network whose training a probe records, and the same numbers by definition."""

import math

import torch
from torch import nn

import normkit as nk


class Net(nn.Module):
    """Every kind of row: running statistics, groups of channels, a shared and a bare ReLU."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.gn = nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8)
        self.bgn = nk.BatchGroupNorm(8, num_groups=4)
        self.relu, self.drop = nn.ReLU(), nn.Dropout(0.2)
        self.ln, self.head = nn.LayerNorm(8), nn.Linear(8, 4)
        with torch.no_grad():
            self.bn.bias[:2] = -50  # off in every example

    def forward(self, x):
        x = self.relu(self.bn(self.conv1(x)))
        x = self.relu(self.gn(self.conv2(self.drop(x))))
        x = torch.relu(self.bgn(x)).mean((2, 3))
        return self.head(self.ln(x))


class Captured:
    """What goes into, and comes out of, named modules."""

    def __init__(self, model, names):
        self.inputs, self.outputs = {n: [] for n in names}, {n: [] for n in names}
        for name in names:
            model.get_submodule(name).register_forward_hook(self.hook(name))

    def hook(self, name):
        def keep(_module, args, output):
            self.inputs[name].append(args[0].detach().double())
            self.outputs[name].append(output.detach().double())

        return keep

    def clear(self):
        for values in (*self.inputs.values(), *self.outputs.values()):
            values.clear()


def batches(num_steps, num_forwards=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(n, 3, 8, 8, generator=generator) * 2 + 1 for n in range(4, 4 + num_forwards)]
        for _ in range(num_steps)
    ]


def loss_of(model, parts):
    return sum(model(x).square().mean() for x in parts) / len(parts)


def train(model, probe, steps, after=lambda _number: None):
    """Train with as many forwards a step as each step has parts."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for number, parts in enumerate(steps, start=1):
        optimizer.zero_grad()
        loss = loss_of(model, parts)
        loss.backward()
        optimizer.step()
        if probe is not None:
            probe.step(loss)
        after(number)
    return model


def rows_by_name(record):
    return {row.name: row for row in record.layers}


def moments(values, groups=None):
    """Mean and population standard deviation of each channel or group of ``(N, C, *S)`` maps."""
    parts = [v.reshape(v.shape[0], groups or v.shape[1], -1).transpose(0, 1) for v in values]
    table = torch.cat([part.flatten(1) for part in parts], dim=1)
    mean = table.sum(1) / table.shape[1]
    return mean, ((table - mean[:, None]) ** 2).mean(1).sqrt()


def length(tensors):
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors))
