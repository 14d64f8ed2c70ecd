"""The compiled operators with their gradients: one autograd node each, keeping ``x`` and tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from normkit.kernels.cpu.library import why_not
from normkit.typing import FeatureMap, GroupTable, PerChannel

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Differentiable = Callable[[Tensor, Tensor, Tensor | None, tuple[bool, bool, bool]], Gradients]
"""``(grad, x, weight, (wants_x, wants_weight, wants_bias))`` to three gradients, in operations that
autograd can differentiate again."""
CellTable = Float[Tensor, "2 cells"]
"""Means above biased variances, float64: of the groups in order, then, if wanted, the channels."""


class Pooling(NamedTuple):
    """Which elements share statistics, as the operator takes it."""

    num_groups: int
    examples_per_group: int  # 0: the whole batch
    eps: float
    channel_statistics: bool = False


class Running(NamedTuple):
    """Running statistics that follow the batch: of the channels if wanted, else of the groups."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    momentum: float


class Tables(NamedTuple):
    """The parts of a cell table."""

    mean: GroupTable
    var: GroupTable
    channel_mean: PerChannel
    channel_var: PerChannel


def split_table(table: CellTable, x: FeatureMap, pooling: Pooling) -> Tables:
    """Views of the groups' statistics ``(B, G)`` and the channels' ``(C,)`` (empty if unwanted)."""
    num_channels = x.shape[1] if pooling.channel_statistics else 0
    groups, channels = table.split((table.shape[1] - num_channels, num_channels), dim=1)
    groups = groups.unflatten(1, (-1, pooling.num_groups))
    return Tables(groups[0], groups[1], channels[0], channels[1])


def normalize_pooled(
    x: FeatureMap,
    weight: PerChannel | None,
    bias: PerChannel | None,
    pooling: Pooling,
    running: Running | None = None,
    differentiable: Differentiable | None = None,
) -> tuple[FeatureMap, CellTable]:
    r"""Normalise by the statistics of ``x``'s own groups; ``running`` follows them in place.

    .. math::  y = w_c (x - \mu) / \sqrt{\sigma^2 + \epsilon} + b_c

    Args:
        x: Feature map ``(N, C, *S)`` on the CPU; contiguous and channels_last are read in place.
        weight: Scale of each channel, ``(C,)``.
        bias: Shift of each channel, ``(C,)``.
        pooling: The groups.
        running: Buffers to move towards the batch's statistics, the variance's unbiased.
        differentiable: Makes the gradients when a backward pass is itself differentiated.

    Returns:
        ``y`` in the dtype and layout of ``x``, and the table of statistics, without a gradient.
    """
    if running is not None and torch.compiler.is_compiling():
        y, table = normalize_pooled(x, weight, bias, pooling, None, differentiable)
        _follow(running, x, table, pooling)
        return y, table
    if needs_gradient(x, weight, bias):
        record = _Pooled.apply if torch.compiler.is_compiling() else _RECORD_POOLED
        return record(x, weight, bias, pooling, running, differentiable)
    return _pooled_forward(x, weight, bias, pooling, running)


def _pooled_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pooling: Pooling,
    running: Running | None,
) -> tuple[Tensor, Tensor]:
    operator = torch.ops.normkit.pooled_forward.default
    return operator(x, weight, bias, *pooling, *(running or ()))


def _follow(running: Running, x: Tensor, table: Tensor, pooling: Pooling) -> None:
    """Do the operator's work on the buffers beside it: a traced node must not change its inputs."""
    if x.numel() == 0:
        return
    size = running.mean.numel()
    mean, var = table[:, -size:]
    torch.ops.normkit.update_running_.default(
        running.mean, running.var, mean, var, x.numel() // size, running.momentum
    )
    if running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(1)


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context has no public type
        x: Tensor,
        *arguments: Any,  # noqa: ANN401 - of normalize_pooled, in its order
    ) -> tuple[Tensor, Tensor]:
        weight, bias, pooling, running, differentiable = arguments
        y, table = _pooled_forward(x, weight, bias, pooling, running)
        keep(ctx, (x, weight, bias), table, differentiable)
        ctx.options = (pooling.num_groups, pooling.examples_per_group, pooling.eps)
        return y, table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # noqa: ANN401
        operator = torch.ops.normkit.pooled_backward.default
        return *gradients(ctx, grads[0], operator), None, None, None


