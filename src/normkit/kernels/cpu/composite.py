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
    """Statistics ``(C,)`` that the batch stage reads (given) or moves (running)."""

    given_mean: Tensor | None = None
    given_var: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None


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
    if torch.is_grad_enabled() and (
        x.requires_grad or any(p is not None and p.requires_grad for p in parameters)
    ):
        return _RECORD(x, *parameters, (*composite, *batch), buffers, differentiable)
    return _forward(x, parameters, (*composite, *batch), buffers)


def _forward(
    x: Tensor, parameters: Slots, given: tuple[Any, ...], buffers: Buffers
) -> tuple[Tensor, Tensor]:
    kind, *options = given
    operator = torch.ops.normkit.composite_forward.default
    return operator(x, kind, *parameters, *options, *buffers)


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        *parameters, given, buffers, differentiable = arguments
        y, table = _forward(x, tuple(parameters), given, buffers)
        ctx.save_for_backward(x, table, *parameters)
        ctx.given, ctx.differentiable = given, differentiable
        ctx.mark_non_differentiable(table)
        ctx.set_materialize_grads(False)
        return y, table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        if grads[0] is None:
            return (None,) * 8
        return *_gradients(ctx, grads[0]), None, None, None


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:  # noqa: ANN401
    x, table, *parameters = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:5]
    if torch.is_grad_enabled():
        return ctx.differentiable(grad, x, table, tuple(parameters), wanted)
    kind, *options = ctx.given
    _, *wants = wanted
    bits = wants[0] | wants[1] << 1 | wants[2] << 2 | wants[3] << 3
    operator = torch.ops.normkit.composite_backward.default
    dx, *found = operator(grad, x, table, kind, *parameters, *options, bits)
    gradients = [_as_parameter(*given) for given in zip(found, parameters, wants, strict=True)]
    return [dx if wanted[0] else None, *gradients]


def _as_parameter(gradient: Tensor, parameter: Tensor | None, want: bool) -> Tensor | None:
    if parameter is None or not want:
        return None
    shaped = gradient if parameter.ndim == 1 else gradient.view(parameter.shape)
    return cast_gradient(shaped, parameter.dtype)


_RECORD = recorder(_Composite)
