"""What a norm does to each channel at evaluation, where it does the same to every example."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from normkit.convert.rules import key_of, read
from normkit.convert.source import Source
from normkit.core.moments import Moments
from normkit.core.partition import Partition
from normkit.errors import ConversionError
from normkit.kernels.activations import ActivationName
from normkit.layers.base import BUFFERS, NormLayer, SegmentLayer, TrackingLayer, is_watched

OWN_STATISTICS = "it evaluates by each example's own statistics"
NO_STATISTICS = "it keeps no running statistics: it evaluates by the batch's own"
TORCH_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class Affine(NamedTuple):
    """``scale * x + shift``: a value a channel, in float64 on the CPU."""

    scale: Tensor
    shift: Tensor

    def of_channels(self, channels: Tensor) -> Affine:
        """The same map for channels that are these ones of it."""
        return Affine(self.scale[channels], self.shift[channels])


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A norm at evaluation.

    Args:
        affine: What can move into a neighbour.
        rest: What is done afterwards and stays in its place; ``nn.Identity`` if nothing is.
        channels_last: Whether the channels are the input's last axis.
    """

    affine: Affine
    rest: nn.Module
    channels_last: bool

    @property
    def is_all(self) -> bool:
        """Whether nothing stays."""
        return isinstance(self.rest, nn.Identity)


def evaluated(norm: nn.Module) -> Evaluated | str:
    """Read what a norm does at evaluation, or say why it is not one scale and shift a channel."""
    if is_watched(norm, _apart(norm)[0]):
        return "hooks look at it"
    if "forward" in vars(norm):
        return "its forward was replaced"
    try:
        source = read(norm)
    except ConversionError:
        return f"{key_of(type(norm))} has no rule; say with normkit.convert.rule how it is read"
    found = _affine_of_ours(norm) if isinstance(norm, NormLayer) else _affine(norm, source)
    if isinstance(found, str):
        return found
    if _apart(norm)[1] and source.channels_last:
        return "its channel stage needs the whole layer to find its channels last"
    return Evaluated(found, _rest(norm, source), source.channels_last)


def _apart(norm: nn.Module) -> tuple[nn.Module, dict[str, nn.Module]]:
    """What of a norm is folded, itself or a stage of it, and what follows that by name."""
    found = norm.evaluated_stage() if isinstance(norm, NormLayer) else None
    return (norm, {}) if found is None else found


def _affine(norm: nn.Module, source: Source) -> Affine | str:
    tracks = isinstance(norm, TORCH_INSTANCE_NORMS) and norm.track_running_stats
    if source.statistics is None or not (source.over_batch or tracks):
        return NO_STATISTICS if source.over_batch else OWN_STATISTICS
    mean, var, _ = source.statistics
    eps = source.options["eps"]
    return _combined(Moments(mean, var), source.weight, source.bias, float(str(eps)))


def _affine_of_ours(norm: NormLayer) -> Affine | str:
    found = norm.evaluated_stage()
    if found is None:
        return "parts of it evaluate by each example's own statistics"
    stage, _ = found
    if stage.running_mean is None:
        return NO_STATISTICS if _is_over_batch(stage) else OWN_STATISTICS
    if stage.example_weight > 0:
        weight = f"example_weight={stage.example_weight:g}"
        return f"{weight} weighs in each example's own statistics"
    partition = stage.partition if isinstance(stage, SegmentLayer) else stage.running_partition
    return _affine_of_groups(stage, Partition(partition.num_groups))


def _is_over_batch(layer: TrackingLayer) -> bool:
    return not isinstance(layer, SegmentLayer) or layer.partition.examples_per_group != 1


def _affine_of_groups(layer: TrackingLayer, groups: Partition) -> Affine | str:
    """Pool statistics of channels into groups of channels as the layer does; expand those again."""
    if layer.num_features % groups.num_groups:
        return f"its {groups.num_groups} groups cut through the {layer.num_features} channels"
    mean, var = (_wide(layer.get_buffer(name))[None] for name in BUFFERS)
    table = Moments(mean, var)
    if mean.shape[1] != groups.num_groups:
        table = groups.pool(table)
    mean, var = (groups.expand(v, 1, layer.num_features)[0] for v in (table.mean, table.var))
    return _combined(Moments(mean, var), layer.weight, layer.bias, layer.eps)


def _combined(
    table: Moments, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Affine | str:
    scale = (_wide(table.var) + eps).rsqrt()
    if weight is not None:
        scale = scale * _wide(weight)
    shift = -_wide(table.mean) * scale
    shift = shift if bias is None else shift + _wide(bias)
    if not (scale.isfinite().all() and shift.isfinite().all()):
        return "its scale or shift is not finite"
    return Affine(scale, shift)


def _wide(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64)


def activation_module(name: ActivationName, negative_slope: float) -> nn.Module:
    """The activation of a layer as a module of torch's."""
    kinds: dict[str, type[nn.Module]] = {
        "relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "hardswish": nn.Hardswish,
        "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu6": nn.ReLU6,
    }  # fmt: skip
    return nn.LeakyReLU(negative_slope) if name == "leaky_relu" else kinds[name]()


def _rest(norm: nn.Module, source: Source) -> nn.Module:
    """What stays of a norm, under the names that it has inside of it."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts.update(_apart(norm)[1])
    if source.activation is not None:
        parts.update(zip(("drop", "act"), source.activation, strict=True))
    if isinstance(norm, NormLayer) and norm.activation is not None:
        parts["activation"] = activation_module(norm.activation, norm.negative_slope)
    kept = OrderedDict((n, m) for n, m in parts.items() if not isinstance(m, nn.Identity))
    return nn.Sequential(kept) if kept else nn.Identity()
