"""Functions without state for norms whose groups span several examples."""

from __future__ import annotations

from torch import Tensor

from normkit.core.check import require_channel_groups, require_count
from normkit.core.ending import read_ending
from normkit.core.partition import Partition
from normkit.functional.arguments import read_parameters, read_statistics
from normkit.functional.checked import normalize_single
from normkit.kernels.activations import ActivationName
from normkit.typing import FeatureMap, PerChannel


def batch_norm(  # noqa: PLR0913 - torch's options
    x: FeatureMap,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    example_weight: float = 0.0,
    activation: ActivationName | None = None,
    negative_slope: float = 0.01,
    residual: FeatureMap | None = None,
) -> FeatureMap:
    r"""Normalise every channel over the whole batch; see :class:`normkit.BatchNorm`.

    .. math::  y = \gamma_c (x - \mu_c) / \sqrt{\sigma_c^2 + \epsilon} + \beta_c

    Args:
        x: Feature map, ``(N, C, *S)``.
        running_mean: Running mean, ``(C,)``.
        running_var: Running unbiased variance, ``(C,)``.
        weight: Scale of each channel, ``(C,)``; None is 1.
        bias: Shift of each channel, ``(C,)``; None is 0.
        training: Normalise by the input's own statistics and update the running ones.
        momentum: Weight of the new value in the running statistics.
        eps: Added to the variance; unit of ``x`` squared.
        example_weight: Share of the example's own statistics at evaluation, from 0 to 1.
        activation: Activation that is applied last; ``normkit.layers.options`` lists them.
        negative_slope: Slope of ``"leaky_relu"`` below 0.
        residual: Added before the activation; it has the shape, dtype and device of ``x``.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        OptionError: If an option is out of range, or the activation is unknown.
        InputError: If shapes do not match, or evaluation has no running statistics.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.
        PartitionError: If a channel has a single value in training.

    Source:
        Ioffe & Szegedy 2015, arXiv:1502.03167.

    Example:
        >>> import torch
        >>> batch_norm(torch.randn(4, 6, 5, 7), training=True).shape
        torch.Size([4, 6, 5, 7])
    """
    name = "batch_norm"
    parameters = read_parameters(x, weight, bias, eps, name)
    given, needed_by = (running_mean, running_var), None if training else name
    running = read_statistics(given, x.shape[1], momentum, example_weight, needed_by)
    groups = Partition(num_groups=x.shape[1])
    ending = read_ending(x, activation, negative_slope, residual, name)
    return normalize_single(x, groups, running, parameters, training, name, ending=ending)


def batch_group_norm(  # noqa: PLR0913
    x: FeatureMap,
    num_groups: int,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    example_weight: float = 0.0,
    activation: ActivationName | None = None,
    negative_slope: float = 0.01,
    residual: FeatureMap | None = None,
) -> FeatureMap:
    r"""Normalise runs of the flattened ``(C, *S)`` axis; see :class:`normkit.BatchGroupNorm`.

    .. math::  y = \gamma_c (x - \mu_g) / \sqrt{\sigma_g^2 + \epsilon} + \beta_c

    Args:
        x: Feature map, ``(N, C, *S)``.
        num_groups: Number ``G`` of equal runs of an example; divides ``C`` times the positions.
        running_mean: Running mean, ``(G,)``.
        running_var: Running unbiased variance, ``(G,)``.
        weight: Scale of each channel, ``(C,)``; None is 1.
        bias: Shift of each channel, ``(C,)``; None is 0.
        training: Normalise by the input's own statistics and update the running ones.
        momentum: Weight of the new value in the running statistics.
        eps: Added to the variance; unit of ``x`` squared.
        example_weight: Share of the example's own statistics at evaluation, from 0 to 1.
        activation: Activation that is applied last; ``normkit.layers.options`` lists them.
        negative_slope: Slope of ``"leaky_relu"`` below 0.
        residual: Added before the activation; it has the shape, dtype and device of ``x``.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        OptionError: If an option is out of range, or the activation is unknown.
        InputError: If shapes do not match, or evaluation has no running statistics.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.
        PartitionError: If the groups do not divide, or one has a single value in training.

    Source:
        Zhou et al., Batch Group Normalization, eqs. 8-9.

    Example:
        >>> import torch
        >>> batch_group_norm(torch.randn(4, 6, 5, 7), 14, training=True).shape
        torch.Size([4, 6, 5, 7])
    """
    name = "batch_group_norm"
    parameters = read_parameters(x, weight, bias, eps, name)
    num_groups = require_count("num_groups", num_groups)
    given, needed_by = (running_mean, running_var), None if training else name
    running = read_statistics(given, num_groups, momentum, example_weight, needed_by)
    groups = Partition(num_groups=num_groups)
    ending = read_ending(x, activation, negative_slope, residual, name)
    return normalize_single(x, groups, running, parameters, training, name, ending=ending)


