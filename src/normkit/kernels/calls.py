"""Python types of the operators' arguments and results."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from normkit.typing import GroupTable, PerChannel

CellTable = Float[Tensor, "2 cells"]
"""A row of means and a row of biased variances, float64. The cells are those of the groups, in
order, and after them, if they are wanted, those of the channels."""
MomentTable = Float[Tensor, "2 cells"]
"""A row of means and a row of biased variances, float64. The cells are those of every channel of
every example, and after them the statistics by which the batch stage normalised each channel."""
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Differentiable = Callable[[Tensor, Tensor, Tensor | None, tuple[bool, bool, bool]], Gradients]
"""Maps ``(grad, x, weight, (wants_x, wants_weight, wants_bias))`` to three gradients, by operations
that autograd can differentiate again."""
EndedGradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
DifferentiableEnded = Callable[
    [Tensor, tuple[Tensor, Tensor | None, Tensor | None], Tensor | None, tuple[bool, ...]],
    EndedGradients,
]
"""Maps ``(grad, (x, weight, bias), kept, wanted)`` to the gradients of x, residual, weight and
bias, by operations that autograd can differentiate again; ``kept`` comes from ``kept_beside``."""
Slots = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""A composite's parameters, in the order of its formula."""
MOST_PARAMETERS = 4
DifferentiableComposite = Callable[
    [Tensor, Tensor, Tensor, Slots, tuple[bool, ...]], list[Tensor | None]
]
"""Maps ``(grad, x, table, parameters, wanted)`` to the gradients of x and the parameters, by
operations that autograd can differentiate again."""


DifferentiableEndedComposite = Callable[
    [Tensor, Tensor, Tensor | None, Tensor, Slots, tuple[bool, ...]], list[Tensor | None]
]
"""Maps ``(grad, x, kept, table, parameters, wanted)`` to the gradients of x, the residual and the
parameters, in a call that ends with an activation; ``kept`` comes from ``kept_beside``."""


class Pooling(NamedTuple):
    """Which elements share statistics.

    Args:
        num_groups: Number of equal runs that an example is cut into.
        examples_per_group: Consecutive examples that share statistics; 0 is the whole batch.
        eps: Added to the variances.
        channel_statistics: Whether the table also has each channel's statistics over the batch.
    """

    num_groups: int
    examples_per_group: int
    eps: float
    channel_statistics: bool = False


class Running(NamedTuple):
    """Buffers that an operator updates, with statistics of channels if wanted, else of groups."""

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
    """The programs on tables of a composite: see ``kernels.program``.

    Args:
        forward: Computes scale and center from the moments of the map's channels.
        backward: Computes the gradient of ``forward``.
        kept_columns: Number of channels whose statistics over the batch are kept for backward.
        why_not: Why the formula has no program, or None; torch's operators then compute it.
        why_not_triton: Why no Triton kernel can run the programs, or None.
    """

    forward: str
    backward: str
    kept_columns: int
    why_not: str | None = None
    why_not_triton: str | None = None


class Buffers(NamedTuple):
    """Statistics ``(C,)`` that the batch stage reads (given) or updates (running).

    Estimates are updated in the buffers if they are passed as running, and only in the table if
    they are passed as given.
    """

    given_mean: Tensor | None = None
    given_var: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
