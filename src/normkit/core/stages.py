"""Composite norms: choose the batch stage's statistics, normalise, and update the buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from normkit.core.algebra import (
    EstimatedStatistics,
    GroupStatistics,
    Rule,
    SynchronizedStatistics,
    WeighedStatistics,
)
from normkit.core.composite import Composite, batch_input
from normkit.core.ending import Ending, differentiable_ended, ended
from normkit.core.mask import Valid
from normkit.core.moments import Moments
from normkit.core.normalize import differentiable_gradient, measure, normalize, plain
from normkit.core.parameters import Parameters
from normkit.core.partition import Partition, has_single_values, require_counted_variance
from normkit.core.ranks import gather, merge
from normkit.core.routes import composite_route, stage_route
from normkit.core.running import (
    Running,
    RunningEstimates,
    RunningStatistics,
    buffers_are_frozen,
    is_recomputing,
)
from normkit.core.synchronized import follow_all_
from normkit.core.trace import Source, batch_rule, programs_in_graph, programs_of
from normkit.kernels import ended_nodes, nodes
from normkit.kernels.activations import Activation
from normkit.kernels.calls import (
    Buffers,
    DifferentiableComposite,
    DifferentiableEndedComposite,
    MomentTable,
    Programs,
    Slots,
)
from normkit.kernels.reference import table_dtype
from normkit.kernels.select import decide
from normkit.typing import FeatureMap

Formula = Callable[[Tensor, Tensor], Callable[..., Tensor]]
"""Of x and the kept table: the composite of x and its parameters, in plain operators."""


NO_BUFFERS = Buffers()


class BatchStage(NamedTuple):
    """The rule of a composite's batch stage, and the tables that the rule takes."""

    rule: Rule
    given: tuple[Tensor, ...]


def batch_stage(
    x: FeatureMap, num_channels: int, running: Running | None, training: bool, eps: float
) -> BatchStage:
    """Choose the statistics: the input's own or estimates in training, running ones afterwards."""
    partition = Partition(num_groups=num_channels)
    if running is None or (training and isinstance(running, RunningStatistics)):
        return BatchStage(GroupStatistics(partition=partition, eps=eps), ())
    given = _rows(x, running.mean, running.var)
    if training and isinstance(running, RunningEstimates):
        rate = given[0].new_full((), running.update_rate)
        return BatchStage(EstimatedStatistics(partition=partition, eps=eps), (*given, rate))
    own = Partition(num_groups=num_channels, examples_per_group=1)
    weight = running.example_weight
    return BatchStage(WeighedStatistics(partition=own, eps=eps, example_weight=weight), given)


def synchronized(
    stage: BatchStage, seen: Moments, ranks: dist.ProcessGroup
) -> tuple[BatchStage, Tensor]:
    """Make a stage in training use the batches of all processes.

    Args:
        stage: The batch stage of this process.
        seen: Counted moments of the stage's input in this process.
        ranks: The process group.

    Returns:
        The stage, and the gathered rows.
    """
    partition, eps = stage.rule.partition, stage.rule.eps
    rows = gather(partition.pool(seen), ranks)
    if isinstance(stage.rule, EstimatedStatistics):
        return BatchStage(stage.rule, (*stage.given, rows)), rows
    rule = SynchronizedStatistics(partition=partition, gathered=partition, eps=eps, ranks=ranks)
    return BatchStage(rule, (rows,)), rows


def update_running_(
    running: Running | None, stage: BatchStage, table: Moments, shape: Sequence[int]
) -> None:
    """Update buffers after a training batch of this shape; ``table`` is of the stage's input."""
    if isinstance(running, RunningEstimates):
        moved = stage.rule.groups(table, *stage.given)
        running.remember(table.mean.detach(), torch.cat((moved.mean, moved.var)).detach())
        running.follow_(moved)
    elif running is not None:
        running.update_(table, shape)


def _rows(x: FeatureMap, *values: Tensor) -> tuple[Tensor, ...]:
    """Copy buffers ``(C,)`` to rows ``(1, C)``, which later updates do not change."""
    return tuple(value.to(table_dtype(x.dtype), copy=True)[None] for value in values)


def normalize_estimated(
    x: FeatureMap,
    running: Running | None,
    training: bool,
    parameters: Parameters,
    ranks: dist.ProcessGroup | None = None,
    valid: Valid | None = None,
) -> FeatureMap:
    """Normalise by a composite's batch stage alone."""
    weight, bias, eps = parameters
    running = _running_of_call(x, running, training, valid)
    stage = batch_stage(x, x.shape[1], running, training, eps)
    if ranks is not None and training:
        seen = measure(x, positions(x), valid).counted(positions(x))
        stage, _ = synchronized(stage, seen, ranks)
    given = (weight, bias, *stage.given)
    way = decide(x, stage_route(ranks is not None and training, valid is not None)).way
    y, table = normalize(x, positions(x), stage.rule, *given, valid=valid, way=way)
    if training:
        update_running_(running, stage, table, x.shape)
    return y


