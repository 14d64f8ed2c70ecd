"""What every function asks of its arguments before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.core.check import (
    require_channel_groups,
    require_eps,
    require_feature_map,
    require_per_channel,
    require_share,
)
from normkit.core.parameters import Parameters
from normkit.core.partition import Partition
from normkit.core.running import RunningStatistics
from normkit.errors import InputError
from normkit.typing import FeatureMap


def require_arguments(x: FeatureMap, parameters: Parameters, name: str) -> None:
    """Refuse what is no feature map, or parameters that do not fit it."""
    weight, bias, eps = parameters
    require_eps(eps)
    require_feature_map(x, None, name)
    require_per_channel(weight, x.shape, "weight", name)
    require_per_channel(bias, x.shape, "bias", name)


def require_values(values: Tensor | None, shape: tuple[int, ...], what: str, name: str) -> None:
    """Refuse a parameter of another shape.

    Raises:
        InputError: With both shapes.
    """
    if values is not None and tuple(values.shape) != shape:
        raise InputError(
            f"{name} was given {what} of shape {tuple(values.shape)}; it takes shape {shape}"
        )


def channels_of(x: FeatureMap, name: str) -> int:
    """Channels of what is a feature map."""
    require_feature_map(x, None, name)
    return x.shape[1]


def channel_groups(num_groups: int, x: FeatureMap) -> int:
    """Number of runs that do divide the channels."""
    return require_channel_groups(num_groups, x.shape[1])


def require_statistics(running: RunningStatistics | None, name: str) -> RunningStatistics:
    """Refuse an evaluation without running statistics.

    Raises:
        InputError: With the way out.
    """
    if running is None:
        raise InputError(
            f"{name} was called with training=False and without running statistics; pass "
            f"running_mean= and running_var=, or training=True to use the input's own"
        )
    return running


def pair_buffers(
    mean: Tensor | None,
    var: Tensor | None,
    groups: Partition,
    momentum: float,
    example_weight: float,
) -> RunningStatistics | None:
    """Pair the buffers, or None when there are none."""
    require_share("momentum", momentum)
    require_share("example_weight", example_weight)
    if mean is None and var is None:
        return None
    expected = (groups.num_groups,)
    if mean is None or var is None or mean.shape != expected or var.shape != expected:
        given = [None if t is None else tuple(t.shape) for t in (mean, var)]
        raise InputError(
            f"running_mean and running_var were given with shapes {given[0]} and {given[1]}; "
            f"pass both, of shape {expected}, or neither"
        )
    count = torch.zeros((), dtype=torch.long, device=mean.device)
    return RunningStatistics(
        mean=mean,
        var=var,
        num_batches_tracked=count,
        partition=groups,
        momentum=momentum,
        example_weight=example_weight,
    )
