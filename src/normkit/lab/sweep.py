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

from normkit.errors import KernelError, SpecError
from normkit.kernels.select import ENVIRONMENT_VARIABLE, require_kernels
from normkit.lab.arms import Arm
from normkit.lab.changes import BuiltModel
from normkit.lab.data import READERS, Dataset, Split, open_data
from normkit.lab.device import parse_device
from normkit.lab.environment import describe_environment
from normkit.lab.launch import require_processes
from normkit.lab.loop import num_updates, own_parts, require_precision, require_scores
from normkit.lab.models.build import norm_slots
from normkit.lab.recipe import Timetable
from normkit.lab.records import Outcome, TrainingRecord, append_record, run_in_turn, sources_of
from normkit.lab.spec import Protocol as Training
from normkit.lab.spec import SweepSpec, TrainingSpec
from normkit.lab.start import built
from normkit.lab.train import Upkeep, dataset_of, run
from normkit.lab.user_code import HELD, load_function, users_errors

SECONDS_BETWEEN_REPORTS = 0.2


class Watcher(Protocol):
    """Is told what a sweep is doing."""

    def on_steps(self, spec: TrainingSpec, num_steps: int) -> None:
        """A run has done so many more steps."""
        ...

    def on_record(self, record: TrainingRecord) -> None:
        """A run has ended and its record is on the disk."""
        ...


def check(sweep: SweepSpec) -> Dataset[Split] | None:
    """Find bad input before the first run; nothing is trained or written.

    Returns:
        The data set; None where a user's function trains.

    Raises:
        SpecError: If the kernels, the device, the precision, the data set or the model is unknown,
            there are too few examples, or a norm does not fit a layer at one of the batch sizes.
        DataError: If the data set's files are missing.
    """
    protocol = sweep.protocol
    _check_kernels()
    _refuse_useless(sweep)
    device = parse_device(protocol.device)
    require_precision(protocol.precision, device)
    require_processes(protocol.processes, protocol.strategy, device)
    if protocol.train is not None:
        load_function(protocol.train, "--train")
        return None
    dataset = open_data(protocol.data, protocol.limit, protocol.image_size)
    _check_sizes(sweep, dataset)
    slots = norm_slots(protocol.model, dataset.num_classes, dataset.input_shape)
    _check_update_rates(sweep)
    arms = [Arm.parse(norm) for norm in sweep.norms]
    for arm, batch_size in itertools.product(arms, sweep.batch_sizes):
        for length in _batch_lengths(protocol, len(dataset.train), batch_size):
            slots.check(arm, batch_size, length)
    for at, arm in enumerate(arms):
        if at == 0 or not arm.is_plain:  # whether a model has what it asks for shows in the model
            spec = TrainingSpec(
                protocol=protocol, norm=str(arm), batch_size=sweep.batch_sizes[0], seed=0
            )
            network = built(spec, dataset)
            if at == 0:
                _check_outputs(network, dataset, protocol.model)
    return dataset


def _refuse_useless(sweep: SweepSpec) -> None:
    """Refuse options that would be without effect."""
    protocol = sweep.protocol
    if protocol.train is None and protocol.better == "lower":
        raise SpecError(
            "--better lower was given without --train, but test accuracies are better when higher; "
            "leave it out"
        )
    if protocol.train is not None and sweep.learning_rates:
        raise SpecError(
            "--tune-lr was given with --train, which chooses its own rates; leave one of them out"
        )
    if protocol.image_size is not None and protocol.data in READERS:
        raise SpecError(
            f"--image-size was given {protocol.image_size}, but {protocol.data} has a size of its "
            f"own; leave it out, or give a folder"
        )


def _check_outputs(built: BuiltModel, dataset: Dataset[Split], name: str) -> None:
    """Refuse a network that does not give a row of scores for each example."""
    zeros = torch.zeros(2, *dataset.input_shape)
    with torch.no_grad(), users_errors(name):
        require_scores(built.model.eval()(zeros), 2, dataset.num_classes)


def _batch_lengths(protocol: Training, num_examples: int, batch_size: int) -> set[int]:
    order = torch.arange(num_examples)
    return {len(part) for part in own_parts(order, batch_size, 0, protocol.processes)}


def _check_sizes(sweep: SweepSpec, dataset: Dataset[Split]) -> None:
    """Refuse too few examples for the classes, or for a batch that was asked for."""
    limit, num_examples = sweep.protocol.limit, len(dataset.train)
    if limit is not None and limit < dataset.num_classes:
        raise SpecError(
            f"--limit was given {limit}, but {dataset.name} has {dataset.num_classes} classes; "
            f"give {dataset.num_classes} or more"
        )
    largest = max(sweep.batch_sizes) * sweep.protocol.processes
    if largest > num_examples:
        raise SpecError(
            f"--batch-sizes was given {max(sweep.batch_sizes)}, but {dataset.name} has "
            f"{num_examples} training examples; give {num_examples} or less"
        )
    for name, part in (("validation", dataset.validation), ("test", dataset.test)):
        if not len(part):
            raise SpecError(
                f"{dataset.name} has {num_examples} training examples and no {name} examples; "
                f"give more examples, ten for each class or more"
            )


