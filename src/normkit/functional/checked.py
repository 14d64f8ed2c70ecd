"""Each method with its checks: what the layers call, and what the functions without state call.

All of these take

- ``running``: buffers that follow the batch in training and normalise at evaluation; None uses the
  input's own statistics in either case;
- ``training``: whether groups of a single value are refused, and whether ``running`` moves;
- ``parameters``: scale and shift of each channel, and ``eps``;
- ``name``: who was called, for the errors;
- ``ranks``: the processes that have parts of the batch, if others have;
- ``valid``: which positions are valid, if not all are;
- ``ending``: an activation and a residual that follow in the same pass, of the methods that have
  one; the others' callers do it afterwards.

A composite without examples is still computed where ``ranks`` are given: all processes must talk.
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
    """Normalise by the statistics of one partition: the eight methods that are one."""
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
    """A group norm of the batch stage's output; ``running`` follows ``x``.

    ``training`` is of the batch stage, and of the group norm.
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
    """Group norm and batch norm, mixed; ``running`` follows what the batch norm sees."""
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
    """Statistics of instance, layer and, with three logits, batch norm, mixed."""
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


def normalize_halves(  # noqa: PLR0913
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
    """Instance norm on the first channels, batch norm on the others, which ``running`` follows.

    ``training`` is of the instance norm, and of the batch norm.
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
            # Each norm by itself: written around the input's own mean, as composites are, one
            # infinite value of the input would spread over its channel.
            first, rest = x[:, :num_instance], x[:, num_instance:]
            left = normalize_batch(first, own, None, instance, valid)
            right = normalize_evaluation(rest, running.partition, running, batch, valid)
            return ended(torch.cat((left, right), dim=1), ending, valid)

    options = (num_instance, instance.eps)
    composite = Composite(instance_beside_batch, options, batch.eps, num_beside=num_instance)
    return normalize_composite(x, composite, running, training[1], slots, ranks, valid, ending)


def _each_example(num_groups: int) -> Partition:
    return Partition(num_groups=num_groups, examples_per_group=1)