def normalize_composite(  # noqa: PLR0913 - everything that a composite combines
    x: FeatureMap,
    composite: Composite,
    running: Running | None,
    training: bool,
    parameters: tuple[Tensor | None, ...],
    ranks: dist.ProcessGroup | None,
    valid: Valid | None,
    ending: Ending | None = None,
) -> FeatureMap:
    """Normalise by a composite, add and activate; ``running`` tracks the batch stage's input.

    Args:
        x: Feature map, ``(N, C, *S)``.
        composite: The composite's formula and options.
        running: The batch stage's buffers.
        training: Whether the batch stage is in training mode.
        parameters: The composite's parameters, in the order of its formula.
        ranks: The process group, if several processes have parts of the batch.
        valid: Mask of the valid positions; None if all are valid.
        ending: The residual and the activation that follow; None if nothing does.
    """
    running = _running_of_call(x, running, training, valid)
    if ranks is not None and training:
        y = _normalize_part(x, composite, running, parameters, ranks, valid)
        return ended(y, ending, valid)
    is_beside = composite.num_beside > 0
    call = composite_route(running, training, False, valid is not None, is_beside)
    way, name, _, kernels = decide(x, call)
    if way == "operator":
        is_traced = kernels is None and torch.compiler.is_compiling()
        statistics = _statistics(running, training, call.why_torch_moves is None, is_traced)
        sizes = tuple([None if p is None else p.numel() for p in parameters])
        look_up = programs_in_graph if is_traced else programs_of
        programs = look_up(composite, x.shape[1], sizes, statistics.source)
        is_on_triton = name == "triton"
        if programs.why_not is None and not (is_on_triton and programs.why_not_triton):
            given = (composite, parameters, statistics, ending)
            return _normalize_by_operator(kernels, x, programs, *given)
        way = "tables"
    num_channels = composite.num_batch_channels(x.shape[1])
    stage = batch_stage(x, num_channels, running, training, composite.batch_eps)
    rule = composite.algebra(stage.rule)
    given = (*parameters, *stage.given)
    y, table = normalize(x, positions(x), rule, *given, valid=valid, way=way)
    if training and running is not None:
        seen = batch_input(rule, table)
        update_running_(running, stage, seen, (x.shape[0], num_channels, *x.shape[2:]))
    return ended(y, ending, valid)


def _normalize_by_operator(  # noqa: PLR0913
    kernels: nodes.Kernels,
    x: FeatureMap,
    programs: Programs,
    composite: Composite,
    parameters: tuple[Tensor | None, ...],
    statistics: _Statistics,
    ending: Ending | None,
) -> FeatureMap:
    """Normalise by one operator, in place of dozens of operations on tables."""
    source, share, buffers, pending = statistics
    first, second, third, fourth = (*parameters, None, None, None, None)[:4]
    slots = first, second, third, fourth
    options, formula = (programs, share), _formula(composite, source, share, len(parameters))
    if ending is None:
        again = _differentiable(formula)
        y, table = nodes.normalize_composite(kernels, x, slots, options, buffers, again)
    else:
        activation, residual = ending
        again = _ended_differentiable(formula, activation, residual is not None)
        y, table = ended_nodes.normalize_ended_composite(
            kernels, x, residual, slots, activation, options, buffers, again
        )
    if pending is not None:
        _do_pending(pending, x.shape, table, programs.kept_columns)
    return y


def _do_pending(
    pending: Running, shape: Sequence[int], table: MomentTable, num_channels: int
) -> None:
    """Do what the operator has not done with the batch stage's buffers."""
    batch = table.narrow(1, table.shape[1] - num_channels, num_channels)
    if isinstance(pending, RunningStatistics):
        num_values = shape[0] * math.prod(shape[2:])
        pending.follow_(Moments(batch[0], batch[1]), num_values)
    elif torch.compiler.is_compiling():
        pending.follow_(Moments(batch[:1], batch[1:]))
    else:
        pending.remember(table.as_strided(shape[:2], (shape[1], 1)), batch)  # means lie first


class _Statistics(NamedTuple):
    """Where the operator gets the batch stage's statistics, and which buffers it updates."""

    source: Source
    share: float = 0.0  # weight of the input's statistics in the update or the mixture
    buffers: Buffers = NO_BUFFERS
    pending: Running | None = None  # buffers with an update that the operator does not do


