"""Checks of arguments that the functions without state share."""

from __future__ import annotations

from torch import Tensor

from normkit.core.check import (
    require_eps,
    require_feature_map,
    require_per_channel,
    require_share,
)
from normkit.core.parameters import Parameters
from normkit.core.running import RunningStatistics
from normkit.errors import InputError
from normkit.typing import FeatureMap, PerChannel


def read_parameters(
    x: FeatureMap, weight: PerChannel | None, bias: PerChannel | None, eps: float, name: str
) -> Parameters:
    """Check a feature map and its parameters, and return the parameters together.

    Raises:
        InputError: If shapes do not match.
        InputTypeError: If the dtype is not supported.
        OptionError: If ``eps`` is negative or not finite.
    """
    require_feature_map(x, None, name)
    require_eps(eps)
    require_per_channel(weight, x.shape, "weight", name)
    require_per_channel(bias, x.shape, "bias", name)
    return Parameters(weight, bias, eps)


def require_values(values: Tensor | None, shape: tuple[int, ...], what: str, name: str) -> None:
    """Refuse a parameter of another shape.

    Raises:
        InputError: If the shapes differ.
    """
    if values is not None and tuple(values.shape) != shape:
        raise InputError(
            f"{name} was given {what} of shape {tuple(values.shape)}; it takes shape {shape}"
        )


def read_statistics(
    given: tuple[Tensor | None, Tensor | None],
    num_values: int,
    momentum: float,
    example_weight: float,
    needed_by: str | None,
) -> RunningStatistics | None:
    """Put running mean and variance together with their options; None if neither was given.

    Args:
        given: Running mean and running variance.
        num_values: Number of values that each must have.
        momentum: Weight of the new value.
        example_weight: Share of the example's own statistics at evaluation.
        needed_by: Name of the function if it needs running statistics in this call, else None.

    Raises:
        InputError: If the shapes do not fit, or statistics are needed and were not given.
        OptionError: If an option does not lie from 0 to 1.
    """
    require_share("momentum", momentum)
    require_share("example_weight", example_weight)
    mean, var = given
    if mean is None and var is None:
        if needed_by is None:
            return None
        raise InputError(
            f"{needed_by} was called with training=False and without running statistics; pass "
            f"running_mean= and running_var=, or training=True to use the input's own"
        )
    expected = (num_values,)
    if mean is None or var is None or mean.shape != expected or var.shape != expected:
        shapes = [None if t is None else tuple(t.shape) for t in given]
        raise InputError(
            f"running_mean and running_var were given with shapes {shapes[0]} and {shapes[1]}; "
            f"pass both, of shape {expected}, or neither"
        )
    return RunningStatistics(mean, var, None, momentum, example_weight)
