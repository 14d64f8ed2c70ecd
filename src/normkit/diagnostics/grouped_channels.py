"""Channels normalised together: what becomes of channels of different means and deviations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from normkit.core.moments import Moments
from normkit.diagnostics.channel_difference import stat_diff
from normkit.diagnostics.measurement import Measurement, new_figure
from normkit.errors import OptionError

SHOWN = 3.5
"""How many standard deviations of a channel its curve is drawn over."""
COLORS = ("#1b6ca8", "#c2410c", "#4d7c0f", "#7e22ce", "#0f766e", "#a16207")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedChannel:
    """One channel before and after its group is normalised.

    Args:
        name: Its place in the group.
        mean: Mean before.
        std: Standard deviation before.
        new_mean: Mean after.
        new_std: Standard deviation after.
        zero_share: Share of its values that a ReLU makes zero afterwards.
    """

    name: str
    mean: float
    std: float
    new_mean: float
    new_std: float
    zero_share: float


@dataclass(frozen=True, kw_only=True)
class GroupedChannels(Measurement):
    """A group of channels before and after it is normalised.

    Args:
        layers: The channels, in the given order.
        stat_diff: StatDiff of the group.
    """

    layers: tuple[GroupedChannel, ...]
    stat_diff: float

    drawn = ("zero_share",)

    @property
    def reading(self) -> str:
        """How different the channels are, and which a ReLU switches off most."""
        most = max(self.layers, key=lambda row: row.zero_share)
        loud = max(row.new_std for row in self.layers)
        return (
            f"StatDiff is {self.stat_diff:.3g}: after normalising them together a ReLU makes "
            f"{100 * most.zero_share:.3g} % of channel {most.name} zero, and the smallest channel "
            f"deviates by {min(row.new_std for row in self.layers) / loud:.3g} of the largest."
        )

    def plot(self) -> Any:
        """Draw the channels' densities before and after; what a ReLU makes zero is transparent.

        Raises:
            PackageError: If matplotlib is not installed.
        """
        figure = new_figure(figsize=(8, 3.2), layout="constrained")
        before, after = figure.subplots(1, 2)
        for row, color in zip(self.layers, COLORS * len(self.layers), strict=False):
            _draw(before, row.mean, row.std, color, f"channel {row.name}")
            _draw(after, row.new_mean, row.new_std, color, "", zeros=True)
        before.set_title("before", fontsize=9)
        after.set_title("after; transparent: zero after a ReLU", fontsize=9)
        before.legend(frameon=False, fontsize=8)
        figure.suptitle(self.reading, fontsize=8, wrap=True)
        return figure


def grouped_channels(
    means: Sequence[float] | Tensor, stds: Sequence[float] | Tensor
) -> GroupedChannels:
    r"""Work out what becomes of channels that are normalised together.

    Channels of means :math:`\mu_c` and standard deviations :math:`\sigma_c` with equally many
    values become, in a group,

    .. math::  \mu_c' = \frac{\mu_c - M}{\sqrt V}, \quad \sigma_c' = \frac{\sigma_c}{\sqrt V}, \quad
               M = \mathrm{mean}_c(\mu_c), \quad
               V = \mathrm{mean}_c \left( \sigma_c^2 + (\mu_c - M)^2 \right)

    and a ReLU makes the share :math:`\Phi(-\mu_c' / \sigma_c')` of a normally distributed channel
    zero. ``plot()`` draws the densities before and after.

    Args:
        means: Mean of each channel of a group, such as an observer's in ``channel_difference``.
        stds: Standard deviation of each, above 0.

    Returns:
        A row for each channel, and the group's StatDiff.

    Raises:
        OptionError: If there are not as many means as deviations, no channel, a number that is not
            finite, or a deviation that is not above 0.

    Numerics:
        Float64, with ``eps`` 0.

    Source:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, fig. 7 with eqs. 30 and 35.

    Example:
        >>> found = grouped_channels(means=(0.0, 4.0), stds=(1.0, 1.0))
        >>> found.stat_diff, round(found.layers[0].zero_share, 3)
        (2.0, 0.977)
    """
    mean, std = (torch.as_tensor(each).detach().double().cpu() for each in (means, stds))
    _require_channels(mean, std)
    spread = (std.square() + (mean - mean.mean()).square()).mean().sqrt()
    new_mean, new_std = (mean - mean.mean()) / spread, std / spread
    rows = zip(*(each.tolist() for each in (mean, std, new_mean, new_std)), strict=True)
    return GroupedChannels(
        layers=tuple(
            GroupedChannel(
                name=str(place),
                mean=m,
                std=s,
                new_mean=m1,
                new_std=s1,
                zero_share=NormalDist(m1, s1).cdf(0),
            )
            for place, (m, s, m1, s1) in enumerate(rows)
        ),
        stat_diff=stat_diff(Moments(mean, std.square()), 1).item(),
    )


def _require_channels(mean: Tensor, std: Tensor) -> None:
    if mean.shape != std.shape or mean.ndim != 1 or not mean.numel():
        raise OptionError(
            f"means of shape {tuple(mean.shape)} and stds of shape {tuple(std.shape)} were given; "
            f"both have one number for each channel of a group, and there is one channel at least"
        )
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise OptionError(
            f"means={mean.tolist()} and stds={std.tolist()} were given; all are finite, and "
            f"standard deviations are above 0"
        )


def _draw(
    axes: Any,
    mean: float,
    std: float,
    color: str,
    label: str,
    zeros: bool = False,
) -> None:
    """One channel's normal density; its part below 0 is transparent with ``zeros``."""
    places = torch.linspace(mean - SHOWN * std, mean + SHOWN * std, 201).double()
    heights = torch.exp(-((places - mean) / std).square() / 2) / (std * math.sqrt(2 * math.pi))
    x, y = places.tolist(), heights.tolist()
    off = (places <= 0).tolist() if zeros else [False] * len(x)
    axes.fill_between(x, y, where=[not each for each in off], color=color, alpha=0.6, label=label)
    axes.fill_between(x, y, where=off, color=color, alpha=0.12, linewidth=0)
