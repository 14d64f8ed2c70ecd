"""The operators with their gradients: one autograd node each, which keeps ``x`` and tables.

A set of kernels is a module or an object with a function for each operator of
``operators.SCHEMAS``. While ``torch.compile`` traces, and for tensor subclasses and fake tensors,
the registered operator is called instead, and torch chooses the kernels by the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normkit.kernels.calls import (
    Buffers,
    CellTable,
    Differentiable,
    DifferentiableComposite,
    Gradients,
    MomentTable,
    Pooling,
    Programs,
    Running,
    Slots,
)
from normkit.kernels.select import PLAIN
from normkit.typing import FeatureMap, PerChannel

Kernels = Any
"""A set of kernels; None for the registered operators."""
REGISTERED = torch.ops.normkit


def direct(kernels: Kernels, grad: Tensor) -> Kernels:
    """The set of kernels for a backward pass; None if the backward pass alone is traced."""
    return None if torch.compiler.is_compiling() or type(grad) not in PLAIN else kernels


def recorder(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its search for functorch's tensors, a third of a node's time.

    No such tensor comes here: under ``torch.func``, ``select.decide`` chooses the plain formula.
    """
    return super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]


def needs_gradient(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether autograd must record the call; if not, the operator is called without a node."""
    if not torch.is_grad_enabled():
        return False
    if x.requires_grad:
        return True
    for parameter in parameters:  # noqa: SIM110 - any() takes a call for each
        if parameter is not None and parameter.requires_grad:
            return True
    return False


def normalize_pooled(  # noqa: PLR0913 - the operator's own arguments
    kernels: Kernels,
    x: FeatureMap,
    weight: PerChannel | None,
    bias: PerChannel | None,
    pooling: Pooling,
    running: Running | None = None,
    differentiable: Differentiable | None = None,
) -> tuple[FeatureMap, CellTable]:
    r"""Normalise by the statistics of ``x``'s own groups, and update ``running`` in place.

    .. math::  y = w_c (x - \mu) / \sqrt{\sigma^2 + \epsilon} + b_c

    Args:
        kernels: The set of kernels.
        x: Feature map ``(N, C, *S)``.
        weight: Scale of each channel, ``(C,)``.
        bias: Shift of each channel, ``(C,)``.
        pooling: The groups.
        running: Buffers that the operator updates with the batch's statistics, of which the
            variance is unbiased. None while ``torch.compile`` traces, because a traced node must
            not change its inputs.
        differentiable: Computes the gradients when the backward pass is itself differentiated.

    Returns:
        ``y`` in the dtype and layout of ``x``, and the table of statistics, without a gradient.
    """
    # The usual answer of ``needs_gradient`` is repeated here and below, which saves a call.
    if (x.requires_grad and torch.is_grad_enabled()) or needs_gradient(x, weight, bias):
        record = _Pooled.apply if kernels is None else _RECORD_POOLED
        return record(x, weight, bias, pooling, running, differentiable, kernels)
    return (kernels or REGISTERED).pooled_forward(x, weight, bias, *pooling, *(running or ()))


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        *arguments: Any,
    ) -> tuple[Tensor, Tensor]:
        weight, bias, pooling, running, differentiable, kernels = arguments
        operator = (kernels or REGISTERED).pooled_forward
        y, table = operator(x, weight, bias, *pooling, *(running or ()))
        _keep(ctx, (x, weight, bias), table, differentiable)
        ctx.options, ctx.kernels = pooling[:3], kernels
        return y, table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return *_three_gradients(ctx, grads[0], "pooled_backward"), None, None, None, None


def normalize_given(  # noqa: PLR0913
    kernels: Kernels,
    x: FeatureMap,
    statistics: tuple[Tensor, Tensor],
    weight: PerChannel | None,
    bias: PerChannel | None,
    options: tuple[int, float],
    differentiable: Differentiable | None = None,
) -> FeatureMap:
    """Normalise by given statistics ``(G,)``, which get no gradient, as in evaluation.

    ``options`` are the number of groups and ``eps``.
    """
    if needs_gradient(x, weight, bias):
        record = _Given.apply if kernels is None else _RECORD_GIVEN
        return record(x, weight, bias, statistics, options, differentiable, kernels)
    return (kernels or REGISTERED).evaluate_forward(x, *statistics, weight, bias, *options)


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        weight, bias, statistics, options, differentiable, kernels = arguments
        ctx.save_for_backward(x, weight, *statistics)
        ctx.options, ctx.kernels, ctx.differentiable = options, kernels, differentiable
        ctx.bias_dtype = None if bias is None else bias.dtype
        return (kernels or REGISTERED).evaluate_forward(x, *statistics, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return *_three_gradients(ctx, grads[0], "evaluate_backward"), None, None, None, None


def normalize_positions(
    kernels: Kernels,
    x: FeatureMap,
    weight: PerChannel | None,
    bias: PerChannel | None,
    eps: float,
    differentiable: Differentiable | None = None,
) -> tuple[FeatureMap, CellTable]:
    """Normalise each position over its channels; the table has a cell for each position."""
    if needs_gradient(x, weight, bias):
        record = _Positional.apply if kernels is None else _RECORD_POSITIONAL
        return record(x, weight, bias, eps, differentiable, kernels)
    return (kernels or REGISTERED).positional_forward(x, weight, bias, eps)


class _Positional(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        weight, bias, eps, differentiable, kernels = arguments
        y, table = (kernels or REGISTERED).positional_forward(x, weight, bias, eps)
        _keep(ctx, (x, weight, bias), table, differentiable)
        ctx.options, ctx.kernels = (eps,), kernels
        return y, table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return *_three_gradients(ctx, grads[0], "positional_backward"), None, None, None


def normalize_composite(
    kernels: Kernels,
    x: FeatureMap,
    parameters: Slots,
    options: tuple[Programs, float],
    buffers: Buffers,
    differentiable: DifferentiableComposite,
) -> tuple[FeatureMap, MomentTable]:
    """Normalise by a composite of norms, and update running statistics in place.

    Args:
        kernels: The set of kernels.
        x: Feature map ``(N, C, *S)``, not empty.
        parameters: In the order of the composite's formula.
        options: The programs, and the weight of the input's statistics: in the update of running
            statistics or estimates, or in a mixture with given statistics.
        buffers: The batch stage's statistics. While ``torch.compile`` traces none are updated,
            because a traced node must not change its inputs.
        differentiable: Computes the gradients when the backward pass is itself differentiated.

    Returns:
        ``y`` in the dtype and layout of ``x``, and the table of moments, without a gradient.
    """
    if (x.requires_grad and torch.is_grad_enabled()) or needs_gradient(x, *parameters):
        record = _Composite.apply if kernels is None else _RECORD_COMPOSITE
        return record(x, *parameters, options, buffers, differentiable, kernels)
    programs, share = options
    operator = (kernels or REGISTERED).composite_forward
    return operator(x, programs.forward, *parameters, share, *buffers)


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *parameters, options, buffers, differentiable, kernels = arguments
        programs, share = options
        operator = (kernels or REGISTERED).composite_forward
        y, table = operator(x, programs.forward, *parameters, share, *buffers)
        ctx.save_for_backward(x, *parameters, table)
        ctx.options, ctx.differentiable, ctx.kernels = options, differentiable, kernels
        ctx.mark_non_differentiable(table)
        ctx.set_materialize_grads(False)
        return y, table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 9
        return *_composite_gradients(ctx, grads[0]), None, None, None, None


def _composite_gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    x, first, second, third, fourth, table = ctx.saved_tensors
    parameters = (first, second, third, fourth)
    wanted = ctx.needs_input_grad[:5]
    if torch.is_grad_enabled():
        return ctx.differentiable(grad, x, table, parameters, wanted)
    _, *wants = wanted
    bits = wants[0] | wants[1] << 1 | wants[2] << 2 | wants[3] << 3
    programs, share = ctx.options
    operator = (direct(ctx.kernels, grad) or REGISTERED).composite_backward
    dx, *found = operator(grad, x, table, programs.backward, *parameters, share, bits)
    return [dx if wanted[0] else None, *as_parameters(found, parameters, wants)]


def as_parameters(
    found: Sequence[Tensor], parameters: Slots, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of parameters, which kernels give flat, in the parameters' shapes and dtypes."""
    gradients: list[Tensor | None] = []
    for gradient, parameter, want in zip(found, parameters, wanted, strict=True):
        if parameter is None or not want:
            gradients.append(None)
        elif gradient.dtype == parameter.dtype and parameter.ndim == 1:  # saves two calls
            gradients.append(gradient)
        else:
            gradients.append(gradient.view(parameter.shape).to(parameter.dtype))
    return gradients


_RECORD_POOLED, _RECORD_GIVEN, _RECORD_POSITIONAL, _RECORD_COMPOSITE = map(
    recorder, (_Pooled, _Given, _Positional, _Composite)
)


def _keep(
    ctx: Any,
    inputs: tuple[Tensor, Tensor | None, Tensor | None],
    table: Tensor,
    differentiable: Differentiable | None,
) -> None:
    """Save what ``_three_gradients`` needs, and mark the table as not differentiable."""
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight, table)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.differentiable = differentiable
    ctx.mark_non_differentiable(table)
    ctx.set_materialize_grads(False)


def _three_gradients(ctx: Any, grad: Tensor | None, name: str) -> Gradients:
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
    operator = getattr(direct(ctx.kernels, grad) or REGISTERED, name)
    dx, dweight, dbias = operator(grad, x, *tables, weight, *ctx.options, wants_weight, wants_bias)
    return (
        dx if wants_x else None,
        cast(dweight, weight.dtype) if wants_weight else None,
        cast(dbias, ctx.bias_dtype) if wants_bias else None,
    )


def cast(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient.to(dtype)``, but without a call of torch if the dtype is right already."""
    return gradient if gradient.dtype == dtype else gradient.to(dtype)
