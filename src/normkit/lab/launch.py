"""Processes that a launcher, such as torchrun, has started to train together."""

import os
from collections.abc import Callable, Generator
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
PATIENCE = timedelta(hours=2)  # the others wait for the longest evaluation
BACKEND = "cpu:gloo,cuda:nccl" if cuda.is_available() else "gloo"


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among those that were started together; by default it is alone."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def first(self, work: Callable[[], T]) -> T:
        """Let the first process do the work, and give all of them its result.

        Raises:
            DataError: On the others, if it fails or has ended.
        """
        own: list[Exception] = []

        def noted() -> T | None:
            try:
                return work() if self.is_first else None
            except Exception as error:
                own.append(error)
                raise

        try:
            (result, *_) = together(noted)
        except RuntimeError as error:
            if error in own:
                raise
            raise DataError(
                f"process {self.rank} of {self.size} has lost the others ({error}); finished runs "
                f"are kept, and the same command goes on from there"
            ) from error
        return result  # type: ignore[return-value]


def num_launched() -> int:
    """Processes that a launcher has started with this one."""
    if not all(name in os.environ for name in VARIABLES):
        return 1
    text = os.environ["WORLD_SIZE"]
    return int(text) if text.isascii() and text.isdecimal() and int(text) else 1


@contextmanager
def launched() -> Generator[Launch]:
    """Run the block in touch with the processes that the launcher has started, if there are any.

    They train each network together. Their group is the one that Fabric trains by.
    """
    if not all(name in os.environ for name in VARIABLES) or os.environ["WORLD_SIZE"] == "1":
        yield Launch()
        return
    _join()
    try:
        yield Launch(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def _join() -> None:
    """Meet the others: by gloo on CPUs, by NCCL where there are GPUs."""
    # Its functions hold the group that is there when it is first imported, by their default
    # arguments: a group that outlives its end has threads that abort the process at exit.
    import_module("torch.distributed.nn.functional")
    try:
        distributed.init_process_group(BACKEND, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        given = ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES)
        raise DataError(
            f"the processes that a launcher has started do not meet by {given}: "
            f"{shortened(error)}; start normkit by torchrun, or unset these variables"
        ) from error
