"""Convolutions and linear layers as linear maps, which can absorb a scale and a shift."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.convert.bytecode import read_by_forward
from normkit.convert.rules import key_of
from normkit.folding.affine import ScaleShift, to_float64
from normkit.layers.base import is_watched
from normkit.tracing import CONVOLUTIONS
from normkit.weights.filters import TRANSPOSED

Convolution = (
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
)
Layer = nn.Linear | Convolution
PADS_ITSELF = "timm.layers.conv2d_same.Conv2dSame"
AS_TORCH = frozenset({PADS_ITSELF, "timm.layers.linear.Linear"})
"""Classes with their own forward that is nevertheless linear in ``weight`` and ``bias``."""


@dataclass(frozen=True, slots=True)
class LinearMap:
    """The weight and bias of a layer, in float64 on the CPU.

    Args:
        weight: ``(groups, out / groups, in / groups, kernel)``, whatever the kind of layer.
        bias: ``(out,)``; zeros if the layer has none.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, layer: Layer) -> LinearMap:
        """Read a layer."""
        weight = to_float64(layer.weight)
        groups, kernel = _groups(layer), math.prod(weight.shape[2:])
        rows = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], kernel)
        rows = rows.transpose(1, 2) if isinstance(layer, TRANSPOSED) else rows
        out = rows.shape[0] * rows.shape[1]
        bias = rows.new_zeros(out) if layer.bias is None else to_float64(layer.bias)
        return cls(rows, bias)

    def followed_by(self, affine: ScaleShift) -> LinearMap:
        """Return the map followed by a scale and shift of its output, ``(out,)`` each."""
        scale = affine.scale.reshape(self.weight.shape[0], -1, 1, 1)
        return LinearMap(self.weight * scale, self.bias * affine.scale + affine.shift)

    def preceded_by(self, affine: ScaleShift) -> LinearMap:
        """Return the map preceded by a scale and shift of its input, ``(in,)`` each.

        The shift is exact only if no tap of the kernel reads zero padding: see
        ``turns_shift_into_bias``.
        """
        groups = self.weight.shape[0]
        scale, shift = (values.reshape(groups, 1, -1, 1) for values in affine)
        moved = (self.weight * shift).sum(dim=(2, 3)).flatten()
        return LinearMap(self.weight * scale, self.bias + moved)

    def fits(self, layer: Layer) -> bool:
        """Whether all values are finite in the layer's dtype."""
        values = (self.weight, self.bias)
        return all(bool(v.to(layer.weight.dtype).isfinite().all()) for v in values)

    @torch.no_grad()
    def write_(self, layer: Layer) -> None:
        """Give a layer new parameters with these values; it gets a bias if it had none."""
        weight, old = self.weight, layer.weight
        rows = weight.transpose(1, 2) if isinstance(layer, TRANSPOSED) else weight
        new = torch.empty_like(old).copy_(rows.reshape(old.shape))
        layer.weight = nn.Parameter(new, old.requires_grad)
        bias = self.bias.to(old.device, old.dtype)
        learns = old.requires_grad if layer.bias is None else layer.bias.requires_grad
        layer.bias = nn.Parameter(bias, learns)


def num_outputs(layer: Layer) -> int:
    """Count the channels of a layer's output."""
    transposed = isinstance(layer, TRANSPOSED)
    return layer.weight.shape[1] * layer.groups if transposed else layer.weight.shape[0]


def why_fixed(layer: Layer, shape: Sequence[int] | None) -> str | None:
    """Say why a layer's weights cannot absorb a norm, or return None if they can.

    Args:
        layer: The layer.
        shape: Shape of the layer's input, if the norm comes after the layer. If the layer has its
            own forward, it is then tested whether that is linear in weight and bias. A norm before
            such a layer cannot be folded, because nothing is known about how it uses its input.
    """
    weight = layer._parameters.get("weight")
    if parametrize.is_parametrized(layer):
        return "its weight is parametrised"
    if is_watched(layer):
        return "it has hooks"
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return "its weight is not a plain parameter"
    if _has_own_forward(layer) and not (shape and _is_linear(layer, shape)):
        return f"it has its own forward ({key_of(type(layer))})"
    return None


@torch.no_grad()
def _is_linear(layer: Layer, shape: Sequence[int]) -> bool:
    """Test with random values in float64 whether a layer's own forward is linear in its parameters.

    The layer runs on one input with its parameters and with scaled and shifted ones.
    """
    if "forward" in vars(layer) or not {("weight",), ("bias",)} <= read_by_forward(type(layer)):
        return False
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(tuple(shape), generator=rng, dtype=torch.float64)
    affine = ScaleShift(*torch.randn(2, num_outputs(layer), generator=rng, dtype=torch.float64))
    try:
        tried = copy.deepcopy(layer).to("cpu", torch.float64)
        before = tried(x)
        LinearMap.of(tried).followed_by(affine).write_(tried)
        after = tried(x)
    except Exception:  # noqa: BLE001 - the layer's code may fail on values that it does not expect
        return False
    axis = channel_axis(layer)
    expected = (before.movedim(axis, -1) * affine.scale + affine.shift).movedim(-1, axis)
    return torch.allclose(after, expected, rtol=1e-9, atol=1e-9)


def turns_shift_into_bias(layer: Layer) -> bool:
    """Whether a constant added to the input adds the same constant to the output everywhere.

    Zero padding breaks this at the borders, because the padded zeros are not shifted.
    """
    if isinstance(layer, nn.Linear):
        return True
    pointwise = all(size == 1 for size in layer.kernel_size)
    if isinstance(layer, TRANSPOSED):
        return pointwise and all(step == 1 for step in layer.stride)
    if key_of(type(layer)) == PADS_ITSELF:
        return pointwise
    return layer.padding_mode != "zeros" or not _pads(layer)


def _pads(layer: Convolution) -> bool:
    if layer.padding == "same":
        return any(size > 1 for size in layer.kernel_size)
    return layer.padding != "valid" and any(layer.padding)


def channel_axis(layer: Layer) -> int:
    """Return the axis of a layer's channels, counted from the end: there may be no batch axis."""
    return -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)


def _has_own_forward(layer: nn.Module) -> bool:
    if "forward" in vars(layer):
        return True
    if key_of(type(layer)) in AS_TORCH:
        return False
    base = next(kind for kind in (*CONVOLUTIONS, nn.Linear) if isinstance(layer, kind))
    return any(
        getattr(type(layer), name, None) is not getattr(base, name, None)
        for name in ("forward", "_conv_forward", "__call__")
    )


def _groups(layer: Layer) -> int:
    return 1 if isinstance(layer, nn.Linear) else layer.groups
