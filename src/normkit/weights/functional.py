"""Weight standardization, weight normalization and centred weight normalization as functions."""

from __future__ import annotations

from torch import Tensor

from normkit.core.check import DTYPES
from normkit.core.groups import normalize_batch
from normkit.core.normalize import normalize
from normkit.core.parameters import Parameters
from normkit.core.partition import Partition
from normkit.errors import InputError, InputTypeError, WeightError
from normkit.typing import PerChannel
from normkit.weights.algebra import EpsTo, FilterAlgebra, Standardize, UnitLength
from normkit.weights.filters import Filters

LENGTH_EPS = 1e-12
"""Default added to a squared length.

It keeps a filter of zeros finite, and is too small to change other filters.
"""


def standardize(  # noqa: PLR0913 - the variants that published checkpoints differ in
    weight: Tensor,
    *,
    center: bool = True,
    scale: bool = True,
    eps: float = 1e-5,
    unbiased: bool = False,
    eps_to: EpsTo = "variance",
    gain: PerChannel | None = None,
    offset: PerChannel | None = None,
    channel_axis: int = 0,
    groups: int = 1,
) -> Tensor:
    r"""Give every filter mean 0 and variance 1: Weight Standardization.

    .. math::  \hat W_{oi} = g_o \frac{W_{oi} - \mu_o}{\sqrt{\sigma_o^2 + \epsilon}} + b_o

    Args:
        weight: Weight of a convolution or linear layer, ``(O, I, *kernel)``, with ``O`` filters.
        center: Subtract the filter's mean :math:`\mu_o`.
        scale: Divide by the filter's standard deviation, which is taken about the mean even if
            ``center`` is False.
        eps: Added to the variance, or as ``eps_to`` says.
        unbiased: Use the unbiased variance: divide the sum of squares by ``fan-in - 1``.
        eps_to: ``"variance"`` adds ``eps`` inside the root; ``"std"`` adds it to the standard
            deviation, as the authors' first release and mmcv do (there with ``unbiased=True``).
        gain: Factor of each filter, ``(O,)``; None is 1.
        offset: Added to each filter, ``(O,)``; None is 0.
        channel_axis: Axis of the output channels: 1 for a transposed convolution.
        groups: Groups of a transposed convolution, ``(I, O / groups, *kernel)``.

    Returns:
        A weight of the same shape, dtype and memory format.

    Raises:
        WeightError: If a filter has a single value.
        InputError: If the shapes do not match.
        InputTypeError: If the weight is not float32, float64, bfloat16 or float16.
        OptionError: If ``eps`` is negative or ``eps_to`` unknown.

    Numerics:
        Statistics are two-pass and at least float32. A constant filter becomes 0.

    Source:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, eqs. 5 and 7; ``center`` and ``scale`` are the ablations of its table 4.

    Example:
        >>> import torch
        >>> weight = standardize(torch.randn(8, 4, 3, 3))
        >>> bool((weight.mean(dim=(1, 2, 3)).abs() < 1e-6).all())
        True
    """
    filters = Filters(channel_axis=channel_axis, groups=groups)
    require_weight(weight, filters, gain, offset)
    algebra = Standardize(
        fan_in=filters.fan_in(weight),
        center=center,
        scale=scale,
        eps=eps,
        unbiased=unbiased,
        eps_to=eps_to,
    )
    require_spread(algebra)
    return reparametrize(weight, filters, algebra, gain, offset)


