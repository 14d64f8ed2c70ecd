"""Which elements of a feature map share statistics, for every layer in its mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Literal

import torch
from torch import Tensor, nn

from normkit.core.partition import Partition
from normkit.errors import InputTypeError
from normkit.layers.base import SegmentLayer, TrackingLayer
from normkit.layers.batch_channel import BatchChannelNorm, ChannelStage, EstimatedBatchNorm
from normkit.layers.group_plus import GroupNormPlus
from normkit.layers.instance_batch import InstanceBatchNorm
from normkit.layers.over_example import PositionalNorm
from normkit.layers.switchable import SwitchableNorm
from normkit.layers.whitening import GroupWhitening

Origin = Literal["input", "estimates", "running"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Statistics that a layer normalises by, and the elements that share them.

    Args:
        name: The norm or stage of a composite; of other layers what it is.
        partition: The groups; None is one for each position of each example.
        origin: ``"input"``: they are computed from the elements that share them. ``"running"``:
            they are fixed, whatever the input. ``"estimates"``: running ones that the elements
            have just moved.
        share: Their weight where several are averaged, as ``example_weight`` says.
        channels: First channel and one past the last, where it is not all of them.
    """

    name: str = "statistics"
    partition: Partition | None
    origin: Origin = "input"
    share: float = 1.0
    channels: tuple[int, int] | None = None

    def index(self, shape: Sequence[int]) -> Tensor:
        """Number the groups: the group of every element.

        Args:
            shape: Of the feature map, ``(N, C, *S)``.

        Returns:
            Whole numbers in that shape, from 0; -1 in channels that the part does not look at.

        Raises:
            PartitionError: If the groups do not divide the map.

        Example:
            >>> Part(partition=Partition(num_groups=2, examples_per_group=1)).index((2, 4))
            tensor([[0, 0, 1, 1],
                    [2, 2, 3, 3]])
        """
        if self.channels is None:
            return _group_index(self.partition, shape)
        first, end = self.channels
        index = torch.full(tuple(shape), -1)
        index[:, first:end] = _group_index(self.partition, self._own_shape(shape))
        return index

    def describe(self, shape: Sequence[int]) -> str:
        """Say of which elements the statistics are, for a feature map of this shape."""
        if self.partition is None:
            return f"{self.name} over the {shape[1]} channels of each position"
        group = self.partition.describe_group(self._own_shape(shape))
        share = "" if self.share == 1 else f", with a weight of {self.share:g}"
        if self.origin == "input":
            return f"{self.name} over {group}{share}"
        if self.origin == "estimates":
            return f"{self.name} by estimates that follow {group}"
        own = "" if self.name == "statistics" else f"{self.name} by "
        return f"{own}running statistics of {group.partition(' examples, ')[2]}{share}"

    def _own_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        first, end = self.channels or (0, shape[1])
        return (shape[0], end - first, *shape[2:])


def _group_index(partition: Partition | None, shape: Sequence[int]) -> Tensor:
    num_examples, num_channels, *spatial = shape
    num_positions = math.prod(spatial)
    if partition is None:
        index = torch.arange(num_examples * num_positions).reshape(num_examples, 1, *spatial)
        return index.expand(tuple(shape))
    segment_size = partition.segment_size(shape)
    num_segments = num_channels * num_positions // segment_size
    run = partition.examples_per_group or num_examples
    groups = torch.arange(math.ceil(num_examples / run) * partition.num_groups)
    table = partition.expand(groups.reshape(-1, partition.num_groups), num_examples, num_segments)
    index = table.expand(num_examples, -1).repeat_interleave(segment_size, dim=1)
    return index.reshape(tuple(shape))


@singledispatch
def parts(layer: nn.Module) -> tuple[Part, ...]:
    """Say by which statistics a layer normalises, in its mode, and which elements share them.

    Args:
        layer: One of normkit's layers, or a class of yours that is made from one.

    Returns:
        One part for each norm that the layer is made of; two where running statistics are averaged
        with the example's own.

    Raises:
        InputTypeError: If the layer is not one of normkit's.

    Example:
        >>> from normkit import BatchNorm
        >>> [part.origin for part in parts(BatchNorm(6).eval())]
        ['running']
    """
    raise InputTypeError(
        f"explain was given a {type(layer).__name__}; it explains normkit's own layers"
    )


@parts.register(PositionalNorm)
def _(layer: PositionalNorm) -> tuple[Part, ...]:
    return (Part(partition=None),)


@parts.register(SegmentLayer)
def _(layer: SegmentLayer) -> tuple[Part, ...]:
    return _tracked("statistics", layer.partition, layer)


@parts.register(GroupWhitening)
def _(layer: GroupWhitening) -> tuple[Part, ...]:
    example = Partition(num_groups=1, examples_per_group=1)
    return (
        Part(name="means", partition=layer.partition),
        Part(name="covariances", partition=example),
    )


@parts.register(GroupNormPlus)
def _(layer: GroupNormPlus) -> tuple[Part, ...]:
    found = layer.partitions
    group = Part(name="group norm", partition=found["group norm"])
    return (group, *_tracked("batch norm", found["batch norm"], layer))


@parts.register(BatchChannelNorm)
def _(layer: BatchChannelNorm) -> tuple[Part, ...]:
    batch = [replace(part, name="batch stage") for part in parts(layer.batch)]
    return (*batch, *(replace(part, name="channel stage") for part in parts(layer.channel)))


@parts.register(EstimatedBatchNorm)
def _(layer: EstimatedBatchNorm) -> tuple[Part, ...]:
    partition = Partition(num_groups=layer.num_features)
    if layer.training:
        return (Part(partition=partition, origin="estimates"),)
    return _tracked("statistics", partition, layer)


@parts.register(ChannelStage)
def _(layer: ChannelStage) -> tuple[Part, ...]:
    return (Part(partition=layer.partition),)


@parts.register(SwitchableNorm)
def _(layer: SwitchableNorm) -> tuple[Part, ...]:
    found = dict(layer.partitions)
    batch = found.pop("batch norm", None)
    own = [Part(name=name, partition=partition) for name, partition in found.items()]
    return (*own, *(_tracked("batch norm", batch, layer) if batch else ()))


@parts.register(InstanceBatchNorm)
def _(layer: InstanceBatchNorm) -> tuple[Part, ...]:
    half, end = layer.instance.num_features, layer.num_features
    return (
        *(
            replace(part, name="instance norm", channels=(0, half))
            for part in parts(layer.instance)
        ),
        *(replace(part, name="batch norm", channels=(half, end)) for part in parts(layer.batch)),
    )


def _tracked(name: str, partition: Partition, layer: TrackingLayer) -> tuple[Part, ...]:
    """Statistics of the input in training; then the running ones and the example's own."""
    if layer.training or layer.running_mean is None:
        return (Part(name=name, partition=partition),)
    whole = Partition(num_groups=partition.num_groups)
    weight, example = layer.example_weight, whole._replace(examples_per_group=1)
    found = (
        Part(name=name, partition=whole, origin="running", share=1 - weight),
        Part(name=name, partition=example, share=weight),
    )
    return tuple(part for part in found if part.share > 0)
