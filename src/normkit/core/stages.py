"""Composite norms: choose the batch stage's statistics, normalise, let the buffers follow."""

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
from normkit.core.ending import Ending, ended
from normkit.core.mask import Valid
from normkit.core.moments import Moments
from normkit.core.normalize import differentiable_gradient, measure, normalize, plain
from normkit.core.parameters import Parameters
from normkit.core.partition import Partition, has_single_values, require_counted_variance
from normkit.core.pooled import ended_again
from normkit.core.ranks import gather, merge
from normkit.core.routes import composite_route, stage_route
from normkit.core.running import (
    Running,
    RunningEstimates,
    RunningStatistics,
    are_still,
    is_second_look,
)
from normkit.core.synchronized import follow_all_
from normkit.core.trace import Source, batch_rule, followed, followed_in_graph
from normkit.kernels import ended_nodes, nodes
from normkit.kernels.activations import Activation
from normkit.kernels.calls import (
    Buffers,
    DifferentiableComposite,
    DifferentiableEndedComposite,
    Programs,
    Slots,
)
from normkit.kernels.reference import table_dtype
from normkit.kernels.select import decide
from normkit.typing import FeatureMap

AT_ONCE = "ended_composite_forward"
"""The operator of kernels that go on to what follows in the norm's pass."""
Formula = Callable[[Tensor, Tensor], Callable[..., Tensor]]
"""Of x and the kept table: the composite of x and its parameters, in plain operators."""


class BatchStage(NamedTuple):
    """Where a channel's statistics over the batch come from, and the tables it needs for that."""

    rule: Rule
    given: tuple[Tensor, ...]


def batch_stage(
    x: FeatureMap, num_channels: int, running: Running | None, training: bool, eps: float
) -> BatchStage:
    """The input's own statistics or moving estimates in training, afterwards the running ones."""
    partition = Partition(num_groups=num_channels)
    if running is None or (training and isinstance(running, RunningStatistics)):
        return BatchStage(GroupStatistics(partition=partition, eps=eps), ())
    given = tables(x, running.mean, running.var)
    if training and isinstance(running, RunningEstimates):
        rate = given[0].new_full((), running.update_rate)
        return BatchStage(EstimatedStatistics(partition=partition, eps=eps), (*given, rate))
    own = Partition(num_groups=num_channels, examples_per_group=1)
    weight = running.example_weight
    return BatchStage(WeighedStatistics(partition=own, eps=eps, example_weight=weight), given)


def synchronized(
    stage: BatchStage, seen: Moments, ranks: dist.ProcessGroup
) -> tuple[BatchStage, Tensor]:
    """Let a stage in training look at all processes' batches; ``seen`` is this one's, counted.

    Returns:
        The stage, and what was gathered.
    """
    partition, eps = stage.rule.partition, stage.rule.eps
    rows = gather(partition.pool(seen), ranks)
    if isinstance(stage.rule, EstimatedStatistics):
        return BatchStage(stage.rule, (*stage.given, rows)), rows
    rule = SynchronizedStatistics(partition=partition, gathered=partition, eps=eps, ranks=ranks)
    return BatchStage(rule, (rows,)), rows


def follow_(
    running: Running | None, stage: BatchStage, table: Moments, shape: Sequence[int]
) -> None:
    """Keep what a training batch of this shape has taught; ``table`` is what the stage saw."""
    if isinstance(running, RunningEstimates):
        moved = stage.rule.groups(table, *stage.given)
        running.remember(table.mean, moved)
        running.follow_(moved)
    elif running is not None:
        running.update_(table, shape)


def tables(x: FeatureMap, *values: Tensor) -> tuple[Tensor, ...]:
    """Buffers ``(C,)`` as rows ``(1, C)``: copies, since backward must not see later updates."""
    return tuple(value.to(table_dtype(x.dtype), copy=True)[None] for value in values)


def normalize_estimated(
    x: FeatureMap,
    running: Running | None,
    training: bool,
    parameters: Parameters,
    ranks: dist.ProcessGroup | None = None,
    valid: Valid | None = None,
) -> FeatureMap:
    """A batch stage alone."""
    weight, bias, eps = parameters
    running = _at_second_look(x, running, training, valid)
    stage = batch_stage(x, x.shape[1], running, training, eps)
    if ranks is not None and training:
        seen = measure(x, positions(x), valid).counted(positions(x))
        stage, _ = synchronized(stage, seen, ranks)
    given = (weight, bias, *stage.given)
    way = decide(x, stage_route(ranks is not None and training, valid is not None)).way
    y, table = normalize(x, positions(x), stage.rule, *given, valid=valid, way=way)
    if training:
        follow_(running, stage, table, x.shape)
    return y


