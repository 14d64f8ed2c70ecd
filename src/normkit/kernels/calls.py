"""What the operators of all kernels take, in Python's words."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from normkit.typing import GroupTable, PerChannel

CellTable = Float[Tensor, "2 cells"]
"""Means above biased variances, float64: of the groups in order, then, if wanted, the channels."""
MomentTable = Float[Tensor, "2 cells"]
"""Means above biased variances, float64: of every channel of every example, then of the batch
stage's channels its statistics: measured, or those that it was given."""
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Differentiable = Callable[[Tensor, Tensor, Tensor | None, tuple[bool, bool, bool]], Gradients]
"""``(grad, x, weight, (wants_x, wants_weight, wants_bias))`` to three gradients, in operations that
autograd can differentiate again."""
EndedGradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
DifferentiableEnded = Callable[
    [Tensor, tuple[Tensor, Tensor | None, Tensor | None], Tensor | None, tuple[bool, ...]],
    EndedGradients,
]
"""``(grad, (x, weight, bias), kept, wanted)`` to the gradients of x, residual, weight and bias, in
operations that autograd can differentiate again; ``kept`` is what ``nodes.Ended.keeps`` says."""
Slots = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""A composite's parameters, in the order that csrc/composites.h gives for its kind."""
DifferentiableComposite = Callable[
    [Tensor, Tensor, Tensor, Slots, tuple[bool, ...]], list[Tensor | None]
]
"""``(grad, x, table, parameters, wanted)`` to the gradients of x and the parameters, in operations
that autograd can differentiate again."""


class Pooling(NamedTuple):
    """Which elements share statistics.

    Args:
        num_groups: Equal runs that an example is cut into.
        examples_per_group: Consecutive examples that share statistics; 0 is the whole batch.
        eps: Added to the variances.
        channel_statistics: Whether the table has the whole batch's statistics of channels too.
    """

    num_groups: int
    examples_per_group: int
    eps: float
    channel_statistics: bool = False


class Running(NamedTuple):
    """Running statistics that follow the batch: of the channels if wanted, else of the groups."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    momentum: float


class Tables(NamedTuple):
    """The parts of a cell table."""

    mean: GroupTable
    var: GroupTable
    channel_mean: PerChannel
    channel_var: PerChannel


def split_table(table: CellTable, num_channels: int, pooling: Pooling) -> Tables:
    """Views of the groups' statistics ``(B, G)`` and the channels' ``(C,)`` (empty if unwanted)."""
    kept = num_channels if pooling.channel_statistics else 0
    groups, channels = table.split((table.shape[1] - kept, kept), dim=1)
    groups = groups.unflatten(1, (-1, pooling.num_groups))
    return Tables(groups[0], groups[1], channels[0], channels[1])


class Kind(IntEnum):
    """Which composite; the numbers are those of csrc/composites.h."""

    BATCH_THEN_GROUP = 0
    GROUP_FIRST = 1
    BATCH_FIRST = 2
    PARALLEL = 3
    SWITCHED = 4
    SWITCHED_WITHOUT_BATCH = 5
    HALVES = 6


class BatchSource(IntEnum):
    """Where a batch stage's statistics come from; as in csrc/composite_operators.cpp."""

    OWN = 0
    ESTIMATES = 1
    GIVEN = 2


class Composite(NamedTuple):
    """What is computed, apart from where the batch stage takes its statistics.

    Args:
        kind: Which composite.
        num_groups: Runs of channels in its group norm; the instance norm's channels of halves.
        batch_eps: Added to the batch stage's variances.
        group_eps: Added to the other norm's.
    """

    kind: Kind
    num_groups: int
    batch_eps: float
    group_eps: float

    def num_batch_channels(self, x: Tensor) -> int:
        """Channels that the batch stage sees."""
        unseen = {Kind.HALVES: self.num_groups, Kind.SWITCHED_WITHOUT_BATCH: x.shape[1]}
        return x.shape[1] - unseen.get(self.kind, 0)


class Batch(NamedTuple):
    """Where the batch stage's statistics come from.

    Args:
        source: From the input, from estimates that move first, or given.
        rate: Weight of the batch in running statistics, of the step in estimates, or of the
            example's own statistics beside given ones.
    """

    source: BatchSource
    rate: float = 0.0


class Buffers(NamedTuple):
    """Statistics ``(C,)`` that the batch stage reads (given) or moves (running).

    Estimates are moved; where they are given, in the table alone.
    """

    given_mean: Tensor | None = None
    given_var: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None


Options = tuple[Composite, Batch]


def flat(parameters: Slots, options: Options) -> tuple[object, ...]:
    """A composite as the operators take it."""
    (kind, *composite), batch = options
    return (kind, *parameters, *composite, *batch)
