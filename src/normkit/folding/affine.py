"""Reading a norm as one scale and one shift for each channel, as it computes at evaluation."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from normkit.convert.adapters import modules_after
from normkit.convert.rules import key_of, read
from normkit.convert.source import Source
from normkit.core.moments import Moments
from normkit.core.partition import Partition
from normkit.errors import ConversionError
from normkit.layers.base import BUFFERS, NormLayer, SegmentLayer, TrackingLayer, is_watched

OWN_STATISTICS = "it evaluates by each example's own statistics"
NO_STATISTICS = "it keeps no running statistics: it evaluates by the batch's own"
TORCH_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class ScaleShift(NamedTuple):
    """``scale * x + shift``, with one value of each for every channel, in float64 on the CPU."""

    scale: Tensor
    shift: Tensor

    def at(self, channels: Tensor) -> ScaleShift:
        """Return the scales and shifts at these channel indices."""
        return ScaleShift(self.scale[channels], self.shift[channels])


@dataclass(frozen=True, slots=True)
class EvaluatedNorm:
    """A norm as it computes at evaluation.

    Args:
        affine: The scale and shift that can be folded into another layer.
        rest: The modules that come afterwards inside the norm and stay in its place;
            ``nn.Identity`` if there are none.
        channels_last: Whether the channels are the last axis of the input.
    """

    affine: ScaleShift
    rest: nn.Module
    channels_last: bool

    @property
    def leaves_nothing(self) -> bool:
        """Whether only an identity stays in the norm's place."""
        return isinstance(self.rest, nn.Identity)


def evaluated_norm(norm: nn.Module) -> EvaluatedNorm | str:
    """Read a norm as it computes at evaluation, or say why that is not one scale and shift."""
    stage, following = _split(norm)
    if is_watched(norm, stage):
        return "it has hooks"
    if "forward" in vars(norm):
        return "its forward was replaced"
    try:
        source = read(norm)
    except ConversionError:
        return f"{key_of(type(norm))} has no rule; register one with normkit.convert.rule"
    found = _own_affine(norm) if isinstance(norm, NormLayer) else _affine(norm, source)
    if isinstance(found, str):
        return found
    if following and source.channels_last:
        return "its channel stage expects the channels on axis 1, but they are on the last axis"
    return EvaluatedNorm(found, _rest(norm, following, source), source.channels_last)


def _split(norm: nn.Module) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Return the part of a norm that is folded, and the stages that follow it by name."""
    found = norm.evaluated_stage() if isinstance(norm, NormLayer) else None
    return (norm, {}) if found is None else found


def _affine(norm: nn.Module, source: Source) -> ScaleShift | str:
    tracks = isinstance(norm, TORCH_INSTANCE_NORMS) and norm.track_running_stats
    if source.statistics is None or not (source.over_batch or tracks):
        return NO_STATISTICS if source.over_batch else OWN_STATISTICS
    mean, var, _ = source.statistics
    eps = source.options["eps"]
    return _combined(Moments(mean, var), source.weight, source.bias, float(str(eps)))


def _own_affine(norm: NormLayer) -> ScaleShift | str:
    """Read one of normkit's layers."""
    found = norm.evaluated_stage()
    if found is None:
        return "parts of it evaluate by each example's own statistics"
    stage, _ = found
    if stage.running_mean is None:
        return NO_STATISTICS if _is_over_batch(stage) else OWN_STATISTICS
    if stage.example_weight > 0:
        weight = f"example_weight={stage.example_weight:g}"
        return f"{weight} mixes in each example's own statistics"
    partition = stage.partition if isinstance(stage, SegmentLayer) else stage.running_partition
    return _grouped_affine(stage, Partition(partition.num_groups))


def _is_over_batch(layer: TrackingLayer) -> bool:
    return not isinstance(layer, SegmentLayer) or layer.partition.examples_per_group != 1


def _grouped_affine(layer: TrackingLayer, groups: Partition) -> ScaleShift | str:
    """Read a layer whose statistics are pooled over groups of channels."""
    if layer.num_features % groups.num_groups:
        return f"its {groups.num_groups} groups cut through the {layer.num_features} channels"
    mean, var = (to_float64(layer.get_buffer(name))[None] for name in BUFFERS)
    table = Moments(mean, var)
    if mean.shape[1] != groups.num_groups:
        table = groups.pool(table)
    mean, var = (groups.expand(v, 1, layer.num_features)[0] for v in (table.mean, table.var))
    return _combined(Moments(mean, var), layer.weight, layer.bias, layer.eps)


def _combined(
    table: Moments, weight: Tensor | None, bias: Tensor | None, eps: float
) -> ScaleShift | str:
    scale = (to_float64(table.var) + eps).rsqrt()
    if weight is not None:
        scale = scale * to_float64(weight)
    shift = -to_float64(table.mean) * scale
    shift = shift if bias is None else shift + to_float64(bias)
    if not (scale.isfinite().all() and shift.isfinite().all()):
        return "its scale or shift is not finite"
    return ScaleShift(scale, shift)


def to_float64(values: Tensor) -> Tensor:
    """Detach a tensor and move it to the CPU in float64."""
    return values.detach().to("cpu", torch.float64)


def _rest(norm: nn.Module, stages: dict[str, nn.Module], source: Source) -> nn.Module:
    """Return the modules that stay in a norm's place, under the names they have in the norm."""
    parts = {**stages, **modules_after(norm, source.activation)}
    kept = OrderedDict((n, m) for n, m in parts.items() if not isinstance(m, nn.Identity))
    return nn.Sequential(kept) if kept else nn.Identity()
