"""What a layer is made of, as tools ask it: statistics, and who holds which channels' values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from normkit.core.partition import Partition

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


class Slot(NamedTuple):
    """A run of channels of a layer, and the layer in it that has their values.

    Args:
        layer: The layer itself, or a stage of it.
        start: First channel.
        end: One past the last.
    """

    layer: Any
    start: int
    end: int


class Tracking(Protocol):
    """What ``tracked_parts`` reads of a layer."""

    training: bool
    running_mean: Tensor | None

    @property
    def example_weight(self) -> float:
        """Share of the example's own statistics at evaluation."""
        ...


def tracked_parts(name: str, partition: Partition, layer: Tracking) -> tuple[Part, ...]:
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
