"""What the operators of all kernels take, in Python's words."""

from __future__ import annotations

from collections.abc import Callable
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
operations that autograd can differentiate again; ``kept`` is what ``kept_beside`` says."""
Slots = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""A composite's parameters, in the order of its formula."""
DifferentiableComposite = Callable[
    [Tensor, Tensor, Tensor, Slots, tuple[bool, ...]], list[Tensor | None]
]
"""``(grad, x, table, parameters, wanted)`` to the gradients of x and the parameters, in operations
that autograd can differentiate again."""


DifferentiableEndedComposite = Callable[
    [Tensor, Tensor, Tensor | None, Tensor, Slots, tuple[bool, ...]], list[Tensor | None]
]
"""The same of what follows too: ``(grad, x, kept, table, parameters, wanted)``, wanted being of x,
the residual and the parameters; ``kept`` is what ``kept_beside`` says."""


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


class Programs(NamedTuple):
    """A composite of norms, as programs on tables: see ``kernels.program``.

    Args:
        forward: From the moments of the map's channels to scale and center.
        backward: Its gradient.
        kept_columns: Channels whose statistics over the batch the table keeps.
        why_not: Why there are none, if so: then torch's operators work on tables.
        why_not_triton: Why no Triton kernels can be written for them, if so.
    """

    forward: str
    backward: str
    kept_columns: int
    why_not: str | None = None
    why_not_triton: str | None = None


class Buffers(NamedTuple):
    """Statistics ``(C,)`` that the batch stage reads (given) or moves (running).

    Estimates are moved; where they are given, in the table alone.
    """

    given_mean: Tensor | None = None
    given_var: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
