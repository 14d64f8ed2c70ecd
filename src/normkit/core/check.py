"""Checks of feature maps and options, made before anything is computed."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

from normkit.core.partition import require_divides
from normkit.errors import ArgumentError, InputError, InputTypeError, OptionError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def require_feature_map(x: Tensor, num_features: int | None, name: str) -> None:
    """Refuse anything but a floating-point map ``(N, C, *S)`` with the right number of channels.

    Raises:
        InputTypeError: If the dtype is not one of float32, float64, bfloat16, float16.
        InputError: If there are fewer than two axes, or the channels do not match.
    """
    if not isinstance(x, Tensor):
        raise InputTypeError(f"{name} was given a {type(x).__name__}; it takes a torch.Tensor")
    if x.layout != torch.strided:
        raise InputTypeError(
            f"{name} was given a tensor of layout {x.layout}; it takes dense ones: x.to_dense()"
        )
    if x.dtype not in DTYPES:
        way_out = (
            "normalise its parts as channels, e.g. torch.cat((x.real, x.imag), dim=1)"
            if x.is_complex()
            else "convert it first, e.g. x.float()"
        )
        raise InputTypeError(
            f"{name} was given a tensor of {x.dtype}; it takes "
            f"{', '.join(str(d) for d in DTYPES)}; {way_out}"
        )
    if x.ndim < 2:
        raise InputError(
            f"{name} was given a tensor of shape {tuple(x.shape)}; it takes (N, C, *S) with at "
            f"least two axes; add the batch axis, e.g. x.unsqueeze(0)"
        )
    if num_features is not None and x.shape[1] != num_features:
        raise InputError(
            f"{name} was built for num_features={num_features} channels and was given "
            f"{x.shape[1]} in a tensor of shape {tuple(x.shape)}; channels are axis 1: build it "
            f"with num_features={x.shape[1]}, or permute a channels-last array first"
        )


def require_per_channel(values: Tensor | None, shape: Sequence[int], what: str, name: str) -> None:
    """Refuse a parameter that does not have one value for each channel.

    Raises:
        InputError: If the shape is not ``(C,)``.
    """
    if values is not None and tuple(values.shape) != (shape[1],):
        raise InputError(
            f"{name} was given {what} of shape {tuple(values.shape)} for {shape[1]} channels; "
            f"it takes one value per channel, shape ({shape[1]},)"
        )


def require_count(name: str, value: int) -> int:
    """Refuse anything but an integer of at least 1; return it as an ``int``.

    Raises:
        OptionError: If it is not an integer or is below 1.
    """
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise OptionError(
            f"{name}={value!r} was given; it counts something, so it is a whole number, at least 1"
        )
    return count


def require_channel_groups(num_groups: int, num_features: int) -> int:
    """Refuse groups that do not cut the channels into equal runs; return their number.

    Raises:
        OptionError: If either number is not an integer of at least 1.
        PartitionError: If the groups do not divide the channels; the message lists the divisors.
    """
    num_features = require_count("num_features", num_features)
    num_groups = require_count("num_groups", num_groups)
    require_divides(num_groups, num_features, f"the channel axis has length {num_features}")
    return num_groups


def require_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse a value that is not one of the known ones.

    Raises:
        OptionError: If it is unknown; the message lists the known values.
    """
    if value not in known:
        raise OptionError(f"{name}={value!r} was given; it is one of: {', '.join(known)}")


def require_known(name: str, given: Iterable[str], known: Collection[str]) -> None:
    """Refuse an option that a layer or function does not take.

    Args:
        name: Of the layer or function.
        given: Names of the options of the call.
        known: Names of all its options.

    Raises:
        ArgumentError: With the options that there are, and the one that was probably meant.
    """
    unknown = [option for option in given if option not in known]
    if unknown:
        from difflib import get_close_matches  # slow import

        known = list(known)
        close = get_close_matches(unknown[0], known, n=1)
        raise ArgumentError(
            f"{name} was given {unknown[0]}=, which is none of its options: {', '.join(known)}"
            f"{f'; did you mean {close[0]}?' if close else ''}"
        )


def require_eps(eps: float) -> None:
    """Refuse an ``eps`` that cannot be added to a variance.

    Raises:
        OptionError: If it is negative or not finite.
    """
    if not isinstance(eps, Real) or not 0 <= eps < math.inf:
        raise OptionError(f"eps={eps!r} was given; it is added under a root, so finite and >= 0")


def require_share(name: str, value: float) -> None:
    """Refuse a value that does not lie from 0 to 1.

    Raises:
        OptionError: If it does not lie from 0 to 1.
    """
    if not isinstance(value, Real) or not 0 <= value <= 1:
        raise OptionError(f"{name}={value!r} was given; it is a share, so it lies from 0 to 1")


def require_update_rate(value: float | None) -> float:
    """Refuse an update rate with which estimates would stay unchanged or overshoot the batch.

    Raises:
        OptionError: If it does not lie in (0, 1].
    """
    if not isinstance(value, Real) or not 0 < value <= 1:
        raise OptionError(
            f"update_rate={value!r} was given; it lies in (0, 1]: at 0 the estimates would never "
            f"move (start a warm-up of the learning rate above 0)"
        )
    return value
