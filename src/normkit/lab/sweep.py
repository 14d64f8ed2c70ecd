"""All runs of a sweep that have no record yet, in this process or in several."""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

import torch

from normkit import NormSpec
from normkit.errors import KernelError, SpecError
from normkit.kernels.select import ENVIRONMENT_VARIABLE, require_kernels
from normkit.lab.data import Dataset, load
from normkit.lab.device import parse_device
from normkit.lab.environment import code_hash, describe_environment
from normkit.lab.models.build import build_model, norm_slots
from normkit.lab.records import Outcome, TrainingRecord, append_record, run_in_turn
from normkit.lab.spec import SweepSpec, TrainingSpec
from normkit.lab.steps import batch_lengths, num_steps_per_epoch
from normkit.lab.train import run

SECONDS_BETWEEN_REPORTS = 0.2


class Watcher(Protocol):
    """Is told what a sweep is doing."""

    def on_steps(self, spec: TrainingSpec, num_steps: int) -> None:
        """A run has done so many more steps."""
        ...

    def on_record(self, record: TrainingRecord) -> None:
        """A run has ended and its record is on the disk."""
        ...


@dataclass(frozen=True, slots=True)
class Collected:
    """A watcher that also keeps the records."""

    watcher: Watcher
    records: list[TrainingRecord] = field(default_factory=list)

    def on_steps(self, spec: TrainingSpec, num_steps: int) -> None:
        """Pass it on."""
        self.watcher.on_steps(spec, num_steps)

    def on_record(self, record: TrainingRecord) -> None:
        """Keep it and pass it on."""
        self.records.append(record)
        self.watcher.on_record(record)


def check(sweep: SweepSpec) -> Dataset:
    """Find bad input before the first run; nothing is trained or written.

    Returns:
        The data set.

    Raises:
        SpecError: If the kernels, the device, the data set or the model is unknown, there are too
            few examples, or a norm does not fit a layer at one of the batch sizes.
        DataError: If the data set's files are missing.
    """
    _check_kernels()
    parse_device(sweep.protocol.device)
    specs = [NormSpec.parse(norm) for norm in sweep.norms]
    dataset = load(sweep.protocol.data, sweep.protocol.limit)
    _check_limit(sweep.protocol.limit, dataset)
    slots = norm_slots(sweep.protocol.model, dataset.num_classes, dataset.input_shape)
    num_examples = len(dataset.train)
    for run_spec in sweep.runs():
        _check_update_rate(run_spec)
    for spec, batch_size in itertools.product(specs, sweep.batch_sizes):
        for length in batch_lengths(num_examples, batch_size):
            slots.check(spec, batch_size, length)
    for spec in specs:
        if spec.standardize_weights:  # whether a model has what it asks for shows in the model
            build_model(
                sweep.protocol.model,
                num_classes=dataset.num_classes,
                input_shape=dataset.input_shape,
                norm=spec,
                batch_size=sweep.batch_sizes[0],
            )
    return dataset


def _check_update_rate(spec: TrainingSpec) -> None:
    """Refuse a learning rate that estimates of micro-batches cannot move by."""
    rate = spec.learning_rate(0)
    if rate > 1 and spec.has_learning_rate_as_update_rate:
        raise SpecError(
            f"{spec.norm} takes the learning rate as its update rate, which is {rate:g} at batch "
            f"size {spec.batch_size}, and above 1; give a lower --base-lr, or name a rate: "
            f"{NormSpec.parse(spec.norm).norm_alone}:rate=0.1"
        )


def _check_kernels() -> None:
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if name is not None:
        try:
            require_kernels(name)
        except KernelError as error:
            raise SpecError(f"{ENVIRONMENT_VARIABLE} is {name!r}: {error}") from error


def _check_limit(limit: int | None, dataset: Dataset) -> None:
    if limit is not None and limit < dataset.num_classes:
        raise SpecError(
            f"--limit was given {limit}, but {dataset.name} has {dataset.num_classes} classes; "
            f"give {dataset.num_classes} or more"
        )


