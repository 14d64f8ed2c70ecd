"""Work that is split over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from normkit.errors import DataError, OptionError

T = TypeVar("T")
Group = distributed.ProcessGroup


def run_on_all_ranks(work: Callable[[], T], group: Group | None = None) -> list[T]:
    """Do work on every rank, and return the results of all ranks on every rank.

    If one rank fails, all ranks raise an error, so that none waits forever. Without
    ``torch.distributed`` the list has only this process's result. Results are exchanged as pickled
    bytes, so they should be small and on the CPU.

    Args:
        work: Does this rank's part, and returns a result that can be pickled.
        group: The ranks that take part, including this one; by default all.

    Raises:
        OptionError: If a group is given without ``torch.distributed``, or this rank is not in it.
        DataError: If another rank has failed.
    """
    size = _num_ranks(group)
    if size == 1:
        return [work()]
    result, problem = None, None
    try:
        result = work()
    except Exception as error:  # noqa: BLE001 - raised below, after the other ranks know of it
        problem = error
    message = None if problem is None else f"{type(problem).__name__}: {problem}"
    found: list[Any] = [None] * size
    distributed.all_gather_object(found, (result, message), group=group)
    if problem is not None:
        raise problem
    failed = [f"rank {rank} failed with {text}" for rank, (_, text) in enumerate(found) if text]
    if failed:
        raise DataError(f"{'; '.join(failed)}; the other ranks stop as well")
    return [result for result, _ in found]


def _num_ranks(group: Group | None) -> int:
    if not (distributed.is_available() and distributed.is_initialized()):
        if group is not None:
            raise OptionError(
                "group= was given, and torch.distributed is not initialised; call "
                "torch.distributed.init_process_group first, or leave group= out"
            )
        return 1
    size = distributed.get_world_size(group)
    if size < 1:
        raise OptionError(
            "this process is not in the group= that was given; make this call only in its processes"
        )
    return size
