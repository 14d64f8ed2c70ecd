"""Single-partition norms: by the input's statistics, the running ones, or a mixture."""

from __future__ import annotations

from torch import Tensor

from normkit.core.algebra import GroupStatistics, WeighedStatistics, fixed_tables
from normkit.core.compiled import normalize_compiled
from normkit.core.ending import Ending, ended
from normkit.core.mask import Valid, on_valid
from normkit.core.moments import Moments
from normkit.core.normalize import apply_tables, normalize
from normkit.core.parameters import Parameters
from normkit.core.partition import Partition
from normkit.core.pooled import normalize_given, normalize_pooled
from normkit.core.routes import batch_route, evaluation_route
from normkit.core.running import RunningStatistics
from normkit.kernels.reference import table_dtype
from normkit.kernels.select import decide
from normkit.typing import FeatureMap


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
    way, _, _, operators = decide(x, call)
    if way == "operator":
        kernels_move = call.why_torch_moves is None
        return normalize_pooled(operators, x, partition, running, parameters, kernels_move, ending)
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
    way, _, _, operators = decide(x)
    if way == "operator":
        return normalize_given(operators, x, partition, groups, parameters, ending)
    tables = fixed_tables(groups, partition, x.shape, parameters)
    return ended(apply_tables(x, *tables, partition.segment_size(x.shape)), ending)