def _check_update_rates(sweep: SweepSpec) -> None:
    """Refuse a learning rate that estimates of micro-batches cannot move by."""
    for spec in sweep.runs():
        examples = spec.protocol.step_examples(spec.batch_size)
        rate = spec.protocol.first_rate(examples)
        if rate > 1 and spec.has_learning_rate_as_update_rate:
            raise SpecError(
                f"{spec.norm} takes the learning rate as its update rate, which is {rate:g} at "
                f"batch size {spec.batch_size}, and above 1; give a lower --base-lr, or name a "
                f"rate: {Arm.parse(spec.norm).norm}:rate=0.1"
            )


def _check_kernels() -> None:
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if name is not None:
        try:
            require_kernels(name)
        except KernelError as error:
            raise SpecError(f"{ENVIRONMENT_VARIABLE} is {name!r}: {error}") from error


def num_steps(spec: TrainingSpec, num_examples: int) -> int:
    """Training steps of a run that neither diverges nor fails; 1 where a user's function trains."""
    if spec.protocol.train is not None:
        return 1
    per_epoch = num_updates(num_examples, spec.batch_size, spec.protocol)
    return Timetable(spec.protocol, per_epoch, spec.batch_size).num_steps


def default_workers(sweep: SweepSpec) -> int:
    """As many runs at once as torch would use threads; one on CUDA."""
    if parse_device(sweep.protocol.device).type == "cuda":
        return 1
    if sweep.protocol.processes > 1 or any(text in HELD for text in own_names(sweep.protocol)):
        return 1
    return max(1, torch.get_num_threads() // sweep.protocol.threads)


def own_names(protocol: Training) -> tuple[str, ...]:
    """What the protocol names that may be known to this process only."""
    return (protocol.model, protocol.data, protocol.train or "")


def run_all(
    specs: Sequence[TrainingSpec],
    folder: Path,
    num_workers: int,
    watcher: Watcher,
    upkeep: Upkeep | None = None,
) -> None:
    """Run each spec and append its record to the folder's records as soon as it ends.

    Args:
        specs: Runs, begun in this order.
        folder: Where the records file is.
        num_workers: Processes; one means this one.
        watcher: Is told of progress.
        upkeep: What is done beside the runs.
    """
    upkeep = upkeep or Upkeep(folder=folder)
    if min(num_workers, len(specs)) > 1:
        _run_in_workers(specs, upkeep, min(num_workers, len(specs)), watcher)
        return

    def work(spec: TrainingSpec) -> TrainingRecord:
        return run(spec, _Reporter(lambda count: watcher.on_steps(spec, count)).step, upkeep)

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
    specs: Sequence[TrainingSpec], upkeep: Upkeep, num_workers: int, watcher: Watcher
) -> None:
    folder = upkeep.folder or Path()
    waiting = list(reversed(specs))
    workers = [_started(upkeep) for _ in range(num_workers)]
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
                        workers.append(worker := _started(upkeep))
                    worker.begin(waiting.pop() if waiting else None)
    finally:
        for worker in workers:
            worker.connection.close()
            worker.process.terminate()
            worker.process.join()


def _started(upkeep: Upkeep) -> _Worker:
    context = multiprocessing.get_context("spawn")  # a forked torch deadlocks in its threads
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, upkeep))  # no daemon: it may have some
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
        return failed(spec, f"the worker process ended with exit code {worker.process.exitcode}")


def failed(spec: TrainingSpec, message: str) -> TrainingRecord:
    """The record of a run that ended without one."""
    return TrainingRecord(
        spec=spec,
        outcome=Outcome(status="failed", message=message),
        step_time_s=None,
        duration_s=0.0,
        environment=describe_environment(parse_device(spec.protocol.device), spec.protocol.threads),
        **sources_of(spec.protocol, _fingerprint(spec)).model_dump(),
    )


def _fingerprint(spec: TrainingSpec) -> str | None:
    dataset = dataset_of(spec)
    return None if dataset is None else dataset.fingerprint


def _serve(connection: Connection, upkeep: Upkeep) -> None:
    """Run what comes through the pipe until it says ``None`` or its other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    with suppress(EOFError, OSError):
        while (spec := connection.recv()) is not None:
            reporter = _Reporter(lambda count: _tell(connection, count))
            connection.send(run(spec, reporter.step, upkeep))


def _tell(connection: Connection, count: int) -> None:
    try:
        connection.send(count)
    except OSError as error:
        raise SystemExit from error  # the parent was killed: there is nobody to run for