def normalize_composite(  # noqa: PLR0913 - everything that the method mixes
    x: FeatureMap,
    composite: Composite,
    running: Running | None,
    training: bool,
    parameters: tuple[Tensor | None, ...],
    ranks: dist.ProcessGroup | None,
    valid: Valid | None,
    ending: Ending | None = None,
) -> FeatureMap:
    """Normalise by a composite, and go on; ``running`` follows what its batch stage sees.

    Args:
        x: Feature map, ``(N, C, *S)``.
        composite: What is computed.
        running: The batch stage's buffers.
        training: Whether the batch stage is trained.
        parameters: Of the composite, in the order of its formula.
        ranks: The processes that have parts of the batch, if others have.
        valid: Which positions are valid, if not all are.
        ending: What follows.
    """
    running = _at_second_look(x, running, training, valid)
    if ranks is not None and training:
        y = _normalize_part(x, composite, running, parameters, ranks, valid)
        return ended(y, ending, valid)
    is_beside = composite.num_beside > 0
    call = composite_route(running, training, False, valid is not None, is_beside)
    way, kernels, _, operators = decide(x, call)
    if way == "operator":
        statistics = _statistics(running, training, call.why_torch_moves is None)
        sizes = tuple([None if p is None else p.numel() for p in parameters])
        look_up = followed_in_graph if torch.compiler.is_compiling() else followed
        programs = look_up(composite, x.shape[1], sizes, statistics.source)
        is_on_triton = kernels == "triton"
        if programs.why_not is None and not (is_on_triton and programs.why_not_triton):
            at_once = ending if hasattr(operators, AT_ONCE) else None
            given = (composite, parameters, statistics, at_once)
            y = _normalize_by_operator(operators, x, programs, *given)
            return y if at_once is ending else ended(y, ending)
        way = "tables"
    num_channels = composite.num_batch_channels(x.shape[1])
    stage = batch_stage(x, num_channels, running, training, composite.batch_eps)
    rule = composite.algebra(stage.rule)
    given = (*parameters, *stage.given)
    y, table = normalize(x, positions(x), rule, *given, valid=valid, way=way)
    if training and running is not None:
        seen = batch_input(rule, table)
        follow_(running, stage, seen, (x.shape[0], num_channels, *x.shape[2:]))
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
    source, share, buffers, follower = statistics
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
    if follower is not None:
        size, num_cells = programs.kept_columns, x.shape[0] * x.shape[1]
        batch = Moments(table[:1, -size:], table[1:, -size:])
        if isinstance(follower, RunningStatistics):
            num_values = x.shape[0] * math.prod(x.shape[2:])
            follower.follow_(Moments(batch.mean[0], batch.var[0]), num_values)
        else:
            follower.remember(table[0, :num_cells].view(x.shape[0], -1), batch)
            if torch.compiler.is_compiling():
                follower.follow_(batch)
    return y


class _Statistics(NamedTuple):
    """Where the batch stage's statistics come from, and what follows them."""

    source: Source
    share: float = 0.0  # of what the input says, in what is moved or mixed
    buffers: Buffers = Buffers()
    follower: Running | None = None  # of what the operator does not do to the buffers


def _statistics(running: Running | None, training: bool, kernels_move: bool) -> _Statistics:
    if running is None or (training and isinstance(running, RunningStatistics) and are_still()):
        return _Statistics("own")
    given = Buffers(running.mean, running.var)
    if not training:
        return _given(float(running.example_weight), given)
    moved = Buffers(None, None, running.mean, running.var, running.num_batches_tracked)
    is_traced = torch.compiler.is_compiling()  # a traced node must not change its inputs
    if isinstance(running, RunningEstimates):
        if running.update_rate == 0:  # during checkpoint recomputation, or not tracking
            return _Statistics("given", buffers=given)
        buffers = given if is_traced else moved
        return _Statistics("estimates", running.update_rate, buffers, running)
    if running.momentum is None or is_traced or not kernels_move:
        return _Statistics("own", follower=running)
    return _Statistics("own", running.momentum, moved)


def _given(example_weight: float, given: Buffers) -> _Statistics:
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
    """Gradients that can be differentiated again, of the algebra in plain operators."""

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
        again = ended_again(formula(x, table), activation, has_residual)
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
    """Train on this process's part of a batch that several have parts of."""
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
        follow_(running, stage, seen, x.shape)
    elif running is not None and not are_still():
        follow_all_(running, merged)
    return y


def _at_second_look(
    x: FeatureMap, running: Running | None, training: bool, valid: Valid | None
) -> Running | None:
    """During checkpoint recomputation, reuse the first forward's estimates and do not move them."""
    if not training or not isinstance(running, RunningEstimates) or not is_second_look():
        return running
    # Without a gradient: a checkpoint counts the tensors that are saved for backward.
    return running.as_they_were(measure(x, positions(x), valid).mean)


def positions(x: FeatureMap) -> int:
    """Elements of a channel's plane: a segment of every composite."""
    return math.prod(x.shape[2:])
