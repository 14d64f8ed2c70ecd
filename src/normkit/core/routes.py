"""What decides, beside the input, which kernels compute a call: see ``kernels.select.decide``.

``normkit.explain`` asks a layer for the routes of its next call; the functions that compute a call
use the same functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.core.running import Running, RunningEstimates, RunningStatistics
from normkit.kernels.select import ORDINARY, Call

MASKED = Call(why_formula="statistics over a mask are computed in plain torch operators")
WHITENING = Call(why_formula="whitening is computed in plain torch operators")
POSITIONAL = Call(span="position")
SYNCHRONIZED = Call(why_tables="the statistics of several processes are merged")
MIXED = Call(why_tables="own and running statistics are mixed")
ALONE = Call(why_tables="the batch stage is computed without the other")
MANY_WEIGHTS = Call(why_tables="every example has a weight of its own")
NOT_MOVABLE = "not contiguous, or neither float32 nor float64"
IMMOVABLE_ESTIMATES = Call(why_tables=f"the estimates are {NOT_MOVABLE}")
_WIDE = (torch.float32, torch.float64)
_COMPOSITE = Call(span="group")
_NO_MOMENTUM = Call(why_torch_moves="their momentum is None")
_IMMOVABLE = Call(why_torch_moves=f"they are {NOT_MOVABLE}")


def batch_route(running: Running | None, is_part: bool, is_masked: bool) -> Call:
    """Route of a single norm that uses the input's own statistics and updates ``running``.

    Args:
        running: Buffers that the call updates.
        is_part: Whether other processes have parts of the batch.
        is_masked: Whether statistics are of valid positions only.
    """
    if is_masked:
        return MASKED
    if is_part:
        return SYNCHRONIZED
    if running is None:
        return ORDINARY
    mean, var, _, rate, *_ = running
    if rate is None:
        return _NO_MOMENTUM
    are_wide = mean.dtype in _WIDE and var.dtype in _WIDE
    return ORDINARY if are_wide and mean.is_contiguous() and var.is_contiguous() else _IMMOVABLE


def evaluation_route(running: RunningStatistics, is_masked: bool) -> Call:
    """Route of a single norm by running statistics, mixed with the example's own."""
    share = running.example_weight
    if not isinstance(share, Tensor) and share == 0:
        return ORDINARY
    if is_masked:
        return MASKED
    return ORDINARY if not isinstance(share, Tensor) and share == 1 else MIXED


def stage_route(is_part: bool, is_masked: bool) -> Call:
    """Route of a composite's estimating batch stage when it is computed alone."""
    if is_masked:
        return MASKED
    return SYNCHRONIZED if is_part else ALONE


def composite_route(
    running: Running | None, training: bool, is_part: bool, is_masked: bool, is_beside: bool
) -> Call:
    """Route of a composite; ``is_beside`` if its norms take different channels."""
    if is_masked:
        return MASKED
    if is_part:
        return SYNCHRONIZED
    if running is not None and isinstance(running.example_weight, Tensor):
        return MANY_WEIGHTS
    single = batch_route(running, False, False)
    if single is _IMMOVABLE and isinstance(running, RunningEstimates):
        return IMMOVABLE_ESTIMATES
    call = ORDINARY if is_beside else _COMPOSITE
    return single._replace(span=call.span) if training and single is not ORDINARY else call
