"""Functions without state for norms whose groups lie within an example."""

from __future__ import annotations

from normkit.core.check import require_channel_groups
from normkit.core.ending import read_ending
from normkit.core.partition import Partition
from normkit.functional.arguments import read_parameters
from normkit.functional.checked import normalize_positional, normalize_single
from normkit.kernels.activations import ActivationName
from normkit.typing import FeatureMap, PerChannel


def instance_norm(  # noqa: PLR0913 - torch's options
    x: FeatureMap,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    *,
    eps: float = 1e-5,
    activation: ActivationName | None = None,
    negative_slope: float = 0.01,
    residual: FeatureMap | None = None,
) -> FeatureMap:
    r"""Normalise every channel of every example; see :class:`normkit.InstanceNorm`.

    .. math::  y = \gamma_c (x - \mu_{nc}) / \sqrt{\sigma_{nc}^2 + \epsilon} + \beta_c

    Args:
        x: Feature map, ``(N, C, *S)``.
        weight: Scale of each channel, ``(C,)``; None is 1.
        bias: Shift of each channel, ``(C,)``; None is 0.
        eps: Added to the variance; unit of ``x`` squared.
        activation: Activation that is applied last; ``normkit.layers.options`` lists them.
        negative_slope: Slope of ``"leaky_relu"`` below 0.
        residual: Added before the activation; it has the shape, dtype and device of ``x``.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        OptionError: If an option is out of range, or the activation is unknown.
        InputError: If shapes do not match.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.
        PartitionError: If a channel of an example has a single value.

    Source:
        Ulyanov, Vedaldi & Lempitsky 2016, arXiv:1607.08022.

    Example:
        >>> import torch
        >>> instance_norm(torch.randn(4, 6, 5, 7)).shape
        torch.Size([4, 6, 5, 7])
    """
    parameters = read_parameters(x, weight, bias, eps, "instance_norm")
    groups = Partition(num_groups=x.shape[1], examples_per_group=1)
    ending = read_ending(x, activation, negative_slope, residual, "instance_norm")
    return normalize_single(x, groups, None, parameters, True, "instance_norm", ending=ending)


def layer_norm(  # noqa: PLR0913 - torch's options
    x: FeatureMap,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    *,
    eps: float = 1e-5,
    activation: ActivationName | None = None,
    negative_slope: float = 0.01,
    residual: FeatureMap | None = None,
) -> FeatureMap:
    r"""Normalise every example over channels and positions; see :class:`normkit.LayerNorm`.

    .. math::  y = \gamma_c (x - \mu_{n}) / \sqrt{\sigma_{n}^2 + \epsilon} + \beta_c

    Args:
        x: Feature map, ``(N, C, *S)``.
        weight: Scale of each channel, ``(C,)``; None is 1.
        bias: Shift of each channel, ``(C,)``; None is 0.
        eps: Added to the variance; unit of ``x`` squared.
        activation: Activation that is applied last; ``normkit.layers.options`` lists them.
        negative_slope: Slope of ``"leaky_relu"`` below 0.
        residual: Added before the activation; it has the shape, dtype and device of ``x``.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        OptionError: If an option is out of range, or the activation is unknown.
        InputError: If shapes do not match.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.
        PartitionError: If an example has a single value.

    Source:
        Ba, Kiros & Hinton 2016, arXiv:1607.06450.

    Example:
        >>> import torch
        >>> layer_norm(torch.randn(4, 6, 5, 7)).shape
        torch.Size([4, 6, 5, 7])
    """
    parameters = read_parameters(x, weight, bias, eps, "layer_norm")
    groups = Partition(num_groups=1, examples_per_group=1)
    ending = read_ending(x, activation, negative_slope, residual, "layer_norm")
    return normalize_single(x, groups, None, parameters, True, "layer_norm", ending=ending)


def group_norm(  # noqa: PLR0913 - torch's options
    x: FeatureMap,
    num_groups: int,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    *,
    eps: float = 1e-5,
    activation: ActivationName | None = None,
    negative_slope: float = 0.01,
    residual: FeatureMap | None = None,
) -> FeatureMap:
    r"""Normalise runs of channels of every example; see :class:`normkit.GroupNorm`.

    .. math::  y = \gamma_c (x - \mu_{ng}) / \sqrt{\sigma_{ng}^2 + \epsilon} + \beta_c

    Args:
        x: Feature map, ``(N, C, *S)``.
        num_groups: Number of runs of channels; divides ``C``.
        weight: Scale of each channel, ``(C,)``; None is 1.
        bias: Shift of each channel, ``(C,)``; None is 0.
        eps: Added to the variance; unit of ``x`` squared.
        activation: Activation that is applied last; ``normkit.layers.options`` lists them.
        negative_slope: Slope of ``"leaky_relu"`` below 0.
        residual: Added before the activation; it has the shape, dtype and device of ``x``.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        OptionError: If an option is out of range, or the activation is unknown.
        InputError: If shapes do not match.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.
        PartitionError: If the groups do not divide the channels, or one has a single value.

    Source:
        Wu & He 2018, arXiv:1803.08494, eq. 7.

    Example:
        >>> import torch
        >>> group_norm(torch.randn(4, 6, 5, 7), 3).shape
        torch.Size([4, 6, 5, 7])
    """
    parameters = read_parameters(x, weight, bias, eps, "group_norm")
    num_groups = require_channel_groups(num_groups, x.shape[1])
    groups = Partition(num_groups=num_groups, examples_per_group=1)
    ending = read_ending(x, activation, negative_slope, residual, "group_norm")
    return normalize_single(x, groups, None, parameters, True, "group_norm", ending=ending)


def positional_norm(  # noqa: PLR0913 - torch's options
    x: FeatureMap,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    *,
    eps: float = 1e-5,
    activation: ActivationName | None = None,
    negative_slope: float = 0.01,
    residual: FeatureMap | None = None,
) -> FeatureMap:
    r"""Normalise every position over its channels; see :class:`normkit.PositionalNorm`.

    .. math::  y = \gamma_c (x - \mu_{ns}) / \sqrt{\sigma_{ns}^2 + \epsilon} + \beta_c

    Args:
        x: Feature map, ``(N, C, *S)``.
        weight: Scale of each channel, ``(C,)``; None is 1.
        bias: Shift of each channel, ``(C,)``; None is 0.
        eps: Added to the variance; unit of ``x`` squared.
        activation: Activation that is applied last; ``normkit.layers.options`` lists them.
        negative_slope: Slope of ``"leaky_relu"`` below 0.
        residual: Added before the activation; it has the shape, dtype and device of ``x``.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        OptionError: If an option is out of range, or the activation is unknown.
        InputError: If shapes do not match.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.
        PartitionError: If there is a single channel.

    Source:
        Li et al. 2019, arXiv:1907.04312, without its re-injection path.

    Example:
        >>> import torch
        >>> positional_norm(torch.randn(4, 6, 5, 7)).shape
        torch.Size([4, 6, 5, 7])
    """
    parameters = read_parameters(x, weight, bias, eps, "positional_norm")
    ending = read_ending(x, activation, negative_slope, residual, "positional_norm")
    return normalize_positional(x, parameters, True, "positional_norm", ending=ending)
