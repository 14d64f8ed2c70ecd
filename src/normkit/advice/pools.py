"""For a norm of any library, find which values of its input share each statistic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit.convert.adapters import adapters_of, base_of
from normkit.convert.rules import has_rule
from normkit.core.partition import Partition
from normkit.errors import PartitionError
from normkit.layers.base import NormLayer
from normkit.sharing import Part, parts

Shape = tuple[int, ...]

OVER_CHANNELS_FIRST = "LayerNorm2d", "LayerNormExp2d", "LayerNormAct2d"
"""Layer norms whose class name begins so normalise each position of ``(N, C, H, W)``."""
FIXED = "FrozenBatchNorm"


@dataclass(frozen=True, slots=True)
class Pool:
    """The statistics groups of a norm, or of a part of it, for an input of one shape.

    Args:
        part: Which elements form a group, and where the statistics come from.
        shape: Shape ``(N, C, *S)`` of the part's input.
    """

    part: Part
    shape: Shape

    @property
    def refusal(self) -> str | None:
        """Why the groups do not divide the input; None if they do."""
        if self.part.partition is None:
            return None
        try:
            self.part.partition.segment_size(self.shape)
        except PartitionError as error:
            return str(error)
        return None

    @property
    def of_input(self) -> bool:
        """Whether the statistics are computed from the input that they normalise."""
        return self.part.origin == "input" and self.part.share > 0

    @property
    def over_batch(self) -> bool:
        """Whether the statistics depend on other examples, directly or as running statistics."""
        partition = self.part.partition
        return partition is not None and partition.examples_per_group != 1

    @property
    def num_values(self) -> int:
        """Number of values in the smallest group."""
        if self.part.partition is None:
            return self.shape[1]
        return self.part.partition.group_sizes(self.shape)[1]

    @property
    def num_values_per_example(self) -> int:
        """Number of values in a group if the batch has one example."""
        partition = self.part.partition
        groups = 1 if partition is None else partition.num_groups
        return math.prod(self.shape[1:]) // groups

    @property
    def by_channel(self) -> bool:
        """Whether no group holds more than one channel."""
        partition = self.part.partition
        return partition is not None and partition.num_groups % self.shape[1] == 0


def pools(layer: nn.Module, shape: Shape) -> tuple[Pool, ...] | None:
    """Find which values share a norm's statistics, in its present mode.

    Args:
        layer: A norm of torch, torchvision, timm, detectron or normkit.
        shape: Shape of its input, in the layer's own layout.

    Returns:
        A pool for each of its statistics; empty if the statistics are fixed; None if the class is
        unknown.
    """
    if any(base.__name__.startswith(FIXED) for base in type(layer).__mro__):
        return ()
    if not _computes_as_known(layer):
        return None
    if isinstance(layer, nn.LayerNorm):
        return (_of_layer_norm(layer, shape),)
    if isinstance(layer, NormLayer) and adapters_of(layer)[1]:  # The layer takes channels last.
        shape = (shape[0], shape[-1], *shape[1:-1])
    found = _parts(layer)
    return None if found is None else tuple(Pool(part, _part_shape(part, shape)) for part in found)


TORCH_FORWARDS = frozenset(
    kind.forward
    for kind in (_BatchNorm, nn.SyncBatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)
)


def _computes_as_known(layer: nn.Module) -> bool:
    """Whether the layer uses the forward of a known class, rather than one of its own."""
    kind = base_of(layer)
    is_normkits = isinstance(layer, NormLayer) and kind.forward is NormLayer.forward
    return kind.forward in TORCH_FORWARDS or has_rule(kind) or is_normkits


def _part_shape(part: Part, shape: Shape) -> Shape:
    """Shape of the channels that a part normalises."""
    first, end = part.channels or (0, shape[1])
    return (shape[0], end - first, *shape[2:])


def _of_layer_norm(layer: nn.LayerNorm, shape: Shape) -> Pool:
    names = [base.__name__ for base in type(layer).__mro__]
    if any(name.startswith(OVER_CHANNELS_FIRST) for name in names):
        return Pool(Part(partition=None), shape)
    num_features = math.prod(layer.normalized_shape)
    examples = (math.prod(shape) // num_features, num_features)
    return Pool(Part(partition=Partition(1, 1)), examples)


def _parts(layer: nn.Module) -> tuple[Part, ...] | None:
    if isinstance(layer, NormLayer):
        return parts(layer)
    if isinstance(layer, nn.GroupNorm):
        return (Part(partition=Partition(layer.num_groups, 1)),)
    if not isinstance(layer, _BatchNorm | _InstanceNorm):
        return None
    examples_per_group = 1 if isinstance(layer, _InstanceNorm) else None
    partition = Partition(layer.num_features, examples_per_group)
    from_input = layer.training or layer.running_mean is None
    return (Part(partition=partition, origin="input" if from_input else "running"),)


def num_processes(layer: nn.Module) -> int:
    """Number of processes whose batches share a layer's statistics."""
    synchronized = isinstance(layer, nn.SyncBatchNorm) and dist.is_available()
    return dist.get_world_size() if synchronized and dist.is_initialized() else 1
