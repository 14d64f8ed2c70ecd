"""The compiled operator of composite norms with its gradient: one autograd node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from normkit.kernels.cpu.functions import cast_gradient, recorder
from normkit.kernels.cpu.kinds import BatchSource, Kind
from normkit.typing import FeatureMap

Slots = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""The composite's parameters, in the order that csrc/composites.h gives for its kind."""
MomentTable = Float[Tensor, "2 cells"]
"""Means above biased variances, float64: of every channel of every example, then of the batch
stage's channels its statistics: measured, or those that it was given."""
Differentiable = Callable[[Tensor, Tensor, Tensor, Slots, tuple[bool, ...]], list[Tensor | None]]
"""``(grad, x, table, parameters, wanted)`` to the gradients of x and the parameters, in operations
that autograd can differentiate again."""


class Composite(NamedTuple):
    """What is computed, apart from where the batch stage takes its statistics.

    Args:
        kind: Which composite.
        num_groups: Runs of channels in its group norm; the instance norm's channels of halves.
        batch_eps: Added to the batch stage's variances.
        group_eps: Added to the other norm's.
    """

    kind: Kind
    num_groups: int
    batch_eps: float
    group_eps: float

    def num_batch_channels(self, x: FeatureMap) -> int:
        """Channels that the batch stage sees."""
        return x.shape[1] - self.num_groups if self.kind == Kind.HALVES else x.shape[1]


class Batch(NamedTuple):
    """Where the batch stage's statistics come from.

    Args:
        source: From the input, from estimates that move first, or given.
        rate: Weight of the batch in running statistics, of the step in estimates, or of the
            example's own statistics beside given ones.
    """

    source: BatchSource
    rate: float = 0.0


class Buffers(NamedTuple):
    """Statistics ``(C,)`` that the batch stage reads (given) or moves (running).

    Estimates are moved; where they are given, in the table alone.
    """

    given_mean: Tensor | None = None
    given_var: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None


Options = tuple[Composite, Batch]


class Operators(NamedTuple):
    """What computes a composite and its gradient.

    Args:
        forward: ``(x, parameters, options, buffers)`` to ``y`` and what backward reads, of which
            the first is the table of moments.
        backward: ``(grad, x, *kept, *flat(parameters, options), wanted)`` to the gradient of x and
            those of the parameters that are wanted: bits, the first parameter's the lowest.
    """

    forward: Callable[[Tensor, Slots, Options, Buffers], tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]


def flat(parameters: Slots, options: Options) -> tuple[object, ...]:
    """A composite as the operators take it."""
    (kind, *composite), batch = options
    return (kind, *parameters, *composite, *batch)


def normalize_composite(
    x: FeatureMap,
    parameters: Slots,
    composite: Composite,
    batch: Batch,
    buffers: Buffers,
    differentiable: Differentiable,
) -> tuple[FeatureMap, MomentTable]:
    """Normalise by a composite of norms; running statistics move in place.

    Args:
        x: Feature map ``(N, C, *S)`` on the CPU, not empty.
        parameters: In the order of the composite's kind.
        composite: What is computed.
        batch: Where the batch stage's statistics come from.
        buffers: The batch stage's.
        differentiable: Makes the gradients when a backward pass is itself differentiated.

    Returns:
        ``y`` in the dtype and layout of ``x``, and the table of moments, without a gradient.
    """
    return compute(_OPERATORS, x, parameters, (composite, batch), buffers, differentiable)


def compute(
    operators: Operators,
    x: FeatureMap,
    parameters: Slots,
    options: Options,
    buffers: Buffers,
    differentiable: Differentiable,
) -> tuple[FeatureMap, MomentTable]:
    """Normalise by these operators, with their gradient."""
    if torch.is_grad_enabled() and (
        x.requires_grad or any(p is not None and p.requires_grad for p in parameters)
    ):
        record = _Composite.apply if torch.compiler.is_compiling() else _RECORD
        y, table, *_ = record(x, *parameters, options, buffers, differentiable, operators)
    else:
        y, table, *_ = operators.forward(x, parameters, options, buffers)
    return y, table


def _forward(
    x: Tensor, parameters: Slots, options: Options, buffers: Buffers
) -> tuple[Tensor, ...]:
    operator = torch.ops.normkit.composite_forward.default
    return operator(x, *flat(parameters, options), *buffers)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    return torch.ops.normkit.composite_backward.default(*arguments)


_OPERATORS = Operators(_forward, _backward)


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
        *parameters, options, buffers, differentiable, operators = arguments
        y, *kept = operators.forward(x, tuple(parameters), options, buffers)
        ctx.save_for_backward(x, *parameters, *kept)
        ctx.options, ctx.differentiable, ctx.operators = options, differentiable, operators
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        return y, *kept

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        if grads[0] is None:
            return (None,) * 9
        return *_gradients(ctx, grads[0]), None, None, None, None


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:  # noqa: ANN401
    x, first, second, third, fourth, *kept = ctx.saved_tensors
    parameters = (first, second, third, fourth)
    wanted = ctx.needs_input_grad[:5]
    if torch.is_grad_enabled():
        return ctx.differentiable(grad, x, kept[0], parameters, wanted)
    _, *wants = wanted
    bits = wants[0] | wants[1] << 1 | wants[2] << 2 | wants[3] << 3
    composite = flat(parameters, ctx.options)
    dx, *found = ctx.operators.backward(grad, x, *kept, *composite, bits)
    gradients = [_as_parameter(*given) for given in zip(found, parameters, wants, strict=True)]
    return [dx if wanted[0] else None, *gradients]


def _as_parameter(gradient: Tensor, parameter: Tensor | None, want: bool) -> Tensor | None:
    if parameter is None or not want:
        return None
    shaped = gradient if parameter.ndim == 1 else gradient.view(parameter.shape)
    return cast_gradient(shaped, parameter.dtype)


_RECORD = recorder(_Composite)
