"""Many runs that have no record yet: in this process, in several, or on a cluster."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, Protocol

import torch

from normkit.lab.data.sharing import SharedData, share_data
from normkit.lab.records import append_record, run_in_turn
from normkit.lab.resume import FOLDER
from normkit.lab.spec import RunSpec
from normkit.lab.user_code import HELD
from normkit.lab.work import R, S, Upkeep, Watcher, Way, Work

SECONDS_BETWEEN_REPORTS = 0.2
# What a run imports, and a worker's main module. torch's optimizers import the second one when they
# are first made, which takes longer than all the rest.
PRELOADED = ("normkit.lab.preloaded", "torch._dynamo", "normkit.cli")


def carry_out(specs: Sequence[S], way: Way, work: Work[S, R], watcher: Watcher[S, R]) -> None:
    """Do runs here or on a cluster; each record is on the disk before the watcher is told.

    Raises:
        PackageError: If a cluster was asked for and Ray is not installed.
        DataError: If records cannot be written, or the cluster cannot be reached.
    """
    if not specs:
        return
    if way.cluster is not None:
        from normkit.lab.cluster import run_on_ray  # its package is an extra

        run_on_ray(specs, way.upkeep, watcher, work)
        return
    run_all(specs, way.out, _num_workers(specs, way), watcher, work, way.upkeep)


def prepare(specs: Sequence[RunSpec], way: Way) -> None:
    """Let worker processes get ready while runs are still planned, if there will be any."""
    if way.cluster is None and _num_workers(specs, way) > 1:
        _prepare_workers()


def _num_workers(specs: Sequence[RunSpec], way: Way) -> int:
    return min(way.num_workers or default_workers(specs[0]), len(specs))


def reached(cluster: str | None) -> AbstractContextManager[Any]:
    """Stay in touch with the cluster, if one was asked for, until the block ends.

    Raises:
        PackageError: If Ray is not installed.
        DataError: If the cluster cannot be reached.
    """
    if cluster is None:
        return nullcontext()
    from normkit.lab.cluster import joined_cluster  # its package is an extra

    return joined_cluster()


def default_workers(spec: RunSpec) -> int:
    """As many runs at once as torch would use threads; one on CUDA."""
    if spec.uses_gpu or any(text in HELD for text in spec.own_names):
        return 1
    return max(1, torch.get_num_threads() // spec.num_threads)


def run_all(
    specs: Sequence[S],
    folder: Path,
    num_workers: int,
    watcher: Watcher[S, R],
    work: Work[S, R],
    upkeep: Upkeep | None = None,
) -> None:
    """Run each spec and append its record to the folder's records as soon as it ends.

    Args:
        specs: Runs, begun in this order.
        folder: Where the records file is.
        num_workers: Processes; one means this one.
        watcher: Is told of progress.
        work: How they are done.
        upkeep: What is done beside the runs.
    """
    upkeep = upkeep or Upkeep(folder=folder)
    if min(num_workers, len(specs)) > 1:
        _run_in_workers(specs, work, upkeep, min(num_workers, len(specs)), watcher)
        return

    def run(spec: S) -> R:
        reporter = _Reporter(lambda count: watcher.on_steps(spec, count))
        return work.run(spec, reporter.step, upkeep)

    for record in run_in_turn(specs, folder, run):
        watcher.on_record(record)


class _Tell(Protocol):
    def __call__(self, count: int, /) -> None: ...


@dataclass(slots=True)
class _Reporter:
    """Counts steps and tells of them a few times a second."""

    tell: _Tell
    count: int = 0
    told_at: float = field(default_factory=time.monotonic)

    def step(self) -> None:
        self.count += 1
        now = time.monotonic()
        if now - self.told_at > SECONDS_BETWEEN_REPORTS:
            self.tell(self.count)
            self.count, self.told_at = 0, now


@dataclass(slots=True)
class _Worker(Generic[S]):
    """A process that runs one spec at a time, and this side's end of its pipe."""

    process: BaseProcess
    connection: Connection
    spec: S | None = None

    def begin(self, spec: S | None) -> None:
        """Send the next spec; ``None`` ends the process."""
        self.spec = spec
        with suppress(OSError):  # a dead worker is noticed when it is waited for
            self.connection.send(spec)


def _run_in_workers(
    specs: Sequence[S],
    work: Work[S, R],
    upkeep: Upkeep,
    num_workers: int,
    watcher: Watcher[S, R],
) -> None:
    folder = upkeep.folder or Path()
    data = share_data(folder / FOLDER)
    waiting = list(reversed(specs))
    workers: list[_Worker[S]] = [_started(work, upkeep, data) for _ in range(num_workers)]
    try:
        for worker in workers:
            worker.begin(waiting.pop())
        while busy := {w.connection: w for w in workers if w.spec is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                message = _received(worker, work)
                if isinstance(message, int):
                    watcher.on_steps(worker.spec, message)  # type: ignore[arg-type]  # it is busy
                else:
                    append_record(folder, message)
                    watcher.on_record(message)
                    if not worker.process.is_alive():
                        workers.remove(worker)
                        workers.append(worker := _started(work, upkeep, data))
                    worker.begin(waiting.pop() if waiting else None)
    finally:
        for worker in workers:
            worker.connection.close()
            worker.process.terminate()
            worker.process.join()
        if data is not None:
            data.remove()


def _prepare_workers() -> None:
    """Start the process that imports what runs need, and that workers are then forked from.

    It computes nothing, so torch has no threads there, which a fork would lose. It ends with this
    process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with _interrupts_ignored():  # inherited: it imports torch before it can ignore them
        forkserver.ensure_running()


def _started(work: Work[S, R], upkeep: Upkeep, data: SharedData | None) -> _Worker[S]:
    _prepare_workers()
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    # no daemon: it may have processes of its own that read pictures
    given = (theirs, work, upkeep, data, dict(os.environ))
    process = context.Process(target=_serve, args=given)
    with _interrupts_ignored():
        process.start()
    theirs.close()
    return _Worker(process, ours)


@contextmanager
def _interrupts_ignored() -> Generator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set a handler
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _received(worker: _Worker[S], work: Work[S, R]) -> int | R:
    """What a worker sent; the record of a failed run if it is dead."""
    try:
        return worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        spec = worker.spec
        if spec is None:
            raise
        return work.failed(
            spec, f"the worker process ended with exit code {worker.process.exitcode}"
        )


def _serve(
    connection: Connection,
    work: Work[Any, Any],
    upkeep: Upkeep,
    data: SharedData | None,
    environment: dict[str, str],
) -> None:
    """Run what comes through the pipe until it says ``None`` or its other end is gone."""
    os.environ.clear()
    os.environ.update(environment)  # it has that of the process that was forked
    if data is not None:
        data.take_over()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    with suppress(EOFError, OSError):
        while (spec := connection.recv()) is not None:
            reporter = _Reporter(lambda count: _tell(connection, count))
            connection.send(work.run(spec, reporter.step, upkeep))


def _tell(connection: Connection, count: int) -> None:
    try:
        connection.send(count)
    except OSError as error:
        raise SystemExit from error  # the parent was killed: there is nobody to run for
