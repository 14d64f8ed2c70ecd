"""Processes that a launcher, such as torchrun, has started to share a sweep."""

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import TypeVar

from torch import cuda, distributed

from normkit.errors import DataError
from normkit.inference.ranks import together
from normkit.text import shortened

T = TypeVar("T")
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(days=30)  # the others wait for the longest share of the runs


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among those that were started together; by default it is alone."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """Take this process's part of the work."""
        return work[self.rank :: self.size]

    def first(self, work: Callable[[], T]) -> T:
        """Let the first process do the work, and give all of them its result.

        Raises:
            DataError: On the others, if it fails or has ended.
        """
        (result, *_) = self.gather(lambda: work() if self.is_first else None)
        return result  # type: ignore[return-value]

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Do the work on every process, and give all of them all results.

        Raises:
            DataError: If another process fails or has ended.
        """
        own: list[Exception] = []

        def noted() -> T:
            try:
                return work()
            except Exception as error:
                own.append(error)
                raise

        try:
            return together(noted)
        except RuntimeError as error:
            if error in own:
                raise
            raise DataError(
                f"process {self.rank} of {self.size} has lost the others ({error}); finished runs "
                f"are kept, and the same command goes on from there"
            ) from error


def _whole(text: str) -> int:
    """A process's number; what is none is said when the processes meet."""
    return int(text) if text.isascii() and text.isdecimal() else 0


@contextmanager
def launched() -> Generator[Launch]:
    """Run the block in touch with the processes that the launcher has started, if there are any."""
    if not all(name in os.environ for name in VARIABLES) or os.environ["WORLD_SIZE"] == "1":
        yield Launch()
        return
    with _own_gpu():
        _join()
        try:
            yield Launch(distributed.get_rank(), distributed.get_world_size())
        finally:
            distributed.destroy_process_group()


def _join() -> None:
    """Meet the others; a few bytes go between us, on CPUs."""
    # Its functions hold the group that is there when it is first imported, by their default
    # arguments: a group that outlives its end has threads that abort the process at exit.
    import_module("torch.distributed.nn.functional")
    try:
        distributed.init_process_group("gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        given = ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES)
        raise DataError(
            f"the processes that a launcher has started do not meet by {given}: "
            f"{shortened(error)}; start normkit by torchrun, or unset these variables"
        ) from error


@contextmanager
def _own_gpu() -> Generator[None]:
    """See one GPU only, by this process's number on its machine; before CUDA is first used."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = map(str, range(cuda.device_count())) if before is None else before.split(",")
    found = [device for device in every if device]
    if not found:
        yield
        return
    local = _whole(os.environ.get("LOCAL_RANK") or os.environ["RANK"])
    os.environ["CUDA_VISIBLE_DEVICES"] = found[local % len(found)]
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