def normalize_given(  # noqa: PLR0913, PLR0917 - the operator's own arguments, in its order
    x: FeatureMap,
    mean: Tensor,
    var: Tensor,
    weight: PerChannel | None,
    bias: PerChannel | None,
    num_groups: int,
    eps: float,
    differentiable: Differentiable | None = None,
) -> FeatureMap:
    """Normalise by given statistics ``(G,)``, which get no gradient: evaluation, frozen layers."""
    if needs_gradient(x, weight, bias):
        statistics = (mean, var)
        record = _Given.apply if torch.compiler.is_compiling() else _RECORD_GIVEN
        return record(x, weight, bias, statistics, (num_groups, eps), differentiable)
    return torch.ops.normkit.evaluate_forward.default(x, mean, var, weight, bias, num_groups, eps)


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - the context and the function's own six
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: tuple[Tensor, Tensor],
        options: tuple[int, float],
        differentiable: Differentiable | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *statistics)
        ctx.options = options
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.differentiable = differentiable
        return torch.ops.normkit.evaluate_forward.default(x, *statistics, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # noqa: ANN401
        operator = torch.ops.normkit.evaluate_backward.default
        return *gradients(ctx, grads[0], operator), None, None, None


def normalize_positions(
    x: FeatureMap,
    weight: PerChannel | None,
    bias: PerChannel | None,
    eps: float,
    differentiable: Differentiable | None = None,
) -> tuple[FeatureMap, CellTable]:
    """Normalise each position over its channels; the table's cells are the ``N * P`` positions."""
    if needs_gradient(x, weight, bias):
        record = _Positional.apply if torch.compiler.is_compiling() else _RECORD_POSITIONAL
        return record(x, weight, bias, eps, differentiable)
    return torch.ops.normkit.positional_forward.default(x, weight, bias, eps)


class _Positional(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        differentiable: Differentiable | None,
    ) -> tuple[Tensor, Tensor]:
        y, table = torch.ops.normkit.positional_forward.default(x, weight, bias, eps)
        keep(ctx, (x, weight, bias), table, differentiable)
        ctx.options = (eps,)
        return y, table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # noqa: ANN401
        operator = torch.ops.normkit.positional_backward.default
        return *gradients(ctx, grads[0], operator), None, None


def keep(
    ctx: Any,  # noqa: ANN401
    inputs: tuple[Tensor, Tensor | None, Tensor | None],
    table: Tensor,
    differentiable: Differentiable | None,
) -> None:
    """Keep what ``gradients`` reads, and say that the table has no gradient."""
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight, table)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.differentiable = differentiable
    ctx.mark_non_differentiable(table)
    ctx.set_materialize_grads(False)


def recorder(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its search for functorch's tensors, a third of a node's time.

    Callers have asked ``kernels.select``, which never sends a ``torch.func`` transform here.
    """
    return super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]


_RECORD_POOLED, _RECORD_GIVEN, _RECORD_POSITIONAL = map(recorder, (_Pooled, _Given, _Positional))


def needs_gradient(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether autograd is to record: without, the node and its Python are saved."""
    return torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )


def gradients(
    ctx: Any,  # noqa: ANN401
    grad: Tensor | None,
    operator: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> Gradients:
    """Gradients of x, weight and bias, in the parameters' dtypes; None where not wanted."""
    if grad is None:
        return None, None, None
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    x, weight, *tables = ctx.saved_tensors
    if torch.is_grad_enabled():
        if ctx.differentiable is None:
            raise NotImplementedError(
                "this backward pass of normkit's kernels cannot be differentiated again; "
                "choose the reference kernels for second derivatives"
            )
        return ctx.differentiable(grad, x, weight, (wants_x, wants_weight, wants_bias))
    dx, dweight, dbias = operator(grad, x, *tables, weight, *ctx.options, wants_weight, wants_bias)
    return (
        dx if wants_x else None,
        cast_gradient(dweight, weight.dtype) if wants_weight else None,
        cast_gradient(dbias, ctx.bias_dtype) if wants_bias else None,
    )


def cast_gradient(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient.to(dtype)`` without the microseconds of a call that changes nothing."""
    return gradient if gradient.dtype == dtype else gradient.to(dtype)


def require() -> None:
    """Load the library.

    Raises:
        RuntimeError: If it was not built or does not load, with the reason.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
