"""The short way for single-partition layers: pooling and its transpose inside the kernels.

On small maps a dozen operations on tiny tables cost more than the passes over the map, so the
kernels do them. What they compute is ``normalize`` with ``GroupStatistics``, and ``apply_tables``
with ``fixed_tables``; second derivatives are taken of those.
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
from normkit.core.running import RunningStatistics, is_second_look
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
    """Normalise by the statistics of the input's own groups; ``running`` follows them.

    Kernels move the buffers where they can, but not while ``torch.compile`` traces: a traced node
    must not change its inputs.
    """
    weight, bias, eps = parameters
    if x.shape[1] % partition.num_groups:
        partition.segment_size(x.shape)  # refuses what does not divide
    num_groups, run = partition
    by_channel = running is not None and (run is not None or running.mean.shape[0] != num_groups)
    # After by_channel: the table of a checkpoint's second look must have the same size. (Under a
    # torch.func transform no kernels are chosen.)
    if running is not None and is_second_look():
        running = None

    def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        size = partition.segment_size(x.shape)
        return plain(x, size, GroupStatistics(partition=partition, eps=eps), (weight, bias))[0]

    def again(*given: Any) -> Gradients:
        return differentiable_gradients(formula, bias, *given)

    pooling = Pooling(num_groups, run or 0, eps, by_channel)
    follower = None
    if running is not None and kernels_move and not torch.compiler.is_compiling():
        mean, var, count, momentum, _ = running
        follower = Running(mean, var, count, momentum or 0.0)
    if ending is None:
        y, table = nodes.normalize_pooled(kernels, x, weight, bias, pooling, follower, again)
    else:
        call = ended_nodes.Ended(ending.activation, (), pooling, follower)
        y, table = _normalize_ended(kernels, x, parameters, ending, call, formula)
    if running is not None and follower is None:
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

    def again(*given: Any) -> Gradients:
        return differentiable_gradients(formula, bias, *given)

    statistics, options = (groups.mean[0], groups.var[0]), (partition.num_groups, eps)
    if ending is not None:
        call = ended_nodes.Ended(ending.activation, statistics, options)
        return _normalize_ended(kernels, x, parameters, ending, call, formula)[0]
    return nodes.normalize_given(kernels, x, statistics, weight, bias, options, again)


def _normalize_ended(
    kernels: nodes.Kernels,
    x: FeatureMap,
    parameters: Parameters,
    ending: Ending,
    call: ended_nodes.Ended,
    formula: Callable[..., Tensor],
) -> tuple[FeatureMap, Any]:
    """Go on to ``act(norm(x) + residual)``, ``formula`` being the norm."""
    weight, bias, _ = parameters
    again = ended_again(formula, ending.activation, ending.residual is not None)
    return ended_nodes.normalize_ended(kernels, x, ending.residual, weight, bias, call, again)


def ended_again(
    formula: Callable[..., Tensor], activation: Activation, has_residual: bool
) -> Callable[..., Any]:
    """Gradients of ``act(formula(x, *parameters) + residual)`` that can be differentiated again.

    Of ``(grad, (x, *parameters), kept, wanted)``, wanted being of x, the residual and parameters.
    """

    def again(  # no reference to the residual, which would keep it
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

    return again


def differentiable_gradients(
    formula: Callable[..., Tensor],
    bias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients that can be differentiated again, of the formula in plain operators."""
    dx, dweight, dbias = differentiable_gradient(formula, (x, weight, bias), wanted, grad)
    return dx, dweight, dbias
