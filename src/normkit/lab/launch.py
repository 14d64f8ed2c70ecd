"""Processes that a launcher, such as torchrun, has started to train together."""

import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import TypeVar

import torch
from torch import cuda, distributed
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from normkit.errors import DataError, SpecError
from normkit.inference.ranks import run_on_all_ranks
from normkit.text import shortened

T = TypeVar("T")
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(hours=2)  # the others wait for the longest evaluation
PAUSE_S = 0.2  # in which the group's threads let go of what they hold


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
            (result, *_) = run_on_all_ranks(noted)
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


def is_spoken_for() -> bool:
    """Whether another process of the launch prints for this one."""
    return num_launched() > 1 and os.environ["RANK"] != "0"


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process, where a launcher has started several; else the device itself."""
    if device.type == "cpu" or num_launched() == 1:
        return device
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))


def require_processes(num_processes: int, strategy: str, device: torch.device) -> None:
    """Refuse a training on several processes that were not started, or share a GPU.

    Args:
        num_processes: That are to train together.
        strategy: ``"auto"``, or one that needs several.
        device: Where they compute.

    Raises:
        SpecError: With how they are started.
    """
    start = "start it by torchrun --nproc-per-node 2 -m normkit.cli compare"
    if num_processes != num_launched():
        raise SpecError(
            f"processes was given {num_processes}, and {num_launched()} "
            f"{'was' if num_launched() == 1 else 'were'} started; {start}"
        )
    if num_processes == 1 and strategy != "auto":
        raise SpecError(
            f"--strategy was given {strategy}, which several processes train by, and this is one; "
            f"{start}, or leave --strategy out"
        )
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    if num_processes > 1 and device.type == "cuda" and num_here > cuda.device_count():
        raise SpecError(
            f"{num_here} processes were started here, and there are {cuda.device_count()} GPUs; "
            f"start as many as there are GPUs, or give --device cpu"
        )


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
        # The end of a group joins its threads and holds the GIL meanwhile, for which a thread that
        # still lets go of a tensor waits: both would wait for ever.
        time.sleep(PAUSE_S)
        distributed.destroy_process_group()


def _join() -> None:
    """Meet the others: by gloo on CPUs, by NCCL where there are GPUs."""
    # Its functions hold the group that is there when it is first imported, by their default
    # arguments: a group that outlives its end has threads that abort the process at exit.
    import_module("torch.distributed.nn.functional")
    try:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        # A launcher's store outlives a group, and has the addresses of the last one.
        meeting = store.add(f"normkit/{rank}", 1)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda.is_available() else "gloo",
            store=PrefixStore(f"normkit/meeting{meeting}", store),
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
        )
    except (ValueError, RuntimeError) as error:
        given = ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES)
        raise DataError(
            f"the processes that a launcher has started do not meet by {given}: "
            f"{shortened(error)}; start normkit by torchrun, or unset these variables"
        ) from error
