"""The operators of ``kernels.operators`` on a GPU: a function for each, in its words.

Called directly they cost less than by way of torch; ``register`` lets torch call them too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from normkit.kernels.calls import (
    Batch,
    BatchSource,
    Buffers,
    Composite,
    Kind,
    Options,
    Pooling,
    Slots,
)
from normkit.kernels.operators import NAMESPACE, SCHEMAS, define
from normkit.kernels.reference import table_dtype
from normkit.kernels.triton import composite as composites
from normkit.kernels.triton import pooled, positional, primitives
from normkit.kernels.triton.launch import INTERPRETED
from normkit.kernels.triton.passes import Follower, Statistics
from normkit.kernels.triton.pooled import Results, Wanted

MOST_CHANNELS_OF_A_POSITION = positional.MOST_CHANNELS
MOST_CHANNELS_OF_A_GROUP = composites.MOST_CHANNELS
"""Which a program holds; beyond, the layers compute their formula."""


def pooled_forward(  # noqa: PLR0913, PLR0917 - the operator's own arguments, in its order
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
    follower = None
    if running_mean is not None and running_var is not None:
        follower = Follower(running_mean, running_var, num_batches_tracked, momentum)
    pooling = Pooling(num_groups, examples_per_group, eps, channel_statistics)
    result = pooled.forward(x, (weight, bias), pooling, follower)
    count_change(follower)
    return result


def pooled_backward(  # noqa: PLR0913, PLR0917
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    weight: Tensor | None,
    num_groups: int,
    examples_per_group: int,
    eps: float,
    need_weight: bool,
    need_bias: bool,
) -> Results:
    """Gradients of x, weight and bias."""
    pooling = Pooling(num_groups, examples_per_group, eps)
    return pooled.backward(grad, x, table, weight, pooling, Wanted(need_weight, need_bias))


def evaluate_forward(  # noqa: PLR0913, PLR0917
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
) -> Tensor:
    """Normalise by given statistics ``(num_groups,)``."""
    return pooled.forward_given(x, Statistics(mean, var, eps), (weight, bias))


def evaluate_backward(  # noqa: PLR0913, PLR0917
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    num_groups: int,
    eps: float,
    need_weight: bool,
    need_bias: bool,
) -> Results:
    """Gradients of x, weight and bias; the statistics are constants."""
    wanted = Wanted(need_weight, need_bias)
    return pooled.backward_given(grad, x, Statistics(mean, var, eps), weight, wanted)


def positional_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalise each position over its channels: ``y`` and the statistics."""
    return positional.forward(x, weight, bias, eps)


def positional_backward(  # noqa: PLR0913, PLR0917
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    weight: Tensor | None,
    eps: float,
    need_weight: bool,
    need_bias: bool,
) -> Results:
    """Gradients of x, weight and bias; the table is not needed, for ``x`` is read anyway."""
    return positional.backward(grad, x, weight, eps, (need_weight, need_bias))


def composite_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Normalise by a composite: ``y`` and the statistics."""
    composite, buffers = arguments[:10], Buffers(*arguments[10:])
    return composites.forward(x, *_composite(*composite), buffers)


def composite_backward(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    *arguments: Any,  # noqa: ANN401
) -> tuple[Tensor, ...]:
    """Gradients of x and of the parameters that are wanted."""
    *composite, wanted = arguments
    return composites.backward(grad, x, table, *_composite(*composite), wanted)


def _composite(kind: int, *arguments: Any) -> tuple[Slots, Options]:  # noqa: ANN401
    """Read what ``calls.flat`` has written."""
    first, second, third, fourth, num_groups, batch_eps, group_eps, source, rate = arguments
    composite = Composite(Kind(kind), num_groups, batch_eps, group_eps)
    return (first, second, third, fourth), (composite, Batch(BatchSource(source), rate))


def moments(x: Tensor, segment_size: int, wide: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every segment."""
    mean, var = primitives.moments(x, segment_size)
    dtype = torch.float64 if wide else table_dtype(x.dtype)
    return mean.to(dtype, copy=True), var.to(dtype, copy=True)  # results share no memory


def apply(x: Tensor, mean: Tensor, scale: Tensor, center: Tensor) -> Tensor:
    """``scale * (x - mean) + center``, segment by segment."""
    return primitives.apply(x, mean, scale, center, _segment_size(x, mean))


def reduce_grad(grad: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """``sum(grad)`` and ``sum(grad * (x - mean))`` of every segment."""
    first, second = primitives.reduce_grad(grad, x, mean, _segment_size(x, mean))
    return first.clone(), second.clone()


def combine_grad(
    grad: Tensor, x: Tensor, mean: Tensor, k1: Tensor, k2: Tensor, k3: Tensor
) -> Tensor:
    """``k1 * grad + k2 * (x - mean) + k3``."""
    return primitives.combine_grad(grad, x, mean, (k1, k2, k3), _segment_size(x, mean))


def _segment_size(x: Tensor, table: Tensor) -> int:
    return x[0].numel() // table.shape[1]


def count_change(follower: Follower | None) -> None:
    """Tell autograd of buffers that a kernel has moved; it does not see kernels write."""
    if follower is not None:
        moved = (follower.mean, follower.var, follower.counter)
        torch.autograd.graph.increment_version([buffer for buffer in moved if buffer is not None])


@cache
def register() -> None:
    """Let torch call these kernels for tensors on a GPU; once."""
    define()
    for name in SCHEMAS:
        device = "cpu" if INTERPRETED else "cuda"
        torch.library.impl(f"{NAMESPACE}::{name}", device, globals()[name])
