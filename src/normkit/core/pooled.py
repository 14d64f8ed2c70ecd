"""The short way for single-partition layers: pooling and its transpose inside the kernels.

On small maps a dozen operations on tiny tables cost more than the passes over the map, so the
kernels do them. What they compute is ``normalize`` with ``GroupStatistics``, and ``apply_tables``
with ``fixed_tables``; second derivatives are taken of those.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from normkit.core.algebra import GroupStatistics, fixed_tables
from normkit.core.moments import Moments
from normkit.core.normalize import differentiable_gradient, plain
from normkit.core.parameters import Parameters
from normkit.core.partition import Partition
from normkit.core.running import RunningStatistics, are_still
from normkit.kernels import nodes, reference
from normkit.kernels.calls import Differentiable, Gradients, Pooling, Running
from normkit.typing import FeatureMap


def normalize_pooled(
    kernels: nodes.Kernels,
    x: FeatureMap,
    partition: Partition,
    running: RunningStatistics | None,
    parameters: Parameters,
    kernels_move: bool,
) -> FeatureMap:
    """Normalise by the statistics of the input's own groups; ``running`` follows them.

    Kernels move the buffers where they can, but not while ``torch.compile`` traces: a traced node
    must not change its inputs.
    """
    weight, bias, eps = parameters
    if x.shape[1] % partition.num_groups:
        partition.segment_size(x.shape)  # refuses what does not divide
    # before the next line: a checkpoint's second look must keep tables of the same size
    by_channel = running is not None and running.partition != partition
    if running is not None and are_still():
        running = None

    def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        size = partition.segment_size(x.shape)
        return plain(x, size, GroupStatistics(partition=partition, eps=eps), (weight, bias))[0]

    pooling = Pooling(partition.num_groups, partition.examples_per_group or 0, eps, by_channel)
    follower = None
    if running is not None and kernels_move and not torch.compiler.is_compiling():
        mean, var, count, _, momentum, _ = running
        follower = Running(mean, var, count, momentum or 0.0)
    y, table = nodes.normalize_pooled(
        kernels, x, weight, bias, pooling, follower, differentiable(formula, bias)
    )
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
) -> FeatureMap:
    """Normalise by given group statistics ``(1, G)``, which get no gradient."""
    weight, bias, eps = parameters
    size = partition.segment_size(x.shape)

    def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        tables = fixed_tables(groups, partition, x.shape, Parameters(weight, bias, eps))
        return reference.apply(x, *tables, size)

    statistics, options = (groups.mean[0], groups.var[0]), (partition.num_groups, eps)
    return nodes.normalize_given(
        kernels, x, statistics, weight, bias, options, differentiable(formula, bias)
    )


def differentiable(formula: Callable[..., Tensor], bias: Tensor | None) -> Differentiable:
    """Gradients that can be differentiated again, of the formula in plain operators."""

    def gradients(
        grad: Tensor, x: Tensor, weight: Tensor | None, wanted: tuple[bool, bool, bool]
    ) -> Gradients:
        dx, dweight, dbias = differentiable_gradient(formula, (x, weight, bias), wanted, grad)
        return dx, dweight, dbias

    return gradients
