"""Functions without state for norms whose groups lie within an example."""

from __future__ import annotations

from typing import Unpack

from normkit.core.check import require_channel_groups
from normkit.core.partition import Partition
from normkit.functional.arguments import Call, Options, with_named_options
from normkit.functional.checked import normalize_positional, normalize_single
from normkit.typing import FeatureMap, PerChannel


@with_named_options
def instance_norm(
    x: FeatureMap,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    **options: Unpack[Options],
) -> FeatureMap:
    r"""Normalise every channel of every example; see :class:`normkit.InstanceNorm`.

    .. math::  y = \gamma_c (x - \mu_{nc}) / \sqrt{\sigma_{nc}^2 + \epsilon} + \beta_c

    Args:
        x: Feature map, ``(N, C, *S)``.
        weight: Scale of each channel, ``(C,)``; None is 1.
        bias: Shift of each channel, ``(C,)``; None is 0.
        options: Those of :class:`normkit.functional.Options`.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        PartitionError: If a channel of an example has a single value.
        OptionError: If an option is out of range, or the activation is unknown.
        InputError: If shapes do not match.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.

    Source:
        Ulyanov, Vedaldi & Lempitsky 2016, arXiv:1607.08022.

    Example:
        >>> import torch
        >>> instance_norm(torch.randn(4, 6, 5, 7)).shape
        torch.Size([4, 6, 5, 7])
    """
    call = Call.of("instance_norm", x, options)
    parameters = call.parameters(weight, bias)
    groups = Partition(num_groups=x.shape[1], examples_per_group=1)
    return normalize_single(x, groups, None, parameters, True, call.name, ending=call.ending())


@with_named_options
def layer_norm(
    x: FeatureMap,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    **options: Unpack[Options],
) -> FeatureMap:
    r"""Normalise every example over channels and positions; see :class:`normkit.LayerNorm`.

    .. math::  y = \gamma_c (x - \mu_{n}) / \sqrt{\sigma_{n}^2 + \epsilon} + \beta_c

    Args:
        x: Feature map, ``(N, C, *S)``.
        weight: Scale of each channel, ``(C,)``; None is 1.
        bias: Shift of each channel, ``(C,)``; None is 0.
        options: Those of :class:`normkit.functional.Options`.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        PartitionError: If an example has a single value.
        OptionError: If an option is out of range, or the activation is unknown.
        InputError: If shapes do not match.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.

    Source:
        Ba, Kiros & Hinton 2016, arXiv:1607.06450.

    Example:
        >>> import torch
        >>> layer_norm(torch.randn(4, 6, 5, 7)).shape
        torch.Size([4, 6, 5, 7])
    """
    call = Call.of("layer_norm", x, options)
    parameters = call.parameters(weight, bias)
    groups = Partition(num_groups=1, examples_per_group=1)
    return normalize_single(x, groups, None, parameters, True, call.name, ending=call.ending())


@with_named_options
def group_norm(
    x: FeatureMap,
    num_groups: int,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    **options: Unpack[Options],
) -> FeatureMap:
    r"""Normalise runs of channels of every example; see :class:`normkit.GroupNorm`.

    .. math::  y = \gamma_c (x - \mu_{ng}) / \sqrt{\sigma_{ng}^2 + \epsilon} + \beta_c

    Args:
        x: Feature map, ``(N, C, *S)``.
        num_groups: Number of runs of channels; divides ``C``.
        weight: Scale of each channel, ``(C,)``; None is 1.
        bias: Shift of each channel, ``(C,)``; None is 0.
        options: Those of :class:`normkit.functional.Options`.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        PartitionError: If the groups do not divide the channels, or one has a single value.
        OptionError: If an option is out of range, or the activation is unknown.
        InputError: If shapes do not match.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.

    Source:
        Wu & He 2018, arXiv:1803.08494, eq. 7.

    Example:
        >>> import torch
        >>> group_norm(torch.randn(4, 6, 5, 7), 3).shape
        torch.Size([4, 6, 5, 7])
    """
    call = Call.of("group_norm", x, options)
    parameters = call.parameters(weight, bias)
    num_groups = require_channel_groups(num_groups, x.shape[1])
    groups = Partition(num_groups=num_groups, examples_per_group=1)
    return normalize_single(x, groups, None, parameters, True, call.name, ending=call.ending())


@with_named_options
def positional_norm(
    x: FeatureMap,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    **options: Unpack[Options],
) -> FeatureMap:
    r"""Normalise every position over its channels; see :class:`normkit.PositionalNorm`.

    .. math::  y = \gamma_c (x - \mu_{ns}) / \sqrt{\sigma_{ns}^2 + \epsilon} + \beta_c

    Args:
        x: Feature map, ``(N, C, *S)``.
        weight: Scale of each channel, ``(C,)``; None is 1.
        bias: Shift of each channel, ``(C,)``; None is 0.
        options: Those of :class:`normkit.functional.Options`.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        PartitionError: If there is a single channel.
        OptionError: If an option is out of range, or the activation is unknown.
        InputError: If shapes do not match.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.

    Source:
        Li et al. 2019, arXiv:1907.04312, without its re-injection path.

    Example:
        >>> import torch
        >>> positional_norm(torch.randn(4, 6, 5, 7)).shape
        torch.Size([4, 6, 5, 7])
    """
    call = Call.of("positional_norm", x, options)
    parameters = call.parameters(weight, bias)
    return normalize_positional(x, parameters, True, call.name, ending=call.ending())
