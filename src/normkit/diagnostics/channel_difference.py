"""StatDiff: how much channels that share statistics differ from each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.check import require_share
from normkit.core.moments import Moments
from normkit.diagnostics.measurement import Measurement, read_finite_rows
from normkit.errors import DataError, OptionError
from normkit.inference.norm_classes import is_over_maps
from normkit.inference.norm_inputs import observe_inputs
from normkit.inference.population import Population
from normkit.inference.tracked import (
    Unmeasured,
    Where,
    and_reasons,
    feature_map,
    select_layers,
    unmeasured,
)
from normkit.layers.base import NormLayer
from normkit.passes import (
    Data,
    Forward,
    changes_nothing,
    forward_batch,
    unwrap,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDifference:
    """StatDiff of one layer.

    Args:
        name: The layer's name.
        num_groups: Number of channel groups.
        group_size: Channels in a group.
        mean: Mean of StatDiff over the groups.
        std: Standard deviation of StatDiff over the groups (population).
    """

    name: str
    num_groups: int
    group_size: int
    mean: float
    std: float


@dataclass(frozen=True, kw_only=True)
class ChannelDifference(Measurement):
    """StatDiff of every layer whose groups have several channels.

    Args:
        layers: A row for each layer, in the order of the forward.
        mean: Mean of StatDiff over all groups of all layers; values that are not finite are left
            out if there are finite ones.
        std: Standard deviation over the same groups (population).
        num_batches: Number of batches that were measured.
        left: Norms that pool channels and were not measured, with the reason.
    """

    layers: tuple[LayerDifference, ...]
    mean: float
    std: float
    num_batches: int
    left: tuple[Unmeasured, ...] = ()

    drawn = ("mean", "std")

    @property
    def reading(self) -> str:
        """How much the channels of a group differ, and in which layer most."""
        return read_finite_rows(self.layers, self._read)

    def _read(self, rows: Sequence[LayerDifference]) -> str:
        worst = max(rows, key=lambda row: row.mean)
        return (
            f"Channels that share statistics differ in their means by {self.mean:.3g} ± "
            f"{self.std:.3g} of their standard deviations (StatDiff over all groups), most in "
            f"{worst.name or 'the model itself'} ({worst.mean:.3g})."
        )


@changes_nothing
def channel_difference(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    momentum: float | None = 0.1,
    where: Where | None = None,
    forward: Forward | None = None,
) -> ChannelDifference:
    r"""Measure how much the channels that a norm pools differ from each other: StatDiff.

    .. math::  StatDiff_g = \frac{\mathrm{std}_{c \in g}(\hat\mu_c)}
                                 {\mathrm{mean}_{c \in g}(\hat\sigma_c)}

    for each group of each norm that pools channels. An observer follows the mean and the standard
    deviation of each channel of the norm's **input**; the layer's own buffers are not used. The
    model runs in evaluation mode and is left as it was.

    Args:
        model: Holds norms that pool channels: torch's ``GroupNorm`` and ``LayerNorm`` over
            channels, or normkit's.
        batches: Inputs, pairs ``(inputs, target)`` or dicts of arguments.
        momentum: Weight of a new batch in the observer, which starts with the first batch's
            values; None gives the exact statistics of all batches together.
        where: ``where(layer, name)`` chooses the layers to measure; by default all.
        forward: ``forward(model, batch)`` calls the model, for batches of another form.

    Returns:
        A row for each layer, and the mean and standard deviation over all groups.

    Raises:
        OptionError: If no layer pools channels, or ``momentum`` lies outside 0 to 1.
        DataError: If there is no batch, or none reaches a layer.

    Source:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, eq. 35.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
        >>> found = channel_difference(model, [torch.randn(4, 3, 8, 8)])
        >>> found.layers[0].num_groups, found.layers[0].group_size
        (2, 4)
    """
    if momentum is not None:
        require_share("momentum", momentum)
    model = unwrap(model, "measure")
    pooling = {name: layer for name, layer in model.named_modules() if pooling_groups(layer)}
    layers = select_layers(pooling, where)
    if not layers:
        raise OptionError(
            f"{type(model).__name__} has no norm that pools channels (group norm, layer norm, ...)"
        )
    data = Data(batches=batches, forward=forward or forward_batch)
    observers: dict[str, _Observer] = {}

    def observe(name: str, x: Tensor, valid: Tensor | None = None) -> None:
        if x.numel() and (valid is None or valid.any()):
            observers.setdefault(name, _Observer(momentum)).observe(x, valid)

    missed, num_batches = observe_inputs(model, layers, observe, data, "measuring channels")
    left = {name: missed[layer] for name, layer in layers.items() if layer in missed}
    found = {
        name: stat_diff(observer.moments, pooling_groups(layers[name]))
        for name, observer in observers.items()
        if name not in left
    }
    if not found:
        raise DataError(f"no batch has reached a norm that pools channels{and_reasons(left)}")
    every = torch.cat(list(found.values()))
    every = every[every.isfinite()] if every.isfinite().any() else every
    return ChannelDifference(
        layers=tuple(_row(name, values, observers[name]) for name, values in found.items()),
        mean=every.mean().item(),
        std=every.std(correction=0).item(),
        num_batches=num_batches,
        left=unmeasured(model, left),
    )


class _Observer:
    """Follows the mean and variance of each channel of a layer's input."""

    def __init__(self, momentum: float | None) -> None:
        self._momentum = momentum
        self._all = Population()
        self._running: Moments | None = None

    def observe(self, x: Tensor, valid: Tensor | None) -> None:
        """Update the averages with one input, of which only the valid positions count."""
        batch = Population()
        batch.add(x, valid)
        self._all.merge(batch.sums)
        new, old = batch.moments, self._running
        if old is None or self._momentum is None:
            self._running = self._all.moments
        else:
            rate = self._momentum
            self._running = Moments(old.mean.lerp(new.mean, rate), old.var.lerp(new.var, rate))

    @property
    def moments(self) -> Moments:
        """Running mean and biased variance, ``(C,)``."""
        return self._all.moments if self._running is None else self._running


