"""Single-partition norms: by the input's statistics, the running ones, or a mixture.

Where the kernels can, one operator computes all of a call, with pooling and its gradient: on small
maps a dozen operations on tiny tables cost more than the passes over the map. The operators compute
``normalize`` with ``GroupStatistics``, and ``apply_tables`` with ``fixed_tables``; their second
derivatives are those of these formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normkit.core.algebra import GroupStatistics, WeighedStatistics, fixed_tables
from normkit.core.compiled import normalize_compiled
from normkit.core.ending import Ending, differentiable_ended, ended
from normkit.core.mask import Valid, on_valid
from normkit.core.moments import Moments
from normkit.core.normalize import apply_tables, differentiable_gradient, normalize, plain
from normkit.core.parameters import Parameters
from normkit.core.partition import Partition
from normkit.core.routes import batch_route, evaluation_route
from normkit.core.running import RunningStatistics, is_recomputing
from normkit.kernels import ended_nodes, nodes, reference
from normkit.kernels.calls import Gradients, Pooling, Running
from normkit.kernels.reference import table_dtype
from normkit.kernels.select import decide
from normkit.typing import FeatureMap, PerChannel

Formula = Callable[[Tensor, PerChannel | None, PerChannel | None], Tensor]
"""The norm of x, weight and bias in plain operators."""


def normalize_batch(
    x: FeatureMap,
    partition: Partition,
    running: RunningStatistics | None,
    parameters: Parameters,
    valid: Valid | None = None,
    ending: Ending | None = None,
) -> FeatureMap:
    """Normalise by the statistics of the input's own groups, and update ``running`` with them."""
    call = batch_route(running, False, valid is not None)
    way, _, _, kernels = decide(x, call)
    if way == "operator":
        kernels_move = call.why_torch_moves is None
        return _by_operator(kernels, x, partition, running, parameters, kernels_move, ending)
    weight, bias, eps = parameters
    if way == "graph":
        y, table = _normalize_traced(x, partition, parameters)
    else:
        segment_size = partition.segment_size(x.shape)
        algebra = GroupStatistics(partition=partition, eps=eps)
        y, table = normalize(x, segment_size, algebra, weight, bias, valid=valid)
    if running is not None:
        running.update_(table, x.shape)
    return ended(y, ending, valid)


def _normalize_traced(
    x: FeatureMap, partition: Partition, parameters: Parameters
) -> tuple[FeatureMap, Moments]:
    """Do what the pooled operator does, in operations that a compiler can fuse."""

    def tables(groups: Moments) -> tuple[Tensor, Tensor, Tensor]:
        return fixed_tables(groups, partition, x.shape, parameters)

    return normalize_compiled(x, partition, tables)


def normalize_evaluation(
    x: FeatureMap,
    partition: Partition,
    running: RunningStatistics,
    parameters: Parameters,
    valid: Valid | None = None,
    ending: Ending | None = None,
) -> FeatureMap:
    """Normalise by running statistics, mixed with a share of the example's own statistics."""
    own = Partition(num_groups=partition.num_groups, examples_per_group=1)
    share = running.example_weight
    if not isinstance(share, Tensor) and share == 1:
        return normalize_batch(x, own, None, parameters, valid, ending)
    groups = running.groups(partition, table_dtype(x.dtype))
    if not isinstance(share, Tensor) and share == 0:
        if valid is None:
            return _normalize_fixed(x, partition, groups, parameters, ending)
        y = on_valid(x, valid, lambda x: _normalize_fixed(x, partition, groups, parameters))
        return ended(y, ending, valid)
    weight, bias, eps = parameters
    algebra = WeighedStatistics(partition=own, eps=eps, example_weight=share)
    given = (weight, bias, groups.mean, groups.var)
    way = decide(x, evaluation_route(running, valid is not None)).way
    y, _ = normalize(x, own.segment_size(x.shape), algebra, *given, valid=valid, way=way)
    return ended(y, ending, valid)


def _normalize_fixed(
    x: FeatureMap,
    partition: Partition,
    groups: Moments,
    parameters: Parameters,
    ending: Ending | None = None,
) -> FeatureMap:
    """Normalise by given group statistics ``(1, G)``."""
    way, _, _, kernels = decide(x)
    if way == "operator":
        return _given_by_operator(kernels, x, partition, groups, parameters, ending)
    tables = fixed_tables(groups, partition, x.shape, parameters)
    return ended(apply_tables(x, *tables, partition.segment_size(x.shape)), ending)


def _by_operator(  # noqa: PLR0913 - what one operator needs
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
    if running is not None and is_recomputing(may_be_traced=kernels is None):
        running = None

    def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        size = partition.segment_size(x.shape)
        return plain(x, size, GroupStatistics(partition=partition, eps=eps), (weight, bias))[0]

    pooling = Pooling(num_groups, run or 0, eps, by_channel)
    is_traced = kernels is None and torch.compiler.is_compiling()
    moved = None
    if running is not None and kernels_move and not is_traced:
        mean, var, count, momentum, _ = running
        moved = Running(mean, var, count, momentum or 0.0)
    if ending is None:
        again = partial(_differentiable, formula, bias)
        y, table = nodes.normalize_pooled(kernels, x, weight, bias, pooling, moved, again)
    else:
        call = ended_nodes.Ended(ending.activation, (), pooling, moved)
        y, table = _normalize_ended(kernels, x, parameters, ending, call, formula)
    if running is not None and moved is None:
        mean, var = table[:, -running.mean.numel() :]
        running.follow_(Moments(mean, var), running.partition.group_sizes(x.shape)[0])
    return y


def _given_by_operator(
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

    statistics, options = (groups.mean[0], groups.var[0]), (partition.num_groups, eps)
    if ending is not None:
        call = ended_nodes.Ended(ending.activation, statistics, options)
        return _normalize_ended(kernels, x, parameters, ending, call, formula)[0]
    again = partial(_differentiable, formula, bias)
    return nodes.normalize_given(kernels, x, statistics, weight, bias, options, again)


def _normalize_ended(
    kernels: nodes.Kernels,
    x: FeatureMap,
    parameters: Parameters,
    ending: Ending,
    call: ended_nodes.Ended,
    formula: Formula,
) -> tuple[FeatureMap, Any]:
    """Compute ``act(norm(x) + residual)``."""
    weight, bias, _ = parameters
    again = differentiable_ended(formula, ending.activation, ending.residual is not None)
    return ended_nodes.normalize_ended(kernels, x, ending.residual, weight, bias, call, again)


def _differentiable(
    formula: Formula,
    bias: PerChannel | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of the formula that autograd can differentiate again."""
    dx, dweight, dbias = differentiable_gradient(formula, (x, weight, bias), wanted, grad)
    return dx, dweight, dbias
