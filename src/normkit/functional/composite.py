"""Functions without state for the composite norms and group whitening."""

from __future__ import annotations

from typing import Unpack, get_args

from torch import Tensor

from normkit.core.check import (
    require_channel_groups,
    require_choice,
    require_count,
    require_update_rate,
)
from normkit.core.composite import Order
from normkit.core.ending import ended
from normkit.core.parameters import Parameters
from normkit.core.running import RunningEstimates
from normkit.errors import InputError
from normkit.functional.arguments import Call, Options, StatisticsOptions, with_named_options
from normkit.functional.checked import (
    normalize_batch_then_group,
    normalize_group_and_batch,
    normalize_instance_beside_batch,
    normalize_switched,
    whiten,
)
from normkit.typing import FeatureMap, PerChannel


@with_named_options
def group_norm_plus(  # noqa: PLR0913 - torch's order
    x: FeatureMap,
    num_groups: int,
    mix_logit: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    *,
    order: Order = "group-first",
    **options: Unpack[StatisticsOptions],
) -> FeatureMap:
    r"""Mix group norm and batch norm; see :class:`normkit.GroupNormPlus`.

    .. math::  y = (s \cdot GN + (1 - s) \cdot BN) \gamma_c + \beta_c, \quad s = sigmoid(mix\_logit)

    Args:
        x: Feature map, ``(N, C, *S)``.
        num_groups: Number of runs of channels that GN normalises; divides ``C``.
        mix_logit: One value, ``()`` or ``(1,)``; its sigmoid is GN's share.
        running_mean: Running mean of BN's input, ``(C,)``.
        running_var: Running unbiased variance of BN's input, ``(C,)``.
        weight: Scale of each channel, ``(C,)``; None is 1.
        bias: Shift of each channel, ``(C,)``; None is 0.
        order: ``"group-first"``, ``"batch-first"`` or ``"parallel"``.
        options: Those of :class:`normkit.functional.StatisticsOptions`.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        PartitionError: If groups do not divide, or one has a single value in training.
        InputError: If shapes do not match, or evaluation has no running statistics.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.
        OptionError: If the order or the activation is unknown.

    Source:
        Gunawan, Yin & Zhang, Understanding and Improving Group Normalization, section 4.

    Example:
        >>> import torch
        >>> group_norm_plus(torch.randn(4, 6, 5, 7), 3, torch.ones(()), training=True).shape
        torch.Size([4, 6, 5, 7])
    """
    call = Call.with_statistics("group_norm_plus", x, options)
    parameters = call.parameters(weight, bias)
    require_choice("order", order, get_args(Order))
    num_groups = require_channel_groups(num_groups, x.shape[1])
    needed = not call.training
    running = call.statistics(running_mean, running_var, x.shape[1], is_needed=needed)
    mix_logit = mix_logit.squeeze() if mix_logit.numel() == 1 else mix_logit
    call.require_values(mix_logit, (), "mix_logit")
    given = (x, num_groups, order, running, call.training, parameters, mix_logit, call.name)
    return normalize_group_and_batch(*given, ending=call.ending())


