"""What the norms over one partition share."""

from __future__ import annotations

from normkit.core.groups import normalize_batch, normalize_evaluation
from normkit.core.parameters import Parameters, empty_result
from normkit.core.partition import Partition, require_variance
from normkit.core.running import RunningStatistics
from normkit.functional.arguments import require_arguments, require_statistics
from normkit.typing import FeatureMap


def normalize_single(
    x: FeatureMap,
    groups: Partition,
    running: RunningStatistics | None,
    parameters: Parameters,
    training: bool,
    name: str,
) -> FeatureMap:
    """Check the arguments of a norm of this name, and normalise."""
    require_arguments(x, parameters, name)
    if x.numel() == 0:
        return empty_result(x, *parameters[:2])
    if training:
        require_variance(groups, x.shape, name)
        return normalize_batch(x, groups, running, parameters)
    running = require_statistics(running, name)
    return normalize_evaluation(x, groups, running, parameters)
