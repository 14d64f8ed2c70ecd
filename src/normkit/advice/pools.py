"""Which values of its input a norm of any library takes each of its statistics over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import singledispatch

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit.convert.adapters import adapters_of, base_of
from normkit.convert.rules import RULES, key_of
from normkit.core.partition import Partition
from normkit.errors import PartitionError
from normkit.layers.base import NormLayer
from normkit.sharing import Part, parts

Shape = tuple[int, ...]

OVER_CHANNELS_FIRST = "LayerNorm2d", "LayerNormExp2d", "LayerNormAct2d"
"""How the names of layer norms begin that take ``(N, C, H, W)`` and normalise every position."""
FIXED = "FrozenBatchNorm"


@dataclass(frozen=True, slots=True)
class Pool:
    """Statistics of a norm for an input of one shape.

    Args:
        part: What they are of, and where they come from.
        shape: Of the input as ``part`` sees it, ``(N, C, *S)``.
    """

    part: Part
    shape: Shape

    @property
    def refusal(self) -> str | None:
        """Why the groups do not fit the shape, if they do not."""
        if self.part.partition is None:
            return None
        try:
            self.part.partition.segment_size(self.shape)
        except PartitionError as error:
            return str(error)
        return None

    @property
    def of_input(self) -> bool:
        """Whether they are computed from the input that they normalise."""
        return self.part.origin == "input" and self.part.share > 0

    @property
    def over_batch(self) -> bool:
        """Whether other examples have a say, now or in the running statistics."""
        partition = self.part.partition
        return partition is not None and partition.examples_per_group != 1

    @property
    def num_values(self) -> int:
        """Values in the smallest group."""
        if self.part.partition is None:
            return self.shape[1]
        return self.part.partition.group_sizes(self.shape)[1]

    @property
    def num_values_of_one(self) -> int:
        """Values in a group of a batch of one example."""
        partition = self.part.partition
        groups = 1 if partition is None else partition.num_groups
        return math.prod(self.shape[1:]) // groups

    @property
    def by_channel(self) -> bool:
        """Whether no group holds more than one channel."""
        partition = self.part.partition
        return partition is not None and partition.num_groups % self.shape[1] == 0


def pools(layer: nn.Module, shape: Shape) -> tuple[Pool, ...] | None:
    """Say over which values a norm takes its statistics, in the mode it is in.

    Args:
        layer: A norm of torch, torchvision, timm, detectron or normkit.
        shape: Of its input, as the layer takes it.

    Returns:
        A pool for each of its statistics; none if they are fixed; None if the kind is not known.
    """
    if any(base.__name__.startswith(FIXED) for base in type(layer).__mro__):
        return ()
    if not _computes_as_known(layer):
        return None
    if isinstance(layer, nn.LayerNorm):
        return (_of_layer_norm(layer, shape),)
    if isinstance(layer, NormLayer) and adapters_of(layer)[1]:
        shape = (shape[0], shape[-1], *shape[1:-1])
    found = _parts(layer)
    return None if found is None else tuple(Pool(part, _seen(part, shape)) for part in found)


TORCH_FORWARDS = frozenset(
    kind.forward
    for kind in (_BatchNorm, nn.SyncBatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)
)


def _computes_as_known(layer: nn.Module) -> bool:
    """Whether the layer's own code is that of a known class, not only its base class."""
    kind = base_of(layer)
    return kind.forward in TORCH_FORWARDS or key_of(kind) in RULES or _is_ours(layer)


def _is_ours(layer: nn.Module) -> bool:
    return isinstance(layer, NormLayer) and base_of(layer).forward is NormLayer.forward


def _seen(part: Part, shape: Shape) -> Shape:
    first, end = part.channels or (0, shape[1])
    return (shape[0], end - first, *shape[2:])


def _of_layer_norm(layer: nn.LayerNorm, shape: Shape) -> Pool:
    names = [base.__name__ for base in type(layer).__mro__]
    if any(name.startswith(OVER_CHANNELS_FIRST) for name in names):
        return Pool(Part(partition=None), shape)
    num_features = math.prod(layer.normalized_shape)
    examples = (math.prod(shape) // num_features, num_features)
    return Pool(Part(partition=Partition(1, 1)), examples)


@singledispatch
def _parts(layer: nn.Module) -> tuple[Part, ...] | None:
    return None


@_parts.register(NormLayer)
def _(layer: NormLayer) -> tuple[Part, ...]:
    return parts(layer)


@_parts.register(_BatchNorm)
def _(layer: _BatchNorm) -> tuple[Part, ...]:
    return _tracked(Partition(layer.num_features), layer)


@_parts.register(_InstanceNorm)
def _(layer: _InstanceNorm) -> tuple[Part, ...]:
    return _tracked(Partition(layer.num_features, 1), layer)


@_parts.register(nn.GroupNorm)
def _(layer: nn.GroupNorm) -> tuple[Part, ...]:
    return (Part(partition=Partition(layer.num_groups, 1)),)


def _tracked(partition: Partition, layer: _BatchNorm | _InstanceNorm) -> tuple[Part, ...]:
    follows = layer.training or layer.running_mean is None
    return (Part(partition=partition, origin="input" if follows else "running"),)


def num_processes(layer: nn.Module) -> int:
    """Over how many processes a layer's statistics go."""
    synchronized = isinstance(layer, nn.SyncBatchNorm) and dist.is_available()
    return dist.get_world_size() if synchronized and dist.is_initialized() else 1