def _statistics(
    running: Running | None, training: bool, kernels_move: bool, is_traced: bool
) -> _Statistics:
    is_single = not isinstance(running, RunningEstimates)
    if running is None or (training and is_single and is_recomputing(may_be_traced=is_traced)):
        return _Statistics("own")
    mean, var, count, rate, weight, *_ = running
    if not training:
        return _evaluation_statistics(float(weight), Buffers(mean, var))
    # In a traced call the kernels do not update buffers: its node must not change its inputs.
    if isinstance(running, RunningEstimates):
        if rate == 0:  # checkpoint recomputation, or track_running_stats is off
            return _Statistics("given", buffers=Buffers(mean, var))
        buffers = Buffers(mean, var) if is_traced else Buffers(None, None, mean, var, count)
        return _Statistics("estimates", running.update_rate, buffers, running)
    if rate is None or is_traced or not kernels_move:
        return _Statistics("own", pending=running)
    return _Statistics("own", rate, Buffers(None, None, mean, var, count))


def _evaluation_statistics(example_weight: float, given: Buffers) -> _Statistics:
    if example_weight in (0.0, 1.0):
        return _Statistics("given" if example_weight == 0 else "example", buffers=given)
    return _Statistics("mixed", example_weight, given)


def _formula(composite: Composite, source: Source, share: float, num_parameters: int) -> Formula:
    def formula(x: Tensor, table: Tensor) -> Callable[..., Tensor]:
        size = composite.num_batch_channels(x.shape[1])
        kept = table[:, None, table.shape[1] - size :].to(table_dtype(x.dtype))
        given = () if source == "own" else (kept[0], kept[1])
        rule = batch_rule("given" if source == "estimates" else source, composite, size, share)
        algebra = composite.algebra(rule)

        def call(x: Tensor, *parameters: Tensor | None) -> Tensor:
            used = (*parameters[:num_parameters], *given)
            return plain(x, math.prod(x.shape[2:]), algebra, used)[0]

        return call

    return formula


def _differentiable(formula: Formula) -> DifferentiableComposite:
    """Make the function that computes gradients which autograd can differentiate again."""

    def gradients(
        grad: Tensor, x: Tensor, table: Tensor, slots: Slots, wanted: tuple[bool, ...]
    ) -> list[Tensor | None]:
        return differentiable_gradient(formula(x, table), (x, *slots), wanted, grad)

    return gradients


def _ended_differentiable(
    formula: Formula, activation: Activation, has_residual: bool
) -> DifferentiableEndedComposite:
    """The same of what follows too."""

    def gradients(
        grad: Tensor,
        x: Tensor,
        kept: Tensor | None,
        table: Tensor,
        slots: Slots,
        wanted: tuple[bool, ...],
    ) -> list[Tensor | None]:
        again = differentiable_ended(formula(x, table), activation, has_residual)
        return [*again(grad, (x, *slots), kept, wanted)]

    return gradients


def _normalize_part(
    x: FeatureMap,
    composite: Composite,
    running: Running | None,
    parameters: tuple[Tensor | None, ...],
    ranks: dist.ProcessGroup,
    valid: Valid | None,
) -> FeatureMap:
    """Normalise this process's part of a training batch that several processes share."""
    table = measure(x, positions(x), valid).counted(positions(x))
    num_channels = composite.num_batch_channels(x.shape[1])
    stage = batch_stage(x, num_channels, running, True, composite.batch_eps)
    seen = batch_input(composite.algebra(stage.rule), table)
    stage, rows = synchronized(stage, seen, ranks)
    merged, name = merge(rows), "a norm over several processes"
    if has_single_values(x) and isinstance(stage.rule, SynchronizedStatistics):
        shape = (x.shape[0], num_channels, *x.shape[2:])
        require_counted_variance(stage.rule.partition, shape, merged, name)
    rule, given = composite.algebra(stage.rule), (*parameters, *stage.given)
    call = composite_route(running, True, True, valid is not None, composite.num_beside > 0)
    way, known = decide(x, call).way, (None, table)
    y, _ = normalize(x, positions(x), rule, *given, known=known, valid=valid, way=way)
    if isinstance(running, RunningEstimates):
        update_running_(running, stage, seen, x.shape)
    elif running is not None and not buffers_are_frozen():
        follow_all_(running, merged)
    return y


def _running_of_call(
    x: FeatureMap, running: Running | None, training: bool, valid: Valid | None
) -> Running | None:
    """During checkpoint recomputation, reuse the first forward's estimates and do not move them."""
    if not training or not isinstance(running, RunningEstimates) or not is_recomputing():
        return running
    # ``measure`` records no gradient: checkpointing raises an error if the recomputation saves a
    # different number of tensors than the first forward did.
    return running.used_for_the_batch(measure(x, positions(x), valid).mean)


def positions(x: FeatureMap) -> int:
    """Number of positions of the map, which are one segment in every composite."""
    return math.prod(x.shape[2:])