@with_named_options
def batch_channel_norm(  # noqa: PLR0913
    x: FeatureMap,
    num_groups: int,
    running_mean: Tensor,
    running_var: Tensor,
    batch_weight: PerChannel | None = None,
    batch_bias: PerChannel | None = None,
    channel_weight: Tensor | None = None,
    channel_bias: Tensor | None = None,
    *,
    update_rate: float | None = None,
    **options: Unpack[StatisticsOptions],
) -> FeatureMap:
    r"""Batch norm, or running estimates, then group norm; see :class:`normkit.BatchChannelNorm`.

    .. math::  \dot y = \gamma^b_c (x - \hat\mu_c) / \sqrt{\hat\sigma_c^2 + \epsilon} + \beta^b_c,
               \quad y = \gamma^c (\dot y - \mu_{ng}) / \sqrt{\sigma_{ng}^2 + \epsilon} + \beta^c

    Args:
        x: Feature map, ``(N, C, *S)``.
        num_groups: Number of runs of channels that the channel stage normalises; divides ``C``.
        running_mean: Running mean, ``(C,)``.
        running_var: Running variance, ``(C,)``.
        batch_weight: Scale in the batch stage, ``(C,)``; None is 1.
        batch_bias: Shift in the batch stage, ``(C,)``; None is 0.
        channel_weight: Scale in the channel stage, ``(num_groups,)`` or ``(C,)``; None is 1.
        channel_bias: Shift in the channel stage, of the same shape; None is 0.
        update_rate: Weight of the batch in the running estimates, in (0, 1]: training updates
            them and normalises by them (micro batches, Algorithm 1). None is a batch norm, whose
            statistics are updated by ``momentum``.
        options: Those of :class:`normkit.functional.StatisticsOptions`.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        PartitionError: If groups do not divide, or one has a single value in training.
        InputError: If shapes do not match.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.
        OptionError: If ``update_rate`` lies outside (0, 1], or the activation is unknown.

    Source:
        Qiao, Wang, Liu, Shen & Yuille, Micro-Batch Training with Batch-Channel Normalization and
        Weight Standardization, section 7 and Algorithm 1.

    Example:
        >>> import torch
        >>> mean, var = torch.zeros(6), torch.ones(6)
        >>> x = torch.randn(1, 6, 5, 7)
        >>> batch_channel_norm(x, 3, mean, var, training=True, update_rate=0.1).shape
        torch.Size([1, 6, 5, 7])
    """
    call = Call.with_statistics("batch_channel_norm", x, options)
    first = call.parameters(batch_weight, batch_bias)
    num_groups = require_channel_groups(num_groups, x.shape[1])
    running = call.statistics(running_mean, running_var, x.shape[1], is_needed=True)
    if update_rate is not None:
        rate = require_update_rate(update_rate)
        running = RunningEstimates(running_mean, running_var, None, rate, call.example_weight)
    for what, values in (("channel_weight", channel_weight), ("channel_bias", channel_bias)):
        size = num_groups if values is None or values.numel() == num_groups else x.shape[1]
        call.require_values(values, (size,), what)
    second = Parameters(channel_weight, channel_bias, call.eps)
    modes = (call.training, call.training)
    given = (x, num_groups, running, modes, first, second, call.name)
    return normalize_batch_then_group(*given, ending=call.ending())


@with_named_options
def switchable_norm(  # noqa: PLR0913
    x: FeatureMap,
    mean_logits: Tensor,
    var_logits: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    **options: Unpack[StatisticsOptions],
) -> FeatureMap:
    r"""Normalise by a mixture of three statistics; see :class:`normkit.SwitchableNorm`.

    .. math::  y = \gamma_c (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta_c, \quad
               \mu = \sum_k softmax(a)_k \mu_k, \quad \sigma^2 = \sum_k softmax(b)_k \sigma_k^2

    Args:
        x: Feature map, ``(N, C, *S)``.
        mean_logits: Logits of the means of instance, layer and batch norm, ``(3,)``; without batch
            norm ``(2,)``.
        var_logits: Logits of the variances, of the same shape.
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
        Luo, Ren, Peng, Zhang & Li 2018, arXiv:1806.10779.

    Example:
        >>> import torch
        >>> logits = torch.ones(3)
        >>> switchable_norm(torch.randn(4, 6, 5, 7), logits, logits, training=True).shape
        torch.Size([4, 6, 5, 7])
    """
    call = Call.with_statistics("switchable_norm", x, options)
    parameters = call.parameters(weight, bias)
    use_batch = mean_logits.numel() != 2
    needed = use_batch and not call.training
    running = call.statistics(running_mean, running_var, x.shape[1], is_needed=needed)
    call.require_values(mean_logits, (3 if use_batch else 2,), "mean_logits")
    call.require_values(var_logits, tuple(mean_logits.shape), "var_logits")
    given = (x, running, call.training, parameters, mean_logits, var_logits, call.name)
    return normalize_switched(*given, ending=call.ending())


