"""Work that every process does a part of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from normkit.errors import DataError, OptionError

T = TypeVar("T")
Group = distributed.ProcessGroup


def together(work: Callable[[], T], group: Group | None = None) -> list[T]:
    """Do the work on every rank, and give all ranks all results; an error of one is one of all.

    Without ``torch.distributed``, the only result is one's own. Devices do not matter: what is
    given goes as bytes, so it should be small and on the CPU.

    Args:
        work: What this rank does; its result can be pickled.
        group: Ranks that take part, this one among them; by default all.

    Raises:
        OptionError: If a group is given without ``torch.distributed``, or this rank is not in it.
        DataError: On the other ranks, if one of them has failed.
    """
    size = _num_ranks(group)
    if size == 1:
        return [work()]
    result, problem = None, None
    try:
        result = work()
    except Exception as error:  # noqa: BLE001 - raised below, once the others have been told
        problem = error
    said = None if problem is None else f"{type(problem).__name__}: {problem}"
    found: list[Any] = [None] * size
    distributed.all_gather_object(found, (result, said), group=group)
    if problem is not None:
        raise problem
    failed = [f"rank {rank} failed with {said}" for rank, (_, said) in enumerate(found) if said]
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
        raise OptionError("this process is not in the group= that was given; call it in those only")
    return size
