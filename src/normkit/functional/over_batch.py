"""Functions without state for norms whose groups span several examples."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from normkit.core.check import require_channel_groups, require_count
from normkit.core.parameters import Parameters
from normkit.core.partition import Partition
from normkit.functional.arguments import Call, StatisticsOptions, with_named_options
from normkit.functional.checked import normalize_single
from normkit.typing import FeatureMap, PerChannel


@with_named_options
def batch_norm(
    x: FeatureMap,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    **options: Unpack[StatisticsOptions],
) -> FeatureMap:
    r"""Normalise every channel over the whole batch; see :class:`normkit.BatchNorm`.

    .. math::  y = \gamma_c (x - \mu_c) / \sqrt{\sigma_c^2 + \epsilon} + \beta_c

    Args:
        x: Feature map, ``(N, C, *S)``.
        running_mean: Running mean, ``(C,)``.
        running_var: Running unbiased variance, ``(C,)``.
        weight: Scale of each channel, ``(C,)``; None is 1.
        bias: Shift of each channel, ``(C,)``; None is 0.
        options: Those of :class:`normkit.functional.StatisticsOptions`.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        PartitionError: If a channel has a single value in training.
        OptionError: If an option is out of range, or the activation is unknown.
        InputError: If shapes do not match, or evaluation has no running statistics.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.

    Source:
        Ioffe & Szegedy 2015, arXiv:1502.03167.

    Example:
        >>> import torch
        >>> batch_norm(torch.randn(4, 6, 5, 7), training=True).shape
        torch.Size([4, 6, 5, 7])
    """
    call = Call.with_statistics("batch_norm", x, options)
    parameters = call.parameters(weight, bias)
    given = (running_mean, running_var, x.shape[1])
    return _normalized(call, Partition(num_groups=x.shape[1]), given, parameters)


@with_named_options
def batch_group_norm(
    x: FeatureMap,
    num_groups: int,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    **options: Unpack[StatisticsOptions],
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
        options: Those of :class:`normkit.functional.StatisticsOptions`.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        PartitionError: If the groups do not divide, or one has a single value in training.
        OptionError: If an option is out of range, or the activation is unknown.
        InputError: If shapes do not match, or evaluation has no running statistics.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.

    Source:
        Zhou et al., Batch Group Normalization, eqs. 8-9.

    Example:
        >>> import torch
        >>> batch_group_norm(torch.randn(4, 6, 5, 7), 14, training=True).shape
        torch.Size([4, 6, 5, 7])
    """
    call = Call.with_statistics("batch_group_norm", x, options)
    parameters = call.parameters(weight, bias)
    num_groups = require_count("num_groups", num_groups)
    given = (running_mean, running_var, num_groups)
    return _normalized(call, Partition(num_groups=num_groups), given, parameters)


@with_named_options
def ghost_batch_norm(
    x: FeatureMap,
    ghost_batch_size: int,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    **options: Unpack[StatisticsOptions],
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
        options: Those of :class:`normkit.functional.StatisticsOptions`.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        PartitionError: If a group has a single value in training.
        OptionError: If an option is out of range, or the activation is unknown.
        InputError: If shapes do not match, or evaluation has no running statistics.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.

    Source:
        Summers & Dinneen, Four Things Everyone Should Know to Improve Batch Normalization, eq. 4.

    Example:
        >>> import torch
        >>> ghost_batch_norm(torch.randn(4, 6, 5, 7), 2, training=True).shape
        torch.Size([4, 6, 5, 7])
    """
    call = Call.with_statistics("ghost_batch_norm", x, options)
    parameters = call.parameters(weight, bias)
    size = require_count("ghost_batch_size", ghost_batch_size)
    given = (running_mean, running_var, x.shape[1])
    return _normalized(
        call, Partition(num_groups=x.shape[1], examples_per_group=size), given, parameters
    )


@with_named_options
def general_batch_group_norm(  # noqa: PLR0913 - torch's order
    x: FeatureMap,
    num_groups: int,
    examples_per_group: int | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    **options: Unpack[StatisticsOptions],
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
        options: Those of :class:`normkit.functional.StatisticsOptions`.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        PartitionError: If the groups do not divide, or one has a single value in training.
        OptionError: If an option is out of range, or the activation is unknown.
        InputError: If shapes do not match, or evaluation has no running statistics.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.

    Source:
        Summers & Dinneen, Four Things Everyone Should Know to Improve Batch Normalization, 3.4.

    Example:
        >>> import torch
        >>> general_batch_group_norm(torch.randn(4, 6, 5, 7), 3, 2, training=True).shape
        torch.Size([4, 6, 5, 7])
    """
    call, size = Call.with_statistics("general_batch_group_norm", x, options), examples_per_group
    parameters = call.parameters(weight, bias)
    num_groups = require_channel_groups(num_groups, x.shape[1])
    if size is not None:
        size = require_count("examples_per_group", size)
    given = (running_mean, running_var, x.shape[1])
    return _normalized(
        call, Partition(num_groups=num_groups, examples_per_group=size), given, parameters
    )


def _normalized(
    call: Call,
    partition: Partition,
    given: tuple[Tensor | None, Tensor | None, int],
    parameters: Parameters,
) -> FeatureMap:
    """Normalise by groups over several examples; ``given`` is running statistics and their size."""
    running = call.statistics(*given, is_needed=not call.training)
    training, ending = call.training, call.ending()
    return normalize_single(
        call.x, partition, running, parameters, training, call.name, ending=ending
    )
