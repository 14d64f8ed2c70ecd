"""StatDiff: how different the channels are that share statistics."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.check import require_share
from normkit.core.moments import Moments
from normkit.diagnostics.measurement import Measurement
from normkit.errors import DataError, OptionError
from normkit.inference.population import Population
from normkit.inference.tracked import Where, bare, chosen, feature_map
from normkit.layers.base import NormLayer
from normkit.passes import Data, Forward, changes_nothing, forward_batch, untouched


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDifference:
    """StatDiff of one layer.

    Args:
        name: Its name.
        num_groups: Groups of channels.
        group_size: Channels of a group.
        mean: Mean of StatDiff over the groups.
        std: Standard deviation of it over the groups (population).
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
        layers: In the order of the forward.
        mean: Over all groups of all layers.
        std: Over all groups of all layers (population).
        num_batches: Batches that were measured.
    """

    layers: tuple[LayerDifference, ...]
    mean: float
    std: float
    num_batches: int

    drawn = ("mean", "std")

    @property
    def reading(self) -> str:
        """How different channels of a group are, and where most."""
        worst = max(self.layers, key=lambda row: row.mean)
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
    r"""Measure how different the channels are that a norm pools: StatDiff.

    .. math::  StatDiff_g = \frac{\mathrm{std}_{c \in g}(\hat\mu_c)}
                                 {\mathrm{mean}_{c \in g}(\hat\sigma_c)}

    of each group of each norm that pools channels, with running means and standard deviations of
    the norm's **input**, which an observer takes; the layer's own buffers are not used. The model
    runs at evaluation and is left as it was.

    Args:
        model: Holds norms that pool channels: torch's ``GroupNorm`` and ``LayerNorm`` over
            channels, or ours.
        batches: Inputs, ``(inputs, target)`` or dicts of arguments.
        momentum: Weight of a new batch in the observer, which starts with the first batch's
            values; None takes all batches together, exactly.
        where: ``where(layer, name)`` says which layers are meant; by default all.
        forward: ``forward(model, batch)`` for batches of another form.

    Returns:
        A row for each layer, and mean and spread over all groups.

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
    model = bare(model)
    groups = {name: n for name, layer in model.named_modules() if (n := pooling_groups(layer))}
    layers = chosen({name: model.get_submodule(name) for name in groups}, where)
    if not layers:
        raise OptionError(
            f"{type(model).__name__} has no norm that pools channels (group norm, layer norm, ...)"
        )
    observers: dict[str, _Observer] = {}
    data = Data(batches=batches, forward=forward or forward_batch)
    with untouched(model, training=False), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(_watch(layer, name, momentum, observers))
        num_batches = data.send(model, "measuring channels")
    if not observers:
        raise DataError("no batch has reached a norm that pools channels")
    found = {name: stat_diff(o.moments, groups[name]) for name, o in observers.items()}
    every = torch.cat(list(found.values()))
    return ChannelDifference(
        layers=tuple(_row(name, values, observers[name]) for name, values in found.items()),
        mean=every.mean().item(),
        std=every.std(correction=0).item(),
        num_batches=num_batches,
    )


class _Observer:
    """Follows mean and variance of each channel of a layer's input."""

    def __init__(self, momentum: float | None) -> None:
        self._momentum = momentum
        self._all = Population()
        self._running: Moments | None = None

    def see(self, x: Tensor) -> None:
        batch = Population()
        batch.add(x)
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


def _watch(
    layer: nn.Module, name: str, momentum: float | None, observers: dict[str, _Observer]
) -> Any:  # noqa: ANN401 - how the watching ends
    def see(_layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = channels_first(layer, args[0] if args else next(iter(named.values())))
        if x.numel():
            observers.setdefault(name, _Observer(momentum)).see(x)

    return layer.register_forward_pre_hook(see, with_kwargs=True).remove


def pooling_groups(layer: nn.Module) -> int:
    """Groups of several channels that a norm pools; 0 for other modules."""
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
    """Whether this is torch's layer norm; torchvision's and timm's for maps say ``2d``."""
    return isinstance(layer, nn.LayerNorm) and "2d" not in type(layer).__name__


def stat_diff(moments: Moments, num_groups: int) -> Tensor:
    """StatDiff of each group, from the moments of each channel."""
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
