"""Single-partition layers in one operator: pooling and its gradient are computed in the kernel.

On small maps a dozen operations on tiny tables cost more than the passes over the map, so the
kernels include them. They compute ``normalize`` with ``GroupStatistics``, and ``apply_tables`` with
``fixed_tables``; second derivatives are those of these formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normkit.core.algebra import GroupStatistics, fixed_tables
from normkit.core.ending import Ending, ended
from normkit.core.moments import Moments
from normkit.core.normalize import differentiable_gradient, plain
from normkit.core.parameters import Parameters
from normkit.core.partition import Partition
from normkit.core.running import RunningStatistics, is_recomputing
from normkit.kernels import ended_nodes, nodes, reference
from normkit.kernels.activations import Activation, pass_back
from normkit.kernels.calls import Gradients, Pooling, Running
from normkit.typing import FeatureMap


def normalize_pooled(  # noqa: PLR0913 - what one operator needs
    kernels: nodes.Kernels,
    x: FeatureMap,
    partition: Partition,
    running: RunningStatistics | None,
    parameters: Parameters,
    kernels_move: bool,
    ending: Ending | None = None,
) -> FeatureMap:
    """Normalise by the statistics of the input's own groups, and update ``running`` with them.

    The kernels update the buffers if ``kernels_move`` says that they can. Torch's operators do it
    while ``torch.compile`` traces, because a traced node must not change its inputs.
    """
    weight, bias, eps = parameters
    if x.shape[1] % partition.num_groups:
        partition.segment_size(x.shape)  # raises if the groups do not divide the map
    num_groups, run = partition
    by_channel = running is not None and (run is not None or running.mean.shape[0] != num_groups)
    # This comes after by_channel is decided, because checkpoint recomputation must save a table of
    # the same size. (torch.func transforms also freeze the buffers, but never get here.)
    if running is not None and is_recomputing():
        running = None

    def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        size = partition.segment_size(x.shape)
        return plain(x, size, GroupStatistics(partition=partition, eps=eps), (weight, bias))[0]

    def differentiable(*given: Any) -> Gradients:
        return differentiable_gradients(formula, bias, *given)

    pooling = Pooling(num_groups, run or 0, eps, by_channel)
    moved = None
    if running is not None and kernels_move and not torch.compiler.is_compiling():
        mean, var, count, momentum, _ = running
        moved = Running(mean, var, count, momentum or 0.0)
    if ending is None:
        y, table = nodes.normalize_pooled(kernels, x, weight, bias, pooling, moved, differentiable)
    else:
        call = ended_nodes.Ended(ending.activation, (), pooling, moved)
        y, table = _normalize_ended(kernels, x, parameters, ending, call, formula)
    if running is not None and moved is None:
        mean, var = table[:, -running.mean.numel() :]
        running.follow_(Moments(mean, var), running.partition.group_sizes(x.shape)[0])
    return y


def normalize_given(
    kernels: nodes.Kernels,
    x: FeatureMap,
    partition: Partition,
    groups: Moments,
    parameters: Parameters,
    ending: Ending | None = None,
) -> FeatureMap:
    """Normalise by given group statistics ``(1, G)``, which get no gradient."""
    weight, bias, eps = parameters
    size = partition.segment_size(x.shape)

    def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        tables = fixed_tables(groups, partition, x.shape, Parameters(weight, bias, eps))
        return reference.apply(x, *tables, size)

    def differentiable(*given: Any) -> Gradients:
        return differentiable_gradients(formula, bias, *given)

    statistics, options = (groups.mean[0], groups.var[0]), (partition.num_groups, eps)
    if ending is not None:
        call = ended_nodes.Ended(ending.activation, statistics, options)
        return _normalize_ended(kernels, x, parameters, ending, call, formula)[0]
    return nodes.normalize_given(kernels, x, statistics, weight, bias, options, differentiable)


def _normalize_ended(
    kernels: nodes.Kernels,
    x: FeatureMap,
    parameters: Parameters,
    ending: Ending,
    call: ended_nodes.Ended,
    formula: Callable[..., Tensor],
) -> tuple[FeatureMap, Any]:
    """Compute ``act(norm(x) + residual)``; ``formula`` is the norm in plain operators."""
    weight, bias, _ = parameters
    again = differentiable_ended(formula, ending.activation, ending.residual is not None)
    return ended_nodes.normalize_ended(kernels, x, ending.residual, weight, bias, call, again)


def differentiable_ended(
    formula: Callable[..., Tensor], activation: Activation, has_residual: bool
) -> Callable[..., Any]:
    """Gradients of ``act(formula(x, *parameters) + residual)`` that can be differentiated again.

    Of ``(grad, (x, *parameters), kept, wanted)``, wanted being of x, the residual and parameters.
    """

    # This function must not refer to the residual: autograd would keep the tensor until backward.
    def differentiable(
        grad: Tensor,
        inputs: tuple[Tensor | None, ...],
        kept: Tensor | None,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        x, *parameters = inputs
        if has_residual and (activation.is_signed or not activation.kind):
            passed = grad if kept is None else pass_back(grad, kept, activation)
            own = (wanted[0], *wanted[2:])
            dx, *found = differentiable_gradient(formula, (x, *parameters), own, passed)
            return dx, passed if wanted[1] else None, *found

        def whole(x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> Tensor:
            return ended(formula(x, *parameters), Ending(activation, residual))

        return tuple(differentiable_gradient(whole, (x, kept, *parameters), wanted, grad))

    return differentiable


def differentiable_gradients(
    formula: Callable[..., Tensor],
    bias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of ``formula(x, weight, bias)`` that autograd can differentiate again."""
    dx, dweight, dbias = differentiable_gradient(formula, (x, weight, bias), wanted, grad)
    return dx, dweight, dbias
