"""The operators that also compute ``act(y + residual)``, with their gradients: one node each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkit.kernels.activations import NO_ACTIVATION, Activation
from normkit.kernels.calls import (
    Buffers,
    CellTable,
    DifferentiableEnded,
    DifferentiableEndedComposite,
    EndedGradients,
    MomentTable,
    Programs,
    Running,
    Slots,
)
from normkit.kernels.nodes import (
    REGISTERED,
    Kernels,
    as_parameters,
    cast,
    direct,
    needs_gradient,
    recorder,
)
from normkit.typing import FeatureMap, PerChannel


class Ended(NamedTuple):
    """Which operator computes a call that ends with an activation, and its options.

    Args:
        activation: The activation, applied last.
        statistics: Mean and variance ``(G,)`` to normalise by; empty to use the input's own.
        options: For the input's own statistics a ``Pooling``, for given statistics the number of
            groups and ``eps``, for statistics of positions ``eps``.
        running: Buffers that are updated with the input's own statistics.
        of_positions: Whether each position is normalised over its channels.
    """

    activation: Activation
    statistics: tuple[Tensor, ...]
    options: tuple[Any, ...]
    running: Running | None = None
    of_positions: bool = False

    @property
    def backwards(self) -> tuple[str, str]:
        """Names of the operators of the backward pass: without and with an activation."""
        if self.statistics:
            return "evaluate_backward", "ended_evaluate_backward"
        if self.of_positions:
            return "positional_backward", "ended_positional_backward"
        return "pooled_backward", "ended_backward"

    def compute(
        self,
        kernels: Kernels,
        x: FeatureMap,
        residual: FeatureMap | None,
        weight: PerChannel | None,
        bias: PerChannel | None,
    ) -> tuple[FeatureMap, Tensor | None]:
        """The result, and the table of the input's own statistics."""
        kernels = kernels or REGISTERED
        if self.statistics:
            options = (*self.statistics, weight, bias, *self.options, *self.activation)
            return kernels.ended_evaluate_forward(x, residual, *options), None
        options = (weight, bias, *self.options, *self.activation, *(self.running or ()))
        if self.of_positions:
            return kernels.ended_positional_forward(x, residual, *options)
        return kernels.ended_forward(x, residual, *options)


def kept_beside(
    activation: Activation, y: FeatureMap, residual: FeatureMap | None
) -> FeatureMap | None:
    """The map that backward needs beside ``x``; None without a residual.

    ReLU and leaky ReLU need only the sign of ``norm(x) + residual``. The result has the same sign,
    and the next layer keeps it anyway. Other activations need the sum, and so the residual.
    """
    if residual is None or activation == NO_ACTIVATION:
        return None
    return y if activation.is_signed else residual


def normalize_ended(  # noqa: PLR0913
    kernels: Kernels,
    x: FeatureMap,
    residual: FeatureMap | None,
    weight: PerChannel | None,
    bias: PerChannel | None,
    ended: Ended,
    differentiable: DifferentiableEnded | None = None,
) -> tuple[FeatureMap, CellTable | None]:
    r"""Normalise, add and activate in one pass.

    .. math::  y = act(w_c (x - \mu) / \sqrt{\sigma^2 + \epsilon} + b_c + r)

    Saved for backward are ``x``, tables, and the map that ``kept_beside`` returns.
    """
    if needs_gradient(x, residual, weight, bias):
        record = _Ended.apply if kernels is None else _RECORD_ENDED
        return record(x, residual, weight, bias, ended, differentiable, kernels)
    return ended.compute(kernels, x, residual, weight, bias)


class _Ended(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        *arguments: Any,
    ) -> tuple[Tensor, Tensor | None]:
        weight, bias, ended, differentiable, kernels = arguments
        y, table = ended.compute(kernels, x, residual, weight, bias)
        tables = ended.statistics if table is None else (table,)
        kept = kept_beside(ended.activation, y, residual)
        ctx.save_for_backward(x, kept, weight, bias, *tables)
        ctx.activation, ctx.options = ended.activation, ended.options[:3]
        ctx.operators = ended.backwards
        ctx.differentiable, ctx.kernels = differentiable, kernels
        if table is not None:
            ctx.mark_non_differentiable(table)
        ctx.set_materialize_grads(False)
        return y, table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if grads[0] is None:
            return (None,) * 7
        return *_ended_gradients(ctx, grads[0]), None, None, None


