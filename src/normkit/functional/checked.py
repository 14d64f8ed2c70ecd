"""Each method with its checks, as the layers and the functions without state call it.

The arguments that all of them share are

- ``running``: buffers that training updates and evaluation normalises by; None uses the input's
  own statistics in both;
- ``training``: whether groups of a single value are refused and ``running`` is updated;
- ``parameters``: scale and shift of each channel, and ``eps``;
- ``name``: the called layer or function, for error messages;
- ``ranks``: the process group, if several processes hold parts of the batch;
- ``valid``: mask of the valid positions; None if all are valid;
- ``ending``: residual and activation that follow in the same pass. Only ``normalize_single`` takes
  it; callers of the others apply it afterwards.

With ``ranks`` a composite is computed even if this process has no examples, because the others wait
for it in the exchange of statistics.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from normkit.core.composite import (
    Composite,
    Order,
    batch_then_group,
    group_and_batch,
    instance_beside_batch,
    switched,
)
from normkit.core.ending import Ending, ended
from normkit.core.groups import normalize_batch, normalize_evaluation
from normkit.core.mask import Valid
from normkit.core.parameters import Parameters, empty_result
from normkit.core.partition import Partition, has_single_values, require_variance
from normkit.core.positional import normalize_positions, require_channels
from normkit.core.routes import composite_route
from normkit.core.running import Running, RunningEstimates, RunningStatistics
from normkit.core.stages import normalize_composite
from normkit.core.synchronized import normalize_part
from normkit.core.whitening import whiten_groups
from normkit.kernels.select import decide
from normkit.typing import FeatureMap


def normalize_single(  # noqa: PLR0913 - see the top of this file
    x: FeatureMap,
    partition: Partition,
    running: RunningStatistics | None,
    parameters: Parameters,
    training: bool,
    name: str,
    ranks: dist.ProcessGroup | None = None,
    valid: Valid | None = None,
    ending: Ending | None = None,
) -> FeatureMap:
    """Normalise by the statistics of one partition: all methods but composites and whitening."""
    if ranks is not None and (running is not None or partition.examples_per_group != 1):
        y = normalize_part(x, partition, running, parameters, ranks, valid)
        return ended(y, ending, valid)
    num_values = x.numel()
    if num_values == 0:
        return ended(empty_result(x, *parameters[:2]), ending)
    if training and num_values == x.shape[0] * partition.num_groups:
        require_variance(partition, x.shape, name)
    if training or running is None:
        return normalize_batch(x, partition, running, parameters, valid, ending)
    return normalize_evaluation(x, partition, running, parameters, valid, ending)


def normalize_positional(
    x: FeatureMap,
    parameters: Parameters,
    training: bool,
    name: str,
    valid: Valid | None = None,
    ending: Ending | None = None,
) -> FeatureMap:
    """Normalise every position over its channels."""
    if training and x.numel():
        require_channels(x.shape, name)
    return normalize_positions(x, parameters, valid, ending)


def whiten(  # noqa: PLR0913
    x: FeatureMap,
    num_groups: int,
    num_iterations: int,
    parameters: Parameters,
    training: bool,
    name: str,
    valid: Valid | None = None,
) -> FeatureMap:
    """Decorrelate the groups of channels of every example."""
    if x.numel() == 0:
        return empty_result(x, *parameters[:2])
    if training:
        require_variance(_each_example(num_groups), x.shape, name)
    return whiten_groups(x, num_groups, num_iterations, parameters, valid)


def normalize_batch_then_group(  # noqa: PLR0913
    x: FeatureMap,
    num_groups: int,
    running: Running | None,
    training: tuple[bool, bool],
    batch: Parameters,
    group: Parameters,
    name: str,
    ranks: dist.ProcessGroup | None = None,
    valid: Valid | None = None,
    ending: Ending | None = None,
) -> FeatureMap:
    """Apply the batch stage, then a group norm; ``running`` tracks the statistics of ``x``.

    ``training`` holds the modes of the batch stage and of the group norm.
    """
    if x.numel() == 0 and ranks is None:
        return ended(empty_result(x, *batch[:2], *group[:2]), ending)
    if has_single_values(x):
        is_estimated = isinstance(running, RunningEstimates)
        if training[0] and ranks is None and not is_estimated:
            require_variance(Partition(num_groups=x.shape[1]), x.shape, name)
        if training[1]:
            require_variance(_each_example(num_groups), x.shape, name)

    composite = Composite(batch_then_group, (num_groups, group.eps), batch.eps)
    slots = (*batch[:2], *group[:2])
    return normalize_composite(x, composite, running, training[0], slots, ranks, valid, ending)


def normalize_group_and_batch(  # noqa: PLR0913
    x: FeatureMap,
    num_groups: int,
    order: Order,
    running: RunningStatistics | None,
    training: bool,
    parameters: Parameters,
    mix_logit: Tensor,
    name: str,
    ranks: dist.ProcessGroup | None = None,
    valid: Valid | None = None,
    ending: Ending | None = None,
) -> FeatureMap:
    """Mix group norm and batch norm; ``running`` tracks the batch norm's input."""
    weight, bias, eps = parameters
    slots = (weight, bias, mix_logit)
    if x.numel() == 0 and ranks is None:
        return ended(empty_result(x, *slots), ending)
    if training and has_single_values(x):
        require_variance(_each_example(num_groups), x.shape, name)
        if ranks is None:
            require_variance(Partition(num_groups=x.shape[1]), x.shape, name)

    composite = Composite(group_and_batch, (num_groups, eps, order), eps)
    return normalize_composite(x, composite, running, training, slots, ranks, valid, ending)


