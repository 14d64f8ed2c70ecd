"""Activations that may follow a norm: their names, their formulas, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

ActivationName = Literal[
    "relu", "leaky_relu", "silu", "gelu", "hardswish", "sigmoid", "tanh", "relu6"
]


class Kind(IntEnum):
    """Number of each activation, as in csrc/kernels.h."""

    NONE = 0
    RELU = 1
    LEAKY_RELU = 2
    SILU = 3
    GELU = 4
    HARDSWISH = 5
    SIGMOID = 6
    TANH = 7
    RELU6 = 8


class Activation(NamedTuple):
    """An activation as the operators take it.

    Args:
        kind: A number of ``Kind``.
        slope: Slope of a leaky ReLU below 0.
    """

    kind: int
    slope: float = 0.0

    @property
    def is_signed(self) -> bool:
        """Whether the sign of the result determines the derivative."""
        return self.kind == Kind.RELU or (self.kind == Kind.LEAKY_RELU and self.slope >= 0)


NO_ACTIVATION = Activation(0)
KINDS: Mapping[str, Kind] = MappingProxyType({kind.name.lower(): kind for kind in list(Kind)[1:]})
_FORMULAS: Mapping[int, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        0: lambda u: u,
        1: torch.relu,
        3: F.silu,
        4: F.gelu,
        5: F.hardswish,
        6: torch.sigmoid,
        7: torch.tanh,
        8: F.relu6,
    }
)


def activate(u: Tensor, activation: Activation) -> Tensor:
    """Compute ``act(u)`` with torch's operations."""
    kind, slope = activation
    return F.leaky_relu(u, slope) if kind == 2 else _FORMULAS[kind](u)


def pass_back(grad: Tensor, result: Tensor, activation: Activation) -> Tensor:
    """Compute ``grad * act'(u)`` from ``act(u)``, for an activation that ``is_signed``."""
    below = grad.new_zeros(()) if activation.kind == Kind.RELU else grad * activation.slope
    return torch.where(result <= 0, below, grad)
