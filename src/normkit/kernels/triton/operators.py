"""The operators of ``kernels.operators`` on a GPU: a function of the same name for each.

A direct call costs less than one through torch's dispatcher. ``register`` lets torch call them too.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from normkit.kernels.calls import Buffers
from normkit.kernels.operators import NAMESPACE, SCHEMAS, define
from normkit.kernels.reference import table_dtype
from normkit.kernels.triton import composite as composites
from normkit.kernels.triton import pooled, pooled_gradients, positional, primitives
from normkit.kernels.triton.arguments import count_change
from normkit.kernels.triton.plan import INTERPRETED, planned
from normkit.kernels.triton.pooled_gradients import Four, Three

MOST_CHANNELS_OF_A_POSITION = positional.MOST_CHANNELS
MOST_CHANNELS_OF_A_GROUP = composites.MOST_CHANNELS
"""The most channels that one program can hold; with more, torch's operators work on tables."""


def pooled_forward(  # noqa: PLR0913 - the operator's own arguments, in its order
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    examples_per_group: int,
    eps: float,
    channel_statistics: bool,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Normalise by the statistics of ``x``'s own groups: ``y`` and the statistics."""
    buffers = running_mean, running_var, num_batches_tracked
    pooling = num_groups, examples_per_group, eps, channel_statistics
    result = planned(pooled.forward, (x, weight, bias, *buffers, None), pooling, momentum)
    count_change(buffers)
    return result


def ended_forward(  # noqa: PLR0913
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    examples_per_group: int,
    eps: float,
    channel_statistics: bool,
    activation: int,
    slope: float,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same, then ``act(y + residual)``."""
    buffers = running_mean, running_var, num_batches_tracked
    options = num_groups, examples_per_group, eps, channel_statistics, activation, slope
    result = planned(pooled.forward, (x, weight, bias, *buffers, residual), options, momentum)
    count_change(buffers)
    return result


def pooled_backward(  # noqa: PLR0913
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    weight: Tensor | None,
    num_groups: int,
    examples_per_group: int,
    eps: float,
    need_weight: bool,
    need_bias: bool,
) -> Three:
    """Gradients of x, weight and bias."""
    options = num_groups, examples_per_group, eps, need_weight, need_bias
    return planned(pooled_gradients.backward, (grad, x, table, weight), options)


def ended_backward(  # noqa: PLR0913
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    residual: Tensor | None,
    result: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    examples_per_group: int,
    eps: float,
    activation: int,
    slope: float,
    *needs: bool,
) -> Four:
    """Gradients of x, residual, weight and bias."""
    tensors = grad, x, table, weight, bias, residual, result
    options = num_groups, examples_per_group, eps, activation, slope, *needs
    return planned(pooled_gradients.backward_ended, tensors, options)


def evaluate_forward(  # noqa: PLR0913
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
) -> Tensor:
    """Normalise by given statistics ``(num_groups,)``."""
    return planned(pooled.forward_given, (x, mean, var, weight, bias, None), (eps,))


def ended_evaluate_forward(  # noqa: PLR0913
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    activation: int,
    slope: float,
) -> Tensor:
    """The same, then ``act(y + residual)``."""
    tensors = x, mean, var, weight, bias, residual
    return planned(pooled.forward_given, tensors, (eps, activation, slope))


def evaluate_backward(  # noqa: PLR0913
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    num_groups: int,
    eps: float,
    need_weight: bool,
    need_bias: bool,
) -> Three:
    """Gradients of x, weight and bias; the statistics are constants."""
    options = eps, need_weight, need_bias
    return planned(pooled_gradients.backward_given, (grad, x, mean, var, weight), options)


def ended_evaluate_backward(  # noqa: PLR0913
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    result: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    activation: int,
    slope: float,
    *needs: bool,
) -> Four:
    """Gradients of x, residual, weight and bias; the statistics are constants."""
    tensors = grad, x, mean, var, weight, bias, residual, result
    options = eps, activation, slope, *needs
    return planned(pooled_gradients.backward_given_ended, tensors, options)


def positional_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalise each position over its channels: ``y`` and the statistics."""
    return planned(positional.forward, (x, weight, bias), (eps,))


def ended_positional_forward(  # noqa: PLR0913
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """The same, then ``act(y + residual)``."""
    options = eps, activation, slope
    return planned(positional.forward_ended, (x, weight, bias, residual), options)


def positional_backward(  # noqa: PLR0913
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    weight: Tensor | None,
    eps: float,
    need_weight: bool,
    need_bias: bool,
) -> Three:
    """Gradients of x, weight and bias; the table is not needed, for ``x`` is read anyway."""
    return planned(positional.backward, (grad, x, weight), (eps, need_weight, need_bias))


def ended_positional_backward(  # noqa: PLR0913
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    residual: Tensor | None,
    result: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    slope: float,
    *needs: bool,
) -> Four:
    """Gradients of x, residual, weight and bias; the table is not needed."""
    tensors, options = (grad, x, weight, bias, residual, result), (eps, activation, slope, *needs)
    return planned(positional.backward_ended, tensors, options)


def composite_forward(  # noqa: PLR0913
    x: Tensor,
    program: str,
    first: Tensor | None,
    second: Tensor | None,
    third: Tensor | None,
    fourth: Tensor | None,
    share: float,
    *buffers: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Normalise by a composite: ``y`` and the statistics."""
    parameters = first, second, third, fourth
    return composites.forward(x, program, parameters, share, Buffers(*buffers))


def composite_backward(  # noqa: PLR0913
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    program: str,
    first: Tensor | None,
    second: Tensor | None,
    third: Tensor | None,
    fourth: Tensor | None,
    share: float,
    wanted: int,
) -> tuple[Tensor, ...]:
    """Gradients of x and of the parameters that are wanted."""
    parameters = first, second, third, fourth
    return composites.backward(grad, x, table, program, parameters, share, wanted)


def ended_composite_forward(  # noqa: PLR0913
    x: Tensor,
    residual: Tensor | None,
    program: str,
    first: Tensor | None,
    second: Tensor | None,
    third: Tensor | None,
    fourth: Tensor | None,
    share: float,
    activation: int,
    slope: float,
    *buffers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, then ``act(y + residual)``; also scale and center, for the backward pass."""
    parameters, ending = (first, second, third, fourth), (activation, slope)
    held = Buffers(*buffers)
    return composites.forward_ended(x, residual, program, parameters, share, ending, held)


def ended_composite_backward(  # noqa: PLR0913
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    factors: Tensor,
    residual: Tensor | None,
    result: Tensor | None,
    program: str,
    first: Tensor | None,
    second: Tensor | None,
    third: Tensor | None,
    fourth: Tensor | None,
    share: float,
    activation: int,
    slope: float,
    need_residual: bool,
    wanted: int,
) -> tuple[Tensor, ...]:
    """Gradients of x, the residual and the parameters that are wanted."""
    parameters, ending = (first, second, third, fourth), (activation, slope)
    tables, added = (table, factors), (residual, result)
    given = (program, parameters, share, ending, need_residual, wanted)
    return composites.backward_ended(grad, x, tables, added, *given)


def moments(x: Tensor, segment_size: int, wide: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every segment."""
    mean, var = primitives.moments(x, segment_size)
    dtype = torch.float64 if wide else table_dtype(x.dtype)
    return mean.to(dtype), var.to(dtype)


def apply(x: Tensor, mean: Tensor, scale: Tensor, center: Tensor) -> Tensor:
    """``scale * (x - mean) + center``, segment by segment."""
    return primitives.apply(x, mean, scale, center, _segment_size(x, mean))


def reduce_grad(grad: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """``sum(grad)`` and ``sum(grad * (x - mean))`` of every segment."""
    return primitives.reduce_grad(grad, x, mean, _segment_size(x, mean))


def combine_grad(
    grad: Tensor, x: Tensor, mean: Tensor, k1: Tensor, k2: Tensor, k3: Tensor
) -> Tensor:
    """``k1 * grad + k2 * (x - mean) + k3``."""
    return primitives.combine_grad(grad, x, mean, (k1, k2, k3), _segment_size(x, mean))


def _segment_size(x: Tensor, table: Tensor) -> int:
    return x[0].numel() // table.shape[1]


@cache
def register() -> None:
    """Let torch call these kernels for tensors on a GPU; once."""
    define()
    for name in SCHEMAS.keys() & globals().keys():
        device = "cpu" if INTERPRETED else "cuda"
        torch.library.impl(f"{NAMESPACE}::{name}", device, globals()[name])