def normalize_switched(  # noqa: PLR0913
    x: FeatureMap,
    running: RunningStatistics | None,
    training: bool,
    parameters: Parameters,
    mean_logits: Tensor,
    var_logits: Tensor,
    name: str,
    ranks: dist.ProcessGroup | None = None,
    valid: Valid | None = None,
    ending: Ending | None = None,
) -> FeatureMap:
    """Mix the statistics of instance norm, layer norm and, with three logits, batch norm."""
    weight, bias, eps = parameters
    slots = (weight, bias, mean_logits, var_logits)
    uses_batch = mean_logits.numel() == 3
    if x.numel() == 0 and ranks is None:
        return ended(empty_result(x, *slots), ending)
    if training and ranks is None and has_single_values(x):
        widest = Partition(num_groups=x.shape[1]) if uses_batch else _each_example(1)
        require_variance(widest, x.shape, name)

    composite = Composite(switched, (eps, uses_batch), eps, has_batch=uses_batch)
    followed = running if uses_batch else None
    return normalize_composite(x, composite, followed, training, slots, ranks, valid, ending)


def normalize_instance_beside_batch(  # noqa: PLR0913
    x: FeatureMap,
    num_instance: int,
    running: RunningStatistics | None,
    training: tuple[bool, bool],
    instance: Parameters,
    batch: Parameters,
    name: str,
    ranks: dist.ProcessGroup | None = None,
    valid: Valid | None = None,
    ending: Ending | None = None,
) -> FeatureMap:
    """Apply instance norm to the first channels and batch norm to the others.

    ``running`` belongs to the batch norm; ``training`` holds the modes of both norms.
    """
    slots = (*instance[:2], *batch[:2])
    if x.numel() == 0 and ranks is None:
        return ended(empty_result(x, *slots), ending)
    own = _each_example(num_instance)
    if has_single_values(x):
        examples, channels, *positions = x.shape
        rest = channels - num_instance
        if training[0]:
            require_variance(own, (examples, num_instance, *positions), name)
        if training[1] and ranks is None:
            require_variance(Partition(num_groups=rest), (examples, rest, *positions), name)
    if not training[1] and running is not None:
        call = composite_route(running, False, False, valid is not None, True)
        if decide(x, call).way in {"formula", "graph"}:
            # Composites write the result around the input's own mean, so one infinite value of the
            # input would spread over its channel. The running statistics alone do not do that.
            first, rest = x[:, :num_instance], x[:, num_instance:]
            first = normalize_batch(first, own, None, instance, valid)
            rest = normalize_evaluation(rest, running.partition, running, batch, valid)
            return ended(torch.cat((first, rest), dim=1), ending, valid)

    options = (num_instance, instance.eps)
    composite = Composite(instance_beside_batch, options, batch.eps, num_beside=num_instance)
    return normalize_composite(x, composite, running, training[1], slots, ranks, valid, ending)


def _each_example(num_groups: int) -> Partition:
    return Partition(num_groups=num_groups, examples_per_group=1)
