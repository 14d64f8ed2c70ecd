"""A weight as one row of values for each filter, whatever layer it belongs to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from normkit.errors import InputError
from normkit.typing import FeatureMap

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which values of a weight make one output channel.

    Args:
        channel_axis: Axis of the output channels: 0 for convolutions and linear layers, 1 for
            transposed convolutions.
        groups: Groups of a transposed convolution, whose weight is ``(in, out / groups, *kernel)``;
            a group's filters then are a run of axis 0. A convolution's filters need no groups.
    """

    channel_axis: int = 0
    groups: int = 1

    def __post_init__(self) -> None:
        if self.channel_axis not in (0, 1) or (self.channel_axis == 0 and self.groups != 1):
            raise InputError(
                f"channel_axis={self.channel_axis}, groups={self.groups} was given; the output "
                f"channels are axis 0, or axis 1 in groups along axis 0 (transposed convolutions)"
            )

    @classmethod
    def of(cls, module: nn.Module) -> Filters:
        """Find the filters of a convolution or linear layer."""
        if isinstance(module, TRANSPOSED):
            return cls(channel_axis=1, groups=module.groups)
        return cls()

    def rows(self, weight: Tensor) -> FeatureMap:
        """Read a weight as the feature map ``(1, filters, fan-in)``."""
        return self._filters_first(weight).flatten(1)[None]

    def weight(self, rows: FeatureMap, like: Tensor) -> Tensor:
        """Give the rows the shape of the weight that they were read from."""
        if self.channel_axis == 0:
            first = like.movedim(1, -1) if _is_channels_last(like) else like
            values = rows.view(first.shape)
            return values.movedim(-1, 1) if _is_channels_last(like) else values
        grouped = like.unflatten(0, (self.groups, -1)).transpose(1, 2).shape
        return rows.reshape(grouped).transpose(1, 2).reshape(like.shape)

    def num_filters(self, weight: Tensor) -> int:
        """Output channels of the layer."""
        return weight.shape[self.channel_axis] * self.groups

    def fan_in(self, weight: Tensor) -> int:
        """Values that make one output channel."""
        return math.prod(weight.shape) // max(self.num_filters(weight), 1)

    def _filters_first(self, weight: Tensor) -> Tensor:
        if self.channel_axis == 0:
            return weight.movedim(1, -1) if _is_channels_last(weight) else weight
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def require(self, weight: Tensor) -> None:
        """Refuse a weight that has no such filters.

        Raises:
            InputError: If it has fewer than two axes, or the groups do not divide it.
        """
        if weight.ndim < 2:
            raise InputError(
                f"a weight of shape {tuple(weight.shape)} was given; it has an axis of output "
                f"channels and at least one more"
            )
        if weight.shape[0] % self.groups:
            raise InputError(
                f"a weight of shape {tuple(weight.shape)} was given, whose axis 0 the "
                f"{self.groups} groups do not divide"
            )


def _is_channels_last(weight: Tensor) -> bool:
    """Whether the values of a filter lie in another order than their axes: rows are a view then."""
    return weight.ndim > 2 and not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous()
