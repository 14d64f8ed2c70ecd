"""The kernels with their gradients: one autograd node each, keeping ``x`` and tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normkit.kernels.cpu.composite import (
    Batch,
    Buffers,
    Composite,
    MomentTable,
    Operators,
    Options,
    Slots,
    compute,
    flat,
)
from normkit.kernels.cpu.composite import Differentiable as DifferentiableComposite
from normkit.kernels.cpu.functions import (
    CellTable,
    Differentiable,
    Pooling,
    Running,
    gradients,
    keep,
    needs_gradient,
    recorder,
)
from normkit.kernels.triton import composite as composites
from normkit.kernels.triton import operators, pooled
from normkit.kernels.triton.passes import Follower
from normkit.typing import FeatureMap, PerChannel


def normalize_pooled(
    x: FeatureMap,
    weight: PerChannel | None,
    bias: PerChannel | None,
    pooling: Pooling,
    running: Running | None = None,
    differentiable: Differentiable | None = None,
) -> tuple[FeatureMap, CellTable]:
    """Normalise by the statistics of ``x``'s own groups; ``running`` follows them in place.

    Arguments and results are those of the C++ kernels' function of the same name. While
    ``torch.compile`` traces, there is no ``running``: whoever calls moves the buffers.
    """
    if needs_gradient(x, weight, bias):
        record = _Pooled.apply if torch.compiler.is_compiling() else _RECORD_POOLED
        return record(x, weight, bias, pooling, running, differentiable)
    return _pooled_forward(x, weight, bias, pooling, running)


def _is_plain(x: Tensor) -> bool:
    """Whether ``x`` has memory of its own: nothing traces, and no subclass stands for it."""
    return type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()


def _callable(name: str, x: Tensor) -> Callable[..., Any]:
    """The operator for who traces; the function behind it, which costs less, for all others."""
    return getattr(operators if _is_plain(x) else getattr(torch.ops, operators.NAMESPACE), name)


def _backward(name: str) -> Callable[..., Any]:
    """The same for a backward pass, whose saved tensors a checkpoint lets nobody read twice."""

    def call(grad: Tensor, *arguments: Any) -> Any:  # noqa: ANN401
        return _callable(name, grad)(grad, *arguments)

    return call


def _pooled_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pooling: Pooling,
    running: Running | None,
) -> tuple[Tensor, Tensor]:
    if running is None:
        return _callable("pooled_forward", x)(x, weight, bias, *pooling)
    result = pooled.forward(x, (weight, bias), pooling, Follower(*running))
    moved = (running.mean, running.var, running.num_batches_tracked)
    for buffer in moved:
        if buffer is not None:
            torch.autograd.graph.increment_version(buffer)  # autograd does not see the kernel write
    return result


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
        return *gradients(ctx, grads[0], _backward("pooled_backward")), None, None, None


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
        record = _Given.apply if torch.compiler.is_compiling() else _RECORD_GIVEN
        return record(x, weight, bias, (mean, var), (num_groups, eps), differentiable)
    return _callable("evaluate_forward", x)(x, mean, var, weight, bias, num_groups, eps)


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
        return _callable("evaluate_forward", x)(x, *statistics, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # noqa: ANN401
        return *gradients(ctx, grads[0], _backward("evaluate_backward")), None, None, None


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
    return _callable("positional_forward", x)(x, weight, bias, eps)


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
        y, table = _callable("positional_forward", x)(x, weight, bias, eps)
        keep(ctx, (x, weight, bias), table, differentiable)
        ctx.options = (eps,)
        return y, table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # noqa: ANN401
        return *gradients(ctx, grads[0], _backward("positional_backward")), None, None


_RECORD_POOLED, _RECORD_GIVEN, _RECORD_POSITIONAL = map(recorder, (_Pooled, _Given, _Positional))


def normalize_composite(
    x: FeatureMap,
    parameters: Slots,
    composite: Composite,
    batch: Batch,
    buffers: Buffers,
    differentiable: DifferentiableComposite,
) -> tuple[FeatureMap, MomentTable]:
    """Normalise by a composite of norms; running statistics move in place.

    Arguments and results are those of the C++ kernels' function of the same name. While
    ``torch.compile`` traces, none are running: whoever calls moves the buffers.
    """
    return compute(_COMPOSITE, x, parameters, (composite, batch), buffers, differentiable)


def _composite_forward(
    x: Tensor, parameters: Slots, options: Options, buffers: Buffers
) -> tuple[Tensor, ...]:
    if buffers.running_mean is not None or _is_plain(x):
        return composites.forward(x, parameters, options, buffers)
    given = buffers.given_mean, buffers.given_var
    return _callable("composite_forward", x)(x, *flat(parameters, options), *given)


_COMPOSITE = Operators(_composite_forward, _backward("composite_backward"))
