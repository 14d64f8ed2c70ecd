"""Reading the weight of any convolution or linear layer as one row of values for each filter."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from normkit.errors import InputError
from normkit.typing import FeatureMap

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which values of a weight make one output channel.

    Args:
        channel_axis: Axis of the output channels: 0 for convolutions and linear layers, 1 for
            transposed convolutions.
        groups: Groups of a transposed convolution, whose weight is ``(in, out / groups, *kernel)``:
            the inputs of each group are a contiguous range of axis 0. It is 1 for all other layers,
            whose filters do not depend on groups.
    """

    channel_axis: int = 0
    groups: int = 1

    def __post_init__(self) -> None:
        if self.channel_axis not in (0, 1) or (self.channel_axis == 0 and self.groups != 1):
            raise InputError(
                f"channel_axis={self.channel_axis}, groups={self.groups} was given; channel_axis "
                f"must be 0 with groups=1, or 1 with any groups (transposed convolutions)"
            )

    @classmethod
    def of(cls, module: nn.Module) -> Filters:
        """Describe the filters of a convolution or linear layer."""
        if isinstance(module, TRANSPOSED):
            return cls(channel_axis=1, groups=module.groups)
        return cls()

    def rows(self, weight: Tensor) -> FeatureMap:
        """Read a weight as the feature map ``(1, filters, fan-in)``."""
        return self._filters_first(weight).flatten(1)[None]

    def weight(self, rows: FeatureMap, like: Tensor) -> Tensor:
        """Turn rows back into a weight with the shape and memory format of ``like``."""
        if self.channel_axis == 0:
            values = rows.view(self._filters_first(like).shape)
            return values.movedim(-1, 1) if _is_channels_last(like) else values
        grouped = like.unflatten(0, (self.groups, -1)).transpose(1, 2).shape
        return rows.reshape(grouped).transpose(1, 2).reshape(like.shape)

    def num_filters(self, weight: Tensor) -> int:
        """Count the filters, which are the output channels of the layer."""
        return weight.shape[self.channel_axis] * self.groups

    def fan_in(self, weight: Tensor) -> int:
        """Count the values of one filter."""
        return math.prod(weight.shape) // max(self.num_filters(weight), 1)

    def _filters_first(self, weight: Tensor) -> Tensor:
        """Arrange a weight with the filters on axis 0, as a view where possible."""
        if self.channel_axis == 0:
            return weight.movedim(1, -1) if _is_channels_last(weight) else weight
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def require(self, weight: Tensor) -> None:
        """Refuse a weight that these filters do not fit.

        Raises:
            InputError: If the weight has fewer than two axes, or the groups do not divide axis 0.
        """
        if weight.ndim < 2:
            raise InputError(
                f"a weight of shape {tuple(weight.shape)} was given; it must have an axis of "
                f"output channels and at least one more"
            )
        if weight.shape[0] % self.groups:
            raise InputError(
                f"a weight of shape {tuple(weight.shape)} was given; groups={self.groups} must "
                f"divide the length of its axis 0"
            )


def _is_channels_last(weight: Tensor) -> bool:
    """Whether a weight is channels_last; its rows are a view once axis 1 is moved to the end."""
    return weight.ndim > 2 and not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous()