def ghost_batch_norm(  # noqa: PLR0913
    x: FeatureMap,
    ghost_batch_size: int,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    example_weight: float = 0.0,
    activation: ActivationName | None = None,
    negative_slope: float = 0.01,
    residual: FeatureMap | None = None,
) -> FeatureMap:
    r"""Normalise every channel over runs of examples; see :class:`normkit.GhostBatchNorm`.

    .. math::  y = \gamma_c (x - \mu_{bc}) / \sqrt{\sigma_{bc}^2 + \epsilon} + \beta_c

    Args:
        x: Feature map, ``(N, C, *S)``.
        ghost_batch_size: Consecutive examples that share statistics; the last run may be smaller.
        running_mean: Running mean, ``(C,)``.
        running_var: Running unbiased variance, ``(C,)``.
        weight: Scale of each channel, ``(C,)``; None is 1.
        bias: Shift of each channel, ``(C,)``; None is 0.
        training: Normalise by the input's own statistics and update the running ones.
        momentum: Weight of the new value in the running statistics.
        eps: Added to the variance; unit of ``x`` squared.
        example_weight: Share of the example's own statistics at evaluation, from 0 to 1.
        activation: Activation that is applied last; ``normkit.layers.options`` lists them.
        negative_slope: Slope of ``"leaky_relu"`` below 0.
        residual: Added before the activation; it has the shape, dtype and device of ``x``.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        OptionError: If an option is out of range, or the activation is unknown.
        InputError: If shapes do not match, or evaluation has no running statistics.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.
        PartitionError: If a group has a single value in training.

    Source:
        Summers & Dinneen, Four Things Everyone Should Know to Improve Batch Normalization, eq. 4.

    Example:
        >>> import torch
        >>> ghost_batch_norm(torch.randn(4, 6, 5, 7), 2, training=True).shape
        torch.Size([4, 6, 5, 7])
    """
    name = "ghost_batch_norm"
    parameters = read_parameters(x, weight, bias, eps, name)
    size = require_count("ghost_batch_size", ghost_batch_size)
    given, needed_by = (running_mean, running_var), None if training else name
    running = read_statistics(given, x.shape[1], momentum, example_weight, needed_by)
    groups = Partition(num_groups=x.shape[1], examples_per_group=size)
    ending = read_ending(x, activation, negative_slope, residual, name)
    return normalize_single(x, groups, running, parameters, training, name, ending=ending)


def general_batch_group_norm(  # noqa: PLR0913 - torch's order
    x: FeatureMap,
    num_groups: int,
    examples_per_group: int | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    example_weight: float = 0.0,
    activation: ActivationName | None = None,
    negative_slope: float = 0.01,
    residual: FeatureMap | None = None,
) -> FeatureMap:
    r"""Normalise runs of channels over runs of examples.

    .. math::  y = \gamma_c (x - \mu_{bg}) / \sqrt{\sigma_{bg}^2 + \epsilon} + \beta_c

    See :class:`normkit.GeneralBatchGroupNorm`.

    Args:
        x: Feature map, ``(N, C, *S)``.
        num_groups: Number of runs of channels; divides ``C``.
        examples_per_group: Consecutive examples that share statistics; None is the whole batch.
        running_mean: Running mean, ``(C,)``.
        running_var: Running unbiased variance, ``(C,)``.
        weight: Scale of each channel, ``(C,)``; None is 1.
        bias: Shift of each channel, ``(C,)``; None is 0.
        training: Normalise by the input's own statistics and update the running ones.
        momentum: Weight of the new value in the running statistics.
        eps: Added to the variance; unit of ``x`` squared.
        example_weight: Share of the example's own statistics at evaluation, from 0 to 1.
        activation: Activation that is applied last; ``normkit.layers.options`` lists them.
        negative_slope: Slope of ``"leaky_relu"`` below 0.
        residual: Added before the activation; it has the shape, dtype and device of ``x``.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        OptionError: If an option is out of range, or the activation is unknown.
        InputError: If shapes do not match, or evaluation has no running statistics.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.
        PartitionError: If the groups do not divide, or one has a single value in training.

    Source:
        Summers & Dinneen, Four Things Everyone Should Know to Improve Batch Normalization, 3.4.

    Example:
        >>> import torch
        >>> general_batch_group_norm(torch.randn(4, 6, 5, 7), 3, 2, training=True).shape
        torch.Size([4, 6, 5, 7])
    """
    name, size = "general_batch_group_norm", examples_per_group
    parameters = read_parameters(x, weight, bias, eps, name)
    num_groups = require_channel_groups(num_groups, x.shape[1])
    if size is not None:
        size = require_count("examples_per_group", size)
    given, needed_by = (running_mean, running_var), None if training else name
    running = read_statistics(given, x.shape[1], momentum, example_weight, needed_by)
    groups = Partition(num_groups=num_groups, examples_per_group=size)
    ending = read_ending(x, activation, negative_slope, residual, name)
    return normalize_single(x, groups, running, parameters, training, name, ending=ending)
