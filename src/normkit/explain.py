"""What a layer does with an input: the groups it cuts and the kernels that compute it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from normkit.core.check import require_feature_map
from normkit.errors import InputTypeError
from normkit.kernels.select import Kernels, choose
from normkit.layers.base import NormLayer, SegmentLayer
from normkit.layers.instance_batch import InstanceBatchNorm
from normkit.layers.whitening import GroupWhitening


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """How a layer computes a call.

    Args:
        layer: The layer's class.
        kernels: Which kernels compute it.
        reason: Why these.
        groups: What a statistics group of the input is made of, in training.
    """

    layer: str
    kernels: Kernels
    reason: str
    groups: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.groups}\n{self.kernels} kernels: {self.reason}"


def explain(layer: nn.Module, x: Tensor) -> Explanation:
    """Say which kernels compute ``layer(x)``, why, and which elements share statistics.

    Args:
        layer: One of normkit's layers.
        x: An input for it, ``(N, C, *S)``.

    Returns:
        The facts, printable.

    Raises:
        InputTypeError: If the layer is not one of normkit's.
        InputError: If the input does not fit it.

    Example:
        >>> import torch
        >>> from normkit import GroupNorm
        >>> explain(GroupNorm(6, num_groups=3), torch.randn(4, 6, 5, 7)).groups
        'statistics over a group of 1 of 4 examples, 2 of 6 channels, 35 of 35 positions'
    """
    if not isinstance(layer, NormLayer):
        raise InputTypeError(
            f"explain was given a {type(layer).__name__}; it explains normkit's own layers"
        )
    require_feature_map(x, layer.num_features, type(layer).__name__)
    kernels, reason = choose(x)
    return Explanation(
        layer=type(layer).__name__, kernels=kernels, reason=reason, groups=_groups(layer, x)
    )


def _groups(layer: NormLayer, x: Tensor) -> str:
    parts = getattr(layer, "partitions", None)
    if parts is not None:
        shapes = {name: (x.shape[0], _channels(layer, name), *x.shape[2:]) for name in parts}
        return "; ".join(
            f"{name} over {part.describe_group(shapes[name])}" for name, part in parts.items()
        )
    if isinstance(layer, GroupWhitening):
        return f"covariances of {layer.num_groups} runs of channels within an example"
    if isinstance(layer, SegmentLayer):
        layer.partition.segment_size(x.shape)
        return f"statistics over {layer.partition.describe_group(x.shape)}"
    return f"statistics over the {x.shape[1]} channels of each position"


def _channels(layer: NormLayer, part: str) -> int:
    """Channels that a part of a composite sees: of IBN, each norm has its own."""
    if isinstance(layer, InstanceBatchNorm):
        return layer.partitions[part].num_groups
    return layer.num_features
