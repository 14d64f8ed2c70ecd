"""What tools can ask a layer: which elements share statistics, and where its values are held."""

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
        name: Name of the norm or stage in a composite; ``"statistics"`` in other layers.
        partition: The groups; None is one group per position of each example.
        origin: ``"input"``: computed from the elements that share them. ``"running"``: running
            statistics, which do not depend on the input. ``"estimates"``: running estimates that
            were first updated with the elements.
        share: Weight of these statistics where ``example_weight`` mixes several.
        channels: First channel and one past the last; None is all channels.
    """

    name: str = "statistics"
    partition: Partition | None
    origin: Origin = "input"
    share: float = 1.0
    channels: tuple[int, int] | None = None

    def index(self, shape: Sequence[int]) -> Tensor:
        """Number of the group of every element.

        Args:
            shape: Shape of the feature map, ``(N, C, *S)``.

        Returns:
            Integers of that shape, from 0; -1 in channels that do not belong to the part.

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
        """Describe the elements that share statistics, for a feature map of this shape."""
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
    """A run of channels, and the layer that holds their values.

    Args:
        layer: The asked layer itself, or a stage of it.
        start: First channel.
        end: One past the last.
    """

    layer: Any
    start: int
    end: int


class Tracking(Protocol):
    """The attributes of a layer that ``tracked_parts`` reads."""

    training: bool
    running_mean: Tensor | None

    @property
    def example_weight(self) -> float:
        """Share of the example's own statistics at evaluation."""
        ...


def tracked_parts(name: str, partition: Partition, layer: Tracking) -> tuple[Part, ...]:
    """The input's statistics in training; at evaluation the running and the example's own ones."""
    if layer.training or layer.running_mean is None:
        return (Part(name=name, partition=partition),)
    whole = Partition(num_groups=partition.num_groups)
    weight, example = layer.example_weight, whole._replace(examples_per_group=1)
    found = (
        Part(name=name, partition=whole, origin="running", share=1 - weight),
        Part(name=name, partition=example, share=weight),
    )
    return tuple(part for part in found if part.share > 0)