def pooling_groups(layer: nn.Module) -> int:
    """Number of groups of several channels that a norm pools; 0 for other modules."""
    if isinstance(layer, nn.GroupNorm):
        groups, channels = layer.num_groups, layer.num_channels
    elif isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1:
        groups, channels = 1, layer.normalized_shape[0]
    elif isinstance(layer, NormLayer):
        groups, channels = _own_groups(layer), layer.num_features
    else:
        return 0
    return groups if groups and channels % groups == 0 and channels > groups else 0


def _own_groups(layer: NormLayer) -> int:
    if type(layer).__name__.startswith(("LayerNorm", "PositionalNorm")):
        return 1
    return getattr(layer, "num_groups", 0) if not hasattr(layer, "batch") else 0


def channels_first(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the input of a norm that pools channels with the channels in the second axis."""
    return x.movedim(-1, 1) if _takes_channels_last(layer) else feature_map(layer, x)


def _takes_channels_last(layer: nn.Module) -> bool:
    """Whether this norm is over the last axis; torchvision's and timm's norms for maps are not."""
    if not isinstance(layer, nn.LayerNorm | nn.RMSNorm) or is_over_maps(layer):
        return False
    return len(layer.normalized_shape) == 1


def stat_diff(moments: Moments, num_groups: int) -> Tensor:
    """Compute StatDiff of each group, ``(num_groups,)``, from the moments of each channel."""
    mean = moments.mean.view(num_groups, -1)
    return mean.std(dim=1, correction=0) / moments.var.sqrt().view(num_groups, -1).mean(dim=1)


def _row(name: str, values: Tensor, observer: _Observer) -> LayerDifference:
    return LayerDifference(
        name=name,
        num_groups=values.numel(),
        group_size=observer.moments.mean.numel() // values.numel(),
        mean=values.mean().item(),
        std=values.std(correction=0).item(),
    )
