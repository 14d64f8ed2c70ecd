"""What about a call decides who computes it, beside its input: see ``kernels.select.decide``.

A layer says it of its next call, for ``normkit.explain``; the functions that compute say it of the
call at hand, by the same functions.
"""

from __future__ import annotations

from torch import Tensor

from normkit.core.running import Running, RunningEstimates, RunningStatistics, is_movable
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
_COMPOSITE = Call(span="group")
_NO_MOMENTUM = Call(why_torch_moves="their momentum is None")
_IMMOVABLE = Call(why_torch_moves=f"they are {NOT_MOVABLE}")


def batch_route(running: RunningStatistics | None, is_part: bool, is_masked: bool) -> Call:
    """A single norm by the input's own statistics, which ``running`` follows.

    Args:
        running: Buffers that move.
        is_part: Whether other processes have parts of the batch.
        is_masked: Whether statistics are of valid positions only.
    """
    if is_masked:
        return MASKED
    return SYNCHRONIZED if is_part else _follower_route(running)


def evaluation_route(running: RunningStatistics, is_masked: bool) -> Call:
    """A single norm by running statistics, ``example_weight`` parts of them the example's own."""
    share = running.example_weight
    if not isinstance(share, Tensor) and share == 0:
        return ORDINARY
    if is_masked:
        return MASKED
    return ORDINARY if not isinstance(share, Tensor) and share == 1 else MIXED


def stage_route(is_part: bool, is_masked: bool) -> Call:
    """The batch stage of a composite by itself, by estimates."""
    if is_masked:
        return MASKED
    return SYNCHRONIZED if is_part else ALONE


def composite_route(
    running: Running | None, training: bool, is_part: bool, is_masked: bool, is_halves: bool
) -> Call:
    """A composite; ``is_halves`` where its norms are on different channels."""
    if is_masked:
        return MASKED
    if is_part:
        return SYNCHRONIZED
    if running is not None and isinstance(running.example_weight, Tensor):
        return MANY_WEIGHTS
    if isinstance(running, RunningEstimates) and not is_movable(running):
        return IMMOVABLE_ESTIMATES
    call = ORDINARY if is_halves else _COMPOSITE
    if not training or not isinstance(running, RunningStatistics):
        return call
    follower = _follower_route(running)
    return call if follower is ORDINARY else follower._replace(span=call.span)


def _follower_route(running: RunningStatistics | None) -> Call:
    if running is None:
        return ORDINARY
    if running.momentum is None:
        return _NO_MOMENTUM
    return ORDINARY if is_movable(running) else _IMMOVABLE
