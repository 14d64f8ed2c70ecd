"""The compiled operators with their gradients: one autograd node each, keeping ``x`` and tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normkit.kernels.cpu.library import why_not
from normkit.typing import FeatureMap, GroupTable, PerChannel

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Differentiable = Callable[[Tensor, Tensor, Tensor | None, tuple[bool, bool, bool]], Gradients]
"""``(grad, x, weight, (wants_x, wants_weight, wants_bias))`` to three gradients, in operations that
autograd can differentiate again."""


def normalize_pooled(  # noqa: PLR0913, PLR0917 - the operator's own arguments, in its order
    x: FeatureMap,
    weight: PerChannel | None,
    bias: PerChannel | None,
    num_groups: int,
    examples_per_group: int,
    eps: float,
    want_channel_statistics: bool = False,
    differentiable: Differentiable | None = None,
) -> tuple[FeatureMap, GroupTable, GroupTable, PerChannel, PerChannel]:
    r"""Normalise by the statistics of ``x``'s own groups.

    .. math::  y = w_c (x - \mu) / \sqrt{\sigma^2 + \epsilon} + b_c

    Args:
        x: Feature map ``(N, C, *S)`` on the CPU; contiguous and channels_last are read in place.
        weight: Scale of each channel, ``(C,)``.
        bias: Shift of each channel, ``(C,)``.
        num_groups: Equal runs ``G`` of the flattened ``(C, *S)`` axis.
        examples_per_group: Consecutive examples that share statistics; 0 means the whole batch.
        eps: Added to the variance.
        want_channel_statistics: Also pool the moments of each channel over the whole batch.
        differentiable: Makes the gradients when a backward pass is itself differentiated.

    Returns:
        ``y`` in the dtype and layout of ``x``; mean and biased variance ``(B, G)`` and, where
        wanted, those of each channel ``(C,)`` (else empty), all float64 and without a gradient.
    """
    if _needs_gradient(x, weight, bias):
        options = (num_groups, examples_per_group, eps, want_channel_statistics)
        return _Pooled.apply(x, weight, bias, options, differentiable)
    return torch.ops.normkit.pooled_forward.default(
        x, weight, bias, num_groups, examples_per_group, eps, want_channel_statistics
    )


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context has no public type
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        options: tuple[int, int, float, bool],
        differentiable: Differentiable | None,
    ) -> tuple[Tensor, ...]:
        results = torch.ops.normkit.pooled_forward.default(x, weight, bias, *options)
        _, mean, var, *channels = results
        ctx.save_for_backward(x, weight, mean, var)
        ctx.options = options[:3]
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.differentiable = differentiable
        ctx.mark_non_differentiable(mean, var, *channels)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # noqa: ANN401
        return *_gradients(ctx, grads[0], torch.ops.normkit.pooled_backward.default), None, None


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
    if _needs_gradient(x, weight, bias):
        statistics = (mean, var)
        return _Given.apply(x, weight, bias, statistics, (num_groups, eps), differentiable)
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
        return *_gradients(ctx, grads[0], operator), None, None, None


def normalize_positions(
    x: FeatureMap,
    weight: PerChannel | None,
    bias: PerChannel | None,
    eps: float,
    differentiable: Differentiable | None = None,
) -> tuple[FeatureMap, Tensor, Tensor]:
    """Normalise each position over its channels; also mean and variance ``(N, P)``, float64."""
    if _needs_gradient(x, weight, bias):
        return _Positional.apply(x, weight, bias, eps, differentiable)
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var = torch.ops.normkit.positional_forward.default(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.options = (eps,)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.differentiable = differentiable
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # noqa: ANN401
        operator = torch.ops.normkit.positional_backward.default
        return *_gradients(ctx, grads[0], operator), None, None


def _needs_gradient(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether autograd is to record: without, the node and its Python are saved."""
    return torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )


def _gradients(
    ctx: Any,  # noqa: ANN401
    grad: Tensor | None,
    operator: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> Gradients:
    """Gradients of x, weight and bias, in the parameters' dtypes; None where not wanted."""
    if grad is None:
        return None, None, None
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    x, weight, mean, var = ctx.saved_tensors
    if torch.is_grad_enabled():
        if ctx.differentiable is None:
            raise NotImplementedError(
                "this backward pass of normkit's CPU kernels cannot be differentiated again; "
                "choose the reference kernels for second derivatives"
            )
        return ctx.differentiable(grad, x, weight, (wants_x, wants_weight, wants_bias))
    dx, dweight, dbias = operator(
        grad, x, mean, var, weight, *ctx.options, wants_weight, wants_bias
    )
    return (
        dx if wants_x else None,
        dweight.to(weight.dtype) if wants_weight else None,
        dbias.to(ctx.bias_dtype) if wants_bias else None,
    )


def require() -> None:
    """Load the library.

    Raises:
        RuntimeError: If it was not built or does not load, with the reason.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