def weight_norm(
    weight: Tensor,
    gain: PerChannel | None = None,
    *,
    eps: float = LENGTH_EPS,
    channel_axis: int = 0,
    groups: int = 1,
) -> Tensor:
    r"""Give every filter the length ``gain``: Weight Normalization.

    .. math::  \hat W_o = g_o \frac{W_o}{\sqrt{\lVert W_o \rVert^2 + \epsilon}}

    Args:
        weight: Weight of a convolution or linear layer, ``(O, I, *kernel)``.
        gain: Length of each filter, ``(O,)``; None is 1.
        eps: Added to the squared length, so that a filter of zeros has finite gradients.
        channel_axis: As in ``standardize``.
        groups: As in ``standardize``.

    Returns:
        A weight of the same shape, dtype and memory format.

    Raises:
        InputError: If the shapes do not match.
        InputTypeError: If the weight is not float32, float64, bfloat16 or float16.

    Source:
        Salimans & Kingma 2016, arXiv:1602.07868, eq. 2.

    Example:
        >>> import torch
        >>> weight_norm(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    filters = Filters(channel_axis=channel_axis, groups=groups)
    require_weight(weight, filters, gain, None)
    algebra = UnitLength(fan_in=filters.fan_in(weight), center=False, eps=eps)
    return reparametrize(weight, filters, algebra, gain, None)


def centered_weight_norm(
    weight: Tensor,
    gain: PerChannel | None = None,
    *,
    eps: float = LENGTH_EPS,
    channel_axis: int = 0,
    groups: int = 1,
) -> Tensor:
    r"""Give every filter mean 0 and the length ``gain``: Centred Weight Normalization.

    .. math::  \hat W_o = g_o \frac{W_o - \mu_o}{\sqrt{\lVert W_o - \mu_o \rVert^2 + \epsilon}}

    Args:
        weight: Weight of a convolution or linear layer, ``(O, I, *kernel)``.
        gain: Length of each filter, ``(O,)``; None is 1.
        eps: Added to the squared length, so that a constant filter has finite gradients.
        channel_axis: As in ``standardize``.
        groups: As in ``standardize``.

    Returns:
        A weight of the same shape, dtype and memory format.

    Raises:
        NormError: As ``standardize`` does.

    Source:
        Huang et al. 2017, Centered Weight Normalization in Accelerating Training of Deep Neural
        Networks. If ``gain`` is the square root of the fan-in, this is ``standardize`` with
        ``eps=0``.

    Example:
        >>> import torch
        >>> centered_weight_norm(torch.tensor([[3.0, 5.0]]))
        tensor([[-0.7071,  0.7071]])
    """
    filters = Filters(channel_axis=channel_axis, groups=groups)
    require_weight(weight, filters, gain, None)
    algebra = UnitLength(fan_in=filters.fan_in(weight), center=True, eps=eps)
    require_spread(algebra)
    return reparametrize(weight, filters, algebra, gain, None)


def reparametrize(
    weight: Tensor,
    filters: Filters,
    algebra: FilterAlgebra,
    gain: PerChannel | None,
    offset: PerChannel | None,
) -> Tensor:
    """Apply the algebra to every filter of a weight."""
    rows = filters.rows(weight)
    if isinstance(algebra, Standardize) and algebra.is_plain:
        each_filter = Partition(num_groups=rows.shape[1], examples_per_group=1)
        new = normalize_batch(rows, each_filter, None, Parameters(gain, offset, algebra.eps))
    else:
        new, _ = normalize(rows, rows.shape[2], algebra, gain, offset)
    return filters.weight(new, weight)


def require_spread(algebra: Standardize | UnitLength) -> None:
    """Refuse filters of a single value, because they have no variance.

    Raises:
        WeightError: If the fan-in is 1.
    """
    if algebra.fan_in == 1:
        raise WeightError(
            "the filters have a fan-in of 1, and a single value minus its mean is 0; leave this "
            "weight unchanged, or use weight_norm, which does not subtract the mean"
        )


def require_weight(
    weight: Tensor, filters: Filters, gain: Tensor | None, offset: Tensor | None
) -> None:
    """Refuse a weight that the filters do not fit, and gains or offsets that do not fit the weight.

    Raises:
        InputTypeError: If the weight's dtype is not one that the layers take.
        InputError: If the weight has too few axes or does not fit the groups, or if a gain or
            offset does not have one value for each filter.
    """
    if weight.dtype not in DTYPES:
        raise InputTypeError(
            f"a weight of {weight.dtype} was given; its dtype must be one of "
            f"{', '.join(str(dtype) for dtype in DTYPES)}"
        )
    filters.require(weight)
    for name, values in (("gain", gain), ("offset", offset)):
        if values is not None and tuple(values.shape) != (filters.num_filters(weight),):
            raise InputError(
                f"{name} of shape {tuple(values.shape)} was given for a weight of shape "
                f"{tuple(weight.shape)}; it must have one value for each of the "
                f"{filters.num_filters(weight)} filters"
            )
