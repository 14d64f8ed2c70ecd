"""A norm of my own in ten lines.

A norm that shares statistics in a new way is its partition. Kernels, gradients, checkpoints, masks
and the tools follow.

    python examples/own_norm.py
"""

import tempfile
from pathlib import Path

import torch

import normkit as nk
from normkit.core.partition import Partition
from normkit.lab import Recipe, compare

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
# With a name for specs the norm is an arm like any other: `compare` trains the same network with
# each norm, from equal weights and in equal order, and says which differences are real. On the
# command line that is `--norms gn:4,pair:4 --own-norms pair=my.py:PairNorm`.

nk.register_norm("pair", PairNorm)
result = compare(
    "small-resnet",
    "digits",
    norms=["gn:4", "pair:4"],
    batch_sizes=[4],
    seeds=[1, 2, 3],
    recipe=Recipe(epochs=2),
    limit=400,
    workers=1,
    out=Path(tempfile.mkdtemp()) / "pairs",
)
print(result)

# > pair:4 is undecided at batch size 4 (−0.09 points, 95 % interval −0.49 to +0.31, 3 seeds; about 23 more seeds would probably decide).
# >
# > norm         batch 4
# > gn:4    90.53 ± 0.56
# > pair:4  90.44 ± 0.70

# %% Where to go from here
# The comparison is undecided, and the whole interval is within one point of zero: if pairs gain
# anything, it is little. The same name works in every tool, as in `nk.convert_norm(model,
# "pair:4")`, and `compare` takes a network and pictures of your own.
#
# A norm that mixes several statistics is a formula on tables: [Composites](../docs/composites.md)
# writes one, and kernels follow from the formula. [Contributing](../CONTRIBUTING.md) lists what a
# layer needs to become part of normkit: a name in specs, a definition, and a row in the tests.
