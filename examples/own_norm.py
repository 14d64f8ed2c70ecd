"""A norm of my own in ten lines.

A norm that shares statistics in a new way is its partition. Kernels, gradients, checkpoints, masks
and the tools follow.

    python examples/own_norm.py
"""

import statistics

import torch
from torch import nn
from torch.nn import functional as F

import normkit as nk
from normkit.core.partition import Partition
from normkit.lab.data import load

# %% Ten lines
# Group norm over pairs of examples: each group of channels is normalised with the same group of its
# neighbour in the batch.


class PairNorm(nk.GroupNorm):
    """Group normalization over two neighbouring examples."""

    @property
    def partition(self):
        pairs = 2 if self.training else 1  # an image to be judged has no neighbour
        return Partition(num_groups=self.num_groups, examples_per_group=pairs)


# %% Which kernels compute it
# `nk.explain` says which elements share statistics and who computes the call: the C++ operators
# here, Triton's on a GPU.

norm = PairNorm(16, num_groups=4)
x = torch.randn(8, 16, 6, 6)
found = nk.explain(norm, x)
print(found.groups)
print("computed by:", found.kernels)

# > statistics over a group of 2 of 8 examples, 4 of 16 channels, 36 of 36 positions
# > computed by: cpu

# %% Is it right?
# Write the definition down once more, in float64 and with nothing of normkit, and compare values
# and gradients. `gradcheck` compares the gradient with finite differences.


def by_definition(x):
    groups = x.unflatten(0, (4, 2)).unflatten(2, (4, 4))
    var, mean = torch.var_mean(groups, dim=(1, 3, 4, 5), keepdim=True, correction=0)
    return ((groups - mean) / (var + 1e-5).sqrt()).flatten(2, 3).flatten(0, 1)


exact = PairNorm(16, num_groups=4).double()
x, given = (
    torch.randn(8, 16, 6, 6, dtype=torch.float64, requires_grad=True),
    torch.randn(8, 16, 6, 6),
)
ours = torch.autograd.grad((exact(x) * given).sum(), x)[0]
theirs = torch.autograd.grad((by_definition(x) * given).sum(), x)[0]
print(
    "values:",
    torch.allclose(exact(x), by_definition(x)),
    "gradients:",
    torch.allclose(ours, theirs),
)
small = torch.randn(2, 16, 2, 2, dtype=torch.float64, requires_grad=True)
print("gradcheck:", torch.autograd.gradcheck(exact, small))

# > values: True gradients: True
# > gradcheck: True

# %% And all the rest
# Half precision, channels_last, compilation and copies are those of every layer.

compiled = torch.compile(norm, backend="eager", fullgraph=True)
print(compiled(torch.randn(8, 16, 6, 6)).shape, norm(torch.randn(8, 16, 6, 6).bfloat16()).dtype)

# > torch.Size([8, 16, 6, 6]) torch.bfloat16

# %% Does it do any good?
# The same network with each norm, from equal weights and in equal order, on the digits with four at
# a time. Differences are taken seed by seed, because seeds differ more than norms do.

data = load("digits", limit=400)


def train(make_norm, seed):
    torch.manual_seed(seed)
    layers = []
    for num_in, num_out in ((1, 16), (16, 32)):
        convolution = nn.Conv2d(num_in, num_out, 3, stride=2, padding=1)
        layers += [convolution, make_norm(num_out, num_groups=4), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(2):
        for index in torch.randperm(len(data.train)).split(4):
            batch = data.train.take(index)
            optimizer.zero_grad()
            F.cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()
    model.eval()
    return 100 * (model(data.test.inputs).argmax(1) == data.test.targets).double().mean().item()


runs = [(train(PairNorm, seed), train(nk.GroupNorm, seed)) for seed in (1, 2, 3)]
gains = [pair - single for pair, single in runs]
print(f"test accuracy in pairs: {statistics.mean(pair for pair, _ in runs):.1f} %")
print(
    f"gain on group norm: {statistics.mean(gains):+.1f} points, spread {statistics.stdev(gains):.1f}"
)

# > test accuracy in pairs: 84.6 %
# > gain on group norm: -0.8 points, spread 1.1

# %% Where to go from here
# No gain here. That is what measuring is for: it took twelve lines, and the idea can be dropped.
#
# A norm that mixes several statistics is a formula on tables: [Composites](../docs/composites.md)
# writes one, and kernels follow from the formula. What belongs to a layer that is to stay, its name
# in specs and its row in the tests, is in [Contributing](../CONTRIBUTING.md).