@with_named_options
def instance_batch_norm(
    x: FeatureMap,
    running_mean: Tensor,
    running_var: Tensor,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    **options: Unpack[StatisticsOptions],
) -> FeatureMap:
    r"""Apply instance norm to the first channels, batch norm to those with running statistics.

    .. math::  y_c = IN(x)_c \text{ for } c < C - R, \quad y_c = BN(x)_c \text{ for } c \ge C - R

    See :class:`normkit.InstanceBatchNorm`.

    Args:
        x: Feature map, ``(N, C, *S)``.
        running_mean: Running mean of the last ``R`` channels, ``(R,)`` with ``0 < R < C``.
        running_var: Running unbiased variance, ``(R,)``.
        weight: Scale of each channel, ``(C,)``; None is 1.
        bias: Shift of each channel, ``(C,)``; None is 0.
        options: Those of :class:`normkit.functional.StatisticsOptions`.

    Returns:
        The normalised map, in the shape, dtype and memory format of ``x``.

    Raises:
        PartitionError: If a channel of an example has a single value in training.
        OptionError: If an option is out of range, or the activation is unknown.
        InputError: If shapes do not match.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.

    Source:
        Pan, Luo, Shi & Tang 2018, arXiv:1807.09441.

    Example:
        >>> import torch
        >>> mean, var = torch.zeros(3), torch.ones(3)
        >>> instance_batch_norm(torch.randn(4, 6, 5, 7), mean, var, training=True).shape
        torch.Size([4, 6, 5, 7])
    """
    call = Call.with_statistics("instance_batch_norm", x, options)
    call.parameters(weight, bias)
    half = x.shape[1] - running_mean.numel()
    if not 0 < half < x.shape[1]:
        raise InputError(
            f"{call.name} was given running statistics of {running_mean.numel()} channels for an "
            f"input of {x.shape[1]}; the instance norm takes the other channels, so pass "
            f"statistics of at least one channel and fewer than {x.shape[1]}"
        )
    size = running_mean.numel()
    running = call.statistics(running_mean, running_var, size, is_needed=True)
    first, rest = (
        Parameters(_part(weight, part), _part(bias, part), call.eps)
        for part in (slice(half), slice(half, None))
    )
    given = (x, half, running, (call.training, call.training), first, rest, call.name)
    return normalize_instance_beside_batch(*given, ending=call.ending())


@with_named_options
def group_whitening(
    x: FeatureMap,
    num_groups: int,
    weight: PerChannel | None = None,
    bias: PerChannel | None = None,
    *,
    iterations: int = 5,
    **options: Unpack[Options],
) -> FeatureMap:
    r"""Whiten the groups of channels of every example; see :class:`normkit.GroupWhitening`.

    .. math::  Y = \Sigma^{-1/2} X \text{ by Newton's iteration}, \quad
               \Sigma = \tfrac{1}{m} X X^T + \epsilon I

    Args:
        x: Feature map, ``(N, C, *S)``.
        num_groups: Number of runs of channels that are decorrelated; divides ``C``.
        weight: Scale of each channel, ``(C,)``; None is 1.
        bias: Shift of each channel, ``(C,)``; None is 0.
        iterations: Newton steps.
        options: Those of :class:`normkit.functional.Options`.

    Returns:
        The whitened map, in the shape, dtype and memory format of ``x``.

    Raises:
        PartitionError: If ``num_groups`` does not divide ``C``, or a row has a single value.
        OptionError: If an option is out of range, or the activation is unknown.
        InputError: If shapes do not match.
        InputTypeError: If the input is not float32, float64, bfloat16 or float16.

    Source:
        Huang, Zhou, Liu & Shao 2021, arXiv:2009.13333.

    Example:
        >>> import torch
        >>> group_whitening(torch.randn(4, 6, 5, 7), 3).shape
        torch.Size([4, 6, 5, 7])
    """
    call = Call.of("group_whitening", x, options)
    parameters = call.parameters(weight, bias)
    num_groups = require_channel_groups(num_groups, x.shape[1])
    return ended(
        whiten(x, num_groups, require_count("iterations", iterations), parameters, True, call.name),
        call.ending(),
    )


def _part(values: PerChannel | None, channels: slice) -> PerChannel | None:
    return None if values is None else values[channels]
