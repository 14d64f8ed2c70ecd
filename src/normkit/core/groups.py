"""The ways a partition's statistics are used: the input's, the running ones, a mixture."""

from __future__ import annotations

from torch import Tensor

from normkit.core.algebra import GroupStatistics, WeighedStatistics, fixed_tables
from normkit.core.mask import Valid, on_valid
from normkit.core.moments import Moments
from normkit.core.normalize import apply_tables, normalize
from normkit.core.parameters import Parameters
from normkit.core.partition import Partition
from normkit.core.pooled import normalize_given, normalize_pooled
from normkit.core.running import RunningStatistics
from normkit.kernels.reference import table_dtype
from normkit.kernels.select import operators_for
from normkit.typing import FeatureMap


def normalize_batch(
    x: FeatureMap,
    partition: Partition,
    running: RunningStatistics | None,
    parameters: Parameters,
    valid: Valid | None = None,
) -> FeatureMap:
    """Normalise by the statistics of the input's own groups; ``running`` follows them."""
    kernels = operators_for(x) if valid is None else None
    if kernels is not None:
        return normalize_pooled(kernels, x, partition, running, parameters)
    segment_size = partition.segment_size(x.shape)
    algebra = GroupStatistics(partition=partition, eps=parameters.eps)
    y, table = normalize(x, segment_size, algebra, parameters.weight, parameters.bias, valid=valid)
    if running is not None:
        running.update_(table, x.shape)
    return y


def normalize_evaluation(
    x: FeatureMap,
    partition: Partition,
    running: RunningStatistics,
    parameters: Parameters,
    valid: Valid | None = None,
) -> FeatureMap:
    """Normalise by running statistics and ``example_weight`` parts of the example's own."""
    own = Partition(num_groups=partition.num_groups, examples_per_group=1)
    share = running.example_weight
    if not isinstance(share, Tensor) and share == 1:
        return normalize_batch(x, own, None, parameters, valid=valid)
    groups = running.groups(partition, table_dtype(x.dtype))
    if not isinstance(share, Tensor) and share == 0:
        return on_valid(x, valid, lambda x: _normalize_fixed(x, partition, groups, parameters))
    weight, bias, eps = parameters
    algebra = WeighedStatistics(partition=own, eps=eps, example_weight=share)
    given = (weight, bias, groups.mean, groups.var)
    y, _ = normalize(x, own.segment_size(x.shape), algebra, *given, valid=valid)
    return y


def _normalize_fixed(
    x: FeatureMap, partition: Partition, groups: Moments, parameters: Parameters
) -> FeatureMap:
    """Normalise by given group statistics ``(1, G)``."""
    kernels = operators_for(x)
    if kernels is not None:
        return normalize_given(kernels, x, partition, groups, parameters)
    tables = fixed_tables(groups, partition, x.shape, parameters)
    return apply_tables(x, *tables, partition.segment_size(x.shape))