def _ended_gradients(ctx: Any, grad: Tensor) -> EndedGradients:
    """Gradients of x, residual, weight and bias; None where not wanted."""
    x, kept, weight, bias, *tables = ctx.saved_tensors
    wanted = wants_x, wants_residual, *wants = ctx.needs_input_grad[:4]
    activation, options = ctx.activation, ctx.options
    if torch.is_grad_enabled():
        return ctx.differentiable(grad, (x, weight, bias), kept, wanted)
    kernels = direct(ctx.kernels, grad) or REGISTERED
    if activation == NO_ACTIVATION:  # the residual's gradient is the result's
        backward = getattr(kernels, ctx.operators[0])
        dx, *found = backward(grad, x, *tables, weight, *options, *wants)
        dresidual = grad
    else:
        both = (None, kept) if activation.is_signed else (kept, None)
        backward = getattr(kernels, ctx.operators[1])
        needs = (wants_residual, *wants)
        given = (*both, weight, bias, *options, *activation, *needs)
        dx, dresidual, *found = backward(grad, x, *tables, *given)
    dweight, dbias = (
        cast(d, p.dtype) if want else None
        for d, p, want in zip(found, (weight, bias), wants, strict=True)
    )
    return dx if wants_x else None, dresidual if wants_residual else None, dweight, dbias


def normalize_ended_composite(  # noqa: PLR0913 - what one operator needs
    kernels: Kernels,
    x: FeatureMap,
    residual: FeatureMap | None,
    parameters: Slots,
    activation: Activation,
    options: tuple[Programs, float],
    buffers: Buffers,
    differentiable: DifferentiableEndedComposite,
) -> tuple[FeatureMap, MomentTable]:
    """Normalise by a composite of norms, add the residual and activate.

    The other arguments are those of ``nodes.normalize_composite``. Saved for backward are ``x``,
    tables, and the map that ``kept_beside`` returns.
    """
    if needs_gradient(x, residual, *parameters):
        record = _EndedComposite.apply if kernels is None else _RECORD_COMPOSITE
        given = (activation, options, buffers, differentiable, kernels)
        return record(x, residual, *parameters, *given)
    programs, share = options
    operator = (kernels or REGISTERED).ended_composite_forward
    y, table, _ = operator(x, residual, programs.forward, *parameters, share, *activation, *buffers)
    return y, table


class _EndedComposite(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        *arguments: Any,
    ) -> tuple[Tensor, ...]:
        *parameters, activation, options, buffers, differentiable, kernels = arguments
        programs, share = options
        operator = (kernels or REGISTERED).ended_composite_forward
        y, table, factors = operator(
            x, residual, programs.forward, *parameters, share, *activation, *buffers
        )
        ctx.save_for_backward(x, kept_beside(activation, y, residual), *parameters, table, factors)
        ctx.activation, ctx.options = activation, options
        ctx.differentiable, ctx.kernels = differentiable, kernels
        ctx.mark_non_differentiable(table)
        ctx.set_materialize_grads(False)
        return y, table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 11
        return *_composite_gradients(ctx, grads[0]), None, None, None, None, None


def _composite_gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Gradients of x, residual and the four parameters; None where not wanted."""
    x, kept, first, second, third, fourth, table, factors = ctx.saved_tensors
    parameters = (first, second, third, fourth)
    wanted = wants_x, wants_residual, *wants = ctx.needs_input_grad[:6]
    if torch.is_grad_enabled():
        return ctx.differentiable(grad, x, kept, table, parameters, wanted)
    kernels = direct(ctx.kernels, grad) or REGISTERED
    bits = wants[0] | wants[1] << 1 | wants[2] << 2 | wants[3] << 3
    (programs, share), activation = ctx.options, ctx.activation
    if activation == NO_ACTIVATION:  # the residual's gradient is the result's
        dx, *found = kernels.composite_backward(
            grad, x, table, programs.backward, *parameters, share, bits
        )
        dresidual = grad
    else:
        both = (None, kept) if activation.is_signed else (kept, None)
        given = (*both, programs.backward, *parameters, share, *activation, wants_residual, bits)
        dx, dresidual, *found = kernels.ended_composite_backward(grad, x, table, factors, *given)
    gradients = as_parameters(found, parameters, wants)
    return [dx if wants_x else None, dresidual if wants_residual else None, *gradients]


_RECORD_ENDED, _RECORD_COMPOSITE = map(recorder, (_Ended, _EndedComposite))
