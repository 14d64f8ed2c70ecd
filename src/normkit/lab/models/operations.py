"""The operations that DARTS searches among, with a batch norm in each that has weights."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from normkit.lab.models.genotype import NONE


def relu_conv_norm(
    num_in: int, num_out: int, kernel_size: int = 1, *, affine: bool
) -> nn.Sequential:
    """A ReLU, a convolution that keeps the map's size, and a norm."""
    conv = nn.Conv2d(num_in, num_out, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(num_out, affine=affine))


def _separable(
    num_channels: int, kernel_size: int, stride: int, *, dilation: int = 1, affine: bool
) -> list[nn.Module]:
    """A ReLU, a convolution of each channel by itself, one of each position by itself, a norm."""
    options: Any = {
        "stride": stride,
        "dilation": dilation,
        "padding": dilation * (kernel_size // 2),
    }
    return [
        nn.ReLU(),
        nn.Conv2d(
            num_channels, num_channels, kernel_size, groups=num_channels, bias=False, **options
        ),
        nn.Conv2d(num_channels, num_channels, 1, bias=False),
        nn.BatchNorm2d(num_channels, affine=affine),
    ]


class FactorizedReduce(nn.Module):
    """Half the map: of each 2x2 square one convolution sees the first value, one the last."""

    def __init__(self, num_in: int, num_out: int, *, affine: bool) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.even = nn.Conv2d(num_in, num_out // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(num_in, num_out - num_out // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(num_out, affine=affine)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        """Put both halves of the channels side by side; an odd side ends with zeros."""
        x = self.relu(x)
        height, width = x.shape[2:]
        moved = functional.pad(x[:, :, 1:, 1:], (0, width % 2, 0, height % 2))
        return self.norm(torch.cat([self.even(x), self.odd(moved)], 1))


class Nothing(nn.Module):
    """Zeros."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        """As many channels; half the map where the stride is 2."""
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


def _pool(name: str, num_channels: int, stride: int, *, in_search: bool) -> nn.Module:
    pool: nn.Module = nn.MaxPool2d(3, stride, padding=1)
    if name.startswith("avg"):
        pool = nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
    if not in_search:
        return pool
    return nn.Sequential(pool, nn.BatchNorm2d(num_channels, affine=False))


def make_operation(name: str, num_channels: int, stride: int, *, in_search: bool) -> nn.Module:
    """One of ``OPERATIONS``.

    In the search norms have no scale and shift, and a norm follows a pool as well, so that the
    weights of operations can be compared.

    Args:
        name: Of the operation.
        num_channels: Of its input and its output.
        stride: 1, or 2 for half the map.
        in_search: Whether it is one of those that are searched among.

    Source:
        Liu et al. 2019, section 3.1.1; details as in the authors' code.
    """
    affine = not in_search
    if name == NONE:
        return Nothing(stride)
    if name == "skip_connect":
        if stride == 1:
            return nn.Identity()
        return FactorizedReduce(num_channels, num_channels, affine=affine)
    kind, kernel_size = name.partition("_")[0], int(name[-1])
    match kind:
        case "sep":
            layers = _separable(num_channels, kernel_size, stride, affine=affine)
            return nn.Sequential(*layers, *_separable(num_channels, kernel_size, 1, affine=affine))
        case "dil":
            layers = _separable(num_channels, kernel_size, stride, dilation=2, affine=affine)
            return nn.Sequential(*layers)
        case _:
            return _pool(name, num_channels, stride, in_search=in_search)


class Mixed(nn.Module):
    """All operations on one input, added with a weight each."""

    def __init__(self, names: Sequence[str], num_channels: int, stride: int) -> None:
        super().__init__()
        self.operations = nn.ModuleList(
            make_operation(name, num_channels, stride, in_search=True) for name in names
        )

    def forward(
        self, x: Float[Tensor, "n c h w"], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, "n c h2 w2"]:
        """The weighted sum."""
        parts = [w * operation(x) for w, operation in zip(weights, self.operations, strict=True)]
        return torch.stack(parts).sum(0)
