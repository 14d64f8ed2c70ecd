r"""Statistics over several processes: moments are gathered, and their gradients summed.

Every process contributes its moments and the number of its values. They are pooled by the law of
total variance; an empty batch has weight 0:

.. math::  n = \sum_r n_r, \quad M = \sum_r \frac{n_r}{n} m_r, \quad
           V = \sum_r \frac{n_r}{n} \left(v_r + (m_r - M)^2\right)

Forward takes one all-gather. In backward each process has the gradient of its own loss with respect
to the pooled statistics; one all-reduce adds these gradients. Both communicate small tables in
float64, because processes may compute in different dtypes.
"""

from __future__ import annotations

from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from normkit.core.moments import Moments
from normkit.errors import InputError, OptionError
from normkit.kernels.select import transform

World = Literal["world"]
ProcessGroup = dist.ProcessGroup | World | None
"""Processes whose batches count as one batch: a group, all of them, or this process alone."""


def active_group(process_group: ProcessGroup) -> dist.ProcessGroup | None:
    """The group to exchange statistics with; None if it has no other process.

    Raises:
        InputError: Inside a transform, where processes cannot communicate.
    """
    if process_group is None or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if process_group == "world" else process_group
    if group is None or dist.get_world_size(group) == 1:
        return None
    why = transform(torch.compiler.is_compiling())
    if why is not None:
        raise InputError(
            f"statistics over several processes were asked for, but {why}, where processes cannot "
            f"exchange them; set process_group=None or call .eval() for that"
        )
    return group


class HeldGroup:
    """A group as a layer's attribute: copies of the layer share it, and pickling it is refused."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldGroup:
        return self

    def __reduce__(self) -> NoReturn:
        raise OptionError(
            "a layer with process_group= set to a group was pickled, but a process group cannot be "
            "saved; set process_group to None or 'world' first, or save the state_dict()"
        )


def held_group(value: ProcessGroup) -> HeldGroup | World | None:
    """Check the option ``process_group``, and wrap a group.

    Raises:
        OptionError: If it is not a group, ``"world"`` or None.
    """
    if value is None:
        return None
    if value == "world":
        return "world"
    if isinstance(value, dist.ProcessGroup):
        return HeldGroup(value)
    raise OptionError(
        f"process_group={value!r} was given; it is a torch.distributed group, 'world' for all "
        f"processes, or None for this one alone"
    )


def gather(batch: Moments, group: dist.ProcessGroup) -> Tensor:
    """Exchange the counted moments ``(1, G)`` of this process's values, without a gradient.

    Returns:
        Means, variances and counts, one row per process, ``(R, 3 G)``.
    """
    tables = (batch.mean, batch.var, _counts(batch))
    return _all_gather(torch.cat(tables, dim=1).detach().double(), group)


def _counts(table: Moments) -> Tensor:
    return torch.ones_like(table.mean) if table.count is None else table.count.to(table.mean.dtype)


def merge(rows: Tensor) -> Moments:
    """Moments of all processes' values, ``(1, G)`` in float64, from the gathered rows."""
    return _merge(*rows.chunk(3, dim=1))


def merge_with_own(rows: Tensor, own: Moments, group: dist.ProcessGroup) -> Moments:
    """Merge the gathered rows, with this process's differentiable moments in place of its row.

    Their gradient is summed over the losses of all processes.
    """
    rank = dist.get_rank(group)
    mean, var, count = rows.chunk(3, dim=1)
    mean, var = (_with_row(t, rank, o) for t, o in ((mean, own.mean), (var, own.var)))
    merged = sum_gradients(_merge(mean, var, count), group)
    return Moments(merged.mean.to(own.mean.dtype), merged.var.to(own.var.dtype), merged.count)


def _merge(mean: Tensor, var: Tensor, counts: Tensor) -> Moments:
    count = counts.sum(dim=0, keepdim=True)
    share = counts / count.clamp(min=1)
    total = (share * mean).sum(dim=0, keepdim=True)
    spread = (share * (var + (mean - total).square())).sum(dim=0, keepdim=True)
    return Moments(total, spread, count)


def gather_examples(table: Moments, group: dist.ProcessGroup) -> tuple[Moments, slice]:
    """Exchange the counted moments of every example, ``(N, K)``, in the order of the processes.

    Returns:
        The counted moments of all examples in float64, and the slice of this process's examples.
    """
    rows = torch.stack((table.mean, table.var, _counts(table))).detach().double()
    sizes = _all_gather(rows.new_full((1,), rows.shape[1]), group).long().tolist()
    padded = rows.new_zeros(1, 3, max(sizes), rows.shape[2])
    padded[0, :, : rows.shape[1]] = rows
    found = _all_gather(padded, group)
    parts = [part[:, :size] for part, size in zip(found, sizes, strict=True)]
    start = sum(sizes[: dist.get_rank(group)])
    return Moments(*torch.cat(parts, dim=1)), slice(start, start + rows.shape[1])


def sum_gradients(statistics: Moments, group: dist.ProcessGroup) -> Moments:
    """Return the same statistics, whose gradient is summed over the losses of all processes."""
    both = _SumGradients.apply(torch.stack((statistics.mean, statistics.var)), group)
    return Moments(both[0], both[1], statistics.count)


class _SumGradients(torch.autograd.Function):
    """The identity; backward sums the gradient over all processes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        with torch.no_grad():
            total = _all_reduce(grads[0].contiguous(), ctx.group)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            return _OnceDifferentiable.apply(grads[0], total), None
        return total, None


class _OnceDifferentiable(torch.autograd.Function):
    """A gradient that refuses to be differentiated: the other processes' part would be missing."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, total: Tensor) -> Tensor:
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise InputError(
            "a second derivative of statistics over several processes was asked for, which normkit "
            "does not compute; set process_group=None or call .eval() for it"
        )


def _with_row(rows: Tensor, index: int, row: Tensor) -> Tensor:
    return torch.cat((rows[:index], row.to(rows.dtype), rows[index + 1 :]))


def _all_gather(row: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the rows of all processes along the first axis; works under compilation too."""
    operators = torch.ops._c10d_functional
    found = operators.all_gather_into_tensor(row, dist.get_world_size(group), group.group_name)
    return operators.wait_tensor(found)


def _all_reduce(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    operators = torch.ops._c10d_functional
    return operators.wait_tensor(operators.all_reduce(values, "sum", group.group_name))
