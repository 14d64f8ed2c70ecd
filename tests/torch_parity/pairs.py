"""Layers of torch, and ours that do the same, with the shapes that torch's take."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import normkit as nk


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One of torch's layers and ours.

    Args:
        name: Shown by pytest.
        theirs: Builds torch's layer for so many channels.
        ours: Builds ours.
        shape: A feature map that both take.
        tracks: Whether they keep running statistics.
    """

    name: str
    theirs: Callable[..., nn.Module]
    ours: Callable[..., nn.Module]
    shape: tuple[int, ...]
    tracks: bool = True

    def make(self, **options):
        """Both layers with the same state, other than the initial one."""
        theirs, ours = self.theirs(6, **options), self.ours(6, **options)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for values in [*theirs.parameters(), *theirs.buffers()]:
                if values.is_floating_point():
                    noise = torch.rand(values.shape, generator=generator, dtype=torch.float64)
                    values.copy_(noise + 0.5)
        ours.load_state_dict(theirs.state_dict())
        return theirs, ours

    def __str__(self):
        return self.name


BATCH = (
    Pair(name="bn1d-dense", theirs=nn.BatchNorm1d, ours=nk.BatchNorm, shape=(5, 6)),
    Pair(name="bn1d", theirs=nn.BatchNorm1d, ours=nk.BatchNorm, shape=(4, 6, 7)),
    Pair(name="bn2d", theirs=nn.BatchNorm2d, ours=nk.BatchNorm, shape=(4, 6, 5, 3)),
    Pair(name="bn3d", theirs=nn.BatchNorm3d, ours=nk.BatchNorm, shape=(3, 6, 2, 3, 5)),
)


def instance(kind):
    """Builds torch's instance norm, affine as ours is unless it is told otherwise."""
    return lambda num_features, **options: kind(num_features, **({"affine": True} | options))


EXAMPLE = (
    Pair(name="in1d", theirs=instance(nn.InstanceNorm1d), ours=nk.InstanceNorm, shape=(4, 6, 7),
         tracks=False),
    Pair(name="in2d", theirs=instance(nn.InstanceNorm2d), ours=nk.InstanceNorm,
         shape=(4, 6, 5, 3), tracks=False),
    Pair(name="in3d", theirs=instance(nn.InstanceNorm3d), ours=nk.InstanceNorm,
         shape=(3, 6, 2, 3, 5), tracks=False),
    Pair(name="gn", theirs=lambda c, **options: nn.GroupNorm(3, c, **options),
         ours=lambda c, **options: nk.GroupNorm(c, num_groups=3, **options), shape=(4, 6, 5, 3),
         tracks=False),
    Pair(name="gn-dense", theirs=lambda c, **options: nn.GroupNorm(3, c, **options),
         ours=lambda c, **options: nk.GroupNorm(c, num_groups=3, **options), shape=(5, 6),
         tracks=False),
    Pair(name="ln", theirs=lambda c, **options: nn.GroupNorm(1, c, **options),
         ours=nk.LayerNorm, shape=(4, 6, 5, 3), tracks=False),
)  # fmt: skip

PAIRS = BATCH + EXAMPLE


class LastAxis(nn.LayerNorm):
    """Torch's layer norm over the channels, which it wants last."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


POSITIONS = Pair(name="pn", theirs=LastAxis, ours=nk.PositionalNorm, shape=(4, 6, 5, 3),
                 tracks=False)  # fmt: skip

CLOSE = {
    torch.float64: {"atol": 1e-12, "rtol": 1e-12},
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 4e-2, "rtol": 2e-2},
    torch.float16: {"atol": 4e-3, "rtol": 2e-3},
}


def values(shape, dtype=torch.float64, seed=0):
    """Reproducible normal values around 1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 1).to(dtype)


def gradients(layer, x, grad):
    """The result, and the gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, (x, *layer.parameters()), grad)