def num_steps(spec: TrainingSpec, num_examples: int) -> int:
    """Training steps of a run that neither diverges nor fails."""
    return spec.protocol.epochs * num_steps_per_epoch(num_examples, spec.batch_size)


def default_workers(sweep: SweepSpec) -> int:
    """As many runs at once as torch would use threads; one on CUDA."""
    if parse_device(sweep.protocol.device).type == "cuda":
        return 1
    return max(1, torch.get_num_threads() // sweep.protocol.threads)


def run_all(
    specs: Sequence[TrainingSpec], folder: Path, num_workers: int, watcher: Watcher
) -> None:
    """Run each spec and append its record to the folder's records as soon as it ends.

    Args:
        specs: Runs, begun in this order.
        folder: Where the records file is.
        num_workers: Processes; one means this one.
        watcher: Is told of progress.
    """
    if min(num_workers, len(specs)) > 1:
        _run_in_workers(specs, folder, min(num_workers, len(specs)), watcher)
        return

    def work(spec: TrainingSpec) -> TrainingRecord:
        return run(spec, _Reporter(lambda count: watcher.on_steps(spec, count)).step)

    for record in run_in_turn(specs, folder, work):
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
class _Worker:
    """A process that runs one spec at a time, and this side's end of its pipe."""

    process: BaseProcess
    connection: Connection
    spec: TrainingSpec | None = None

    def begin(self, spec: TrainingSpec | None) -> None:
        """Send the next spec; ``None`` ends the process."""
        self.spec = spec
        with suppress(OSError):  # a dead worker is noticed when it is waited for
            self.connection.send(spec)


def _run_in_workers(
    specs: Sequence[TrainingSpec], folder: Path, num_workers: int, watcher: Watcher
) -> None:
    waiting = list(reversed(specs))
    workers = [_started() for _ in range(num_workers)]
    try:
        for worker in workers:
            worker.begin(waiting.pop())
        while busy := {w.connection: w for w in workers if w.spec is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                message = _received(worker)
                if isinstance(message, int) and worker.spec is not None:
                    watcher.on_steps(worker.spec, message)
                elif isinstance(message, TrainingRecord):
                    append_record(folder, message)
                    watcher.on_record(message)
                    if not worker.process.is_alive():
                        workers.remove(worker)
                        workers.append(worker := _started())
                    worker.begin(waiting.pop() if waiting else None)
    finally:
        for worker in workers:
            worker.connection.close()
            worker.process.terminate()
            worker.process.join()


def _started() -> _Worker:
    context = multiprocessing.get_context("spawn")  # a forked torch deadlocks in its threads
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    with _interrupts_ignored():  # inherited: the worker imports torch before it can ignore them
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


def _received(worker: _Worker) -> int | TrainingRecord:
    """What a worker sent; the record of a failed run if it is dead."""
    try:
        return worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        spec = worker.spec
        if spec is None:
            raise
        return _failed(spec, f"the worker process ended with exit code {worker.process.exitcode}")


def _failed(spec: TrainingSpec, message: str) -> TrainingRecord:
    return TrainingRecord(
        spec=spec,
        outcome=Outcome(status="failed", message=message),
        step_time_s=None,
        duration_s=0.0,
        environment=describe_environment(parse_device(spec.protocol.device), spec.protocol.threads),
        code_hash=code_hash(),
    )


def _serve(connection: Connection) -> None:
    """Run what comes through the pipe until it says ``None`` or its other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    with suppress(EOFError, OSError):
        while (spec := connection.recv()) is not None:
            connection.send(run(spec, _Reporter(lambda count: _tell(connection, count)).step))


def _tell(connection: Connection, count: int) -> None:
    try:
        connection.send(count)
    except OSError as error:
        raise SystemExit from error  # the parent was killed: there is nobody to run for
