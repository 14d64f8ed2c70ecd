"""One run: a network trained and tested as its spec says."""

import copy
import math
import statistics
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from normkit import Probe, sync_update_rates
from normkit.errors import DataError, NormError
from normkit.lab.changes import BuiltModel
from normkit.lab.checkpoints import save_weights
from normkit.lab.course import Course, DivergenceError, EpochSoFar, Hooks, check_finite, nothing
from normkit.lab.device import parse_device, seeded, threads_of
from normkit.lab.environment import describe_environment
from normkit.lab.launch import own_device
from normkit.lab.loggers import Loggers, open_loggers
from normkit.lab.loop import Step, own_parts
from normkit.lab.measure import peak_step_bytes
from normkit.lab.own_norms import register_norms
from normkit.lab.own_training import train_by
from normkit.lab.records import Epoch, Outcome, Sources, TrainingRecord, sources_of
from normkit.lab.spec import TrainingSpec
from normkit.lab.start import alterations_of
from normkit.lab.task import TaskData, finite_scores, parse_task
from normkit.lab.user_code import told
from normkit.lab.work import OnStep, Upkeep, Work

NUM_LAST_EPOCHS = 5  # the median of their test accuracies is recorded
_NOWHERE = Sources(code_hash="")
NUM_KEPT_TIMES = 1000  # step times that a checkpoint keeps


def run(
    spec: TrainingSpec, on_step: OnStep = nothing, upkeep: Upkeep | None = None
) -> TrainingRecord:
    """Train and test one network; what goes wrong with it is part of the record.

    With a folder, a run that was killed goes on from its last checkpoint there; on the CPU its
    outcome is then, bit for bit, that of a run that was not.

    Args:
        spec: Decides everything but the times.
        on_step: Called after each training step.
        upkeep: What is done beside.

    Raises:
        DataError: If the data set's files are missing.
        SpecError: If the data set, the model or the device is unknown.
    """
    upkeep = upkeep or Upkeep()
    device = own_device(parse_device(spec.protocol.device))
    environment = describe_environment(device, spec.protocol.threads)
    data = data_of(spec)
    sources = sources_of(spec.protocol, None if data is None else data.fingerprint)
    started, step_times_s = time.perf_counter(), list[float]()
    with threads_of(spec.protocol.threads), seeded(spec.seed, device):
        outcome = _outcome(spec, data, upkeep, sources, on_step, step_times_s)
    return TrainingRecord(
        spec=spec,
        outcome=outcome,
        step_time_s=statistics.median(step_times_s) if step_times_s else None,
        duration_s=time.perf_counter() - started,
        environment=environment,
        **sources.model_dump(),
    )


def data_of(spec: TrainingSpec) -> TaskData | None:
    """The run's data; None where a user's function trains."""
    protocol = spec.protocol
    return None if protocol.train is not None else parse_task(protocol.task).data(protocol)


def train(spec: TrainingSpec, on_step: OnStep = nothing) -> nn.Module:
    """Train one network and give it, in evaluation mode, on the CPU.

    Args:
        spec: Decides the network, bit for bit on one machine.
        on_step: Called after each training step.

    Raises:
        DivergenceError: If the loss is no longer finite.
        NormError: As :func:`run`; what goes wrong is not recorded but raised.
    """
    device = parse_device(spec.protocol.device)
    task = parse_task(spec.protocol.task)
    data = task.data(spec.protocol)
    with threads_of(spec.protocol.threads), seeded(spec.seed, device):
        task.prepare(spec, data, on_step)
        training = _Training(spec, data, task.build(spec, data), Upkeep(), _NOWHERE, on_step)
        outcome = training.outcome()
    if outcome.status == "diverged":
        raise DivergenceError(outcome.message)
    return training.course.task.network.eval().cpu()


def _outcome(
    spec: TrainingSpec,
    data: TaskData | None,
    upkeep: Upkeep,
    sources: Sources,
    on_step: OnStep,
    times_s: list[float],
) -> Outcome:
    try:
        register_norms(spec.protocol.own_norms)
        if data is None:
            with open_loggers(upkeep.loggers, upkeep.folder, spec) as loggers:
                return train_by(spec, on_step, loggers)
        task = parse_task(spec.protocol.task)
        task.prepare(spec, data, on_step)
        network = task.build(spec, data)
        return _Training(spec, data, network, upkeep, sources, on_step, times_s).outcome()
    except DivergenceError as error:  # of what a task trains before the run's own steps
        return Outcome(status="diverged", message=str(error))
    except NormError as error:
        return Outcome(status="failed", message=str(error))
    except Exception as error:
        if (
            spec.protocol.processes > 1
        ):  # the others wait for this one, until its launcher ends them
            raise DataError(
                f"{spec.norm} at batch size {spec.batch_size} failed on one of "
                f"{spec.protocol.processes} processes: {told(error)}; finished runs are kept, and "
                f"the same command goes on from there"
            ) from error
        return Outcome(status="failed", message=told(error))


@dataclass(slots=True)
class _Training:
    """One run in flight: its course, and what is tested, timed and logged along it."""

    spec: TrainingSpec
    data: TaskData
    built: BuiltModel
    upkeep: Upkeep
    sources: Sources
    on_step: OnStep
    times_s: list[float] = field(default_factory=list)
    course: Course = field(init=False)
    epochs: list[Epoch] = field(init=False, default_factory=list)
    _started: float = field(init=False, default=0.0)
    _loggers: Loggers = field(init=False, default_factory=Loggers)
    _probe: Probe | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        spec = self.spec
        alone = spec.protocol.processes == 1
        where = self.upkeep.checkpoint if alone else self.upkeep.shared_checkpoint
        self.course = Course(
            task=parse_task(spec.protocol.task).start(spec, self.data, self.built.model),
            protocol=spec.protocol,
            batch_size=spec.batch_size,
            seed=spec.seed,
            hooks=Hooks(
                before_step=self._before_step,
                after_step=self._after_step,
                after_epoch=self._after_epoch,
            ),
            checkpoint=where(spec, self.sources),
            data_workers=self.upkeep.data_workers,
        )

    def outcome(self) -> Outcome:
        """Train to the end, or to the step that diverges."""
        course, notes = self.course, self.course.hooks.notes
        if course.resume():
            self.epochs = [Epoch(**epoch) for epoch in notes["epochs"]]
            self.times_s.extend(notes["times_s"])
        else:
            notes |= {"epochs": [], "peak_bytes": self._peak_bytes()}
        try:
            self._train()
        except DivergenceError as error:
            end = {"status": "diverged", "message": str(error), "diverged_step": course.num_steps}
            untested = {"scores": {}, "median_of_5": None}
            outcome = self._summary().model_copy(update=end | untested)
        else:
            outcome = self._summary()
            self._save()
        if course.checkpoint is not None:
            course.checkpoint.remove()
        return outcome

    def _train(self) -> None:
        names = self.upkeep.loggers if self.course.loop.fabric.is_global_zero else ()
        with open_loggers(names, self.upkeep.folder, self.spec) as self._loggers:
            for number in range(len(self.epochs)):  # those before the run was killed
                self._log(number)
            with self._probed() if names else nullcontext():
                self.course.train()

    @contextmanager
    def _probed(self) -> Generator[None]:
        """Let a probe, if one is asked for, write to the loggers in a block."""
        every = self.upkeep.probe_every
        if every is None:
            yield
            return
        self._probe = Probe(self.course.loop.network, every, writer=self._loggers)
        self._probe.num_steps = self.course.num_steps  # those before the run was killed
        with self._probe:
            yield

    def _before_step(self, _num_steps: int, _parts: Sequence[Any]) -> None:
        if self.spec.has_learning_rate_as_update_rate:
            sync_update_rates(self.course.loop.network, self.course.loop.optimizer)
        self._started = time.perf_counter()

    def _after_step(self, num_steps: int, step: Step) -> None:
        device = self.course.loop.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.times_s.append(time.perf_counter() - self._started)
        if self._probe is not None:
            self._probe.step(step.loss)
        self.on_step()
        check_finite(step.loss, num_steps)
        self.course.hooks.notes["times_s"] = self.times_s[-NUM_KEPT_TIMES:]

    def _after_epoch(self, epoch: EpochSoFar) -> None:
        self.epochs.append(self._tested(epoch))
        self.course.hooks.notes["epochs"].append(self.epochs[-1].model_dump())
        self._log(len(self.epochs) - 1)

    def _log(self, number: int) -> None:
        """Give the loggers an epoch's figures."""
        timetable = self.course.timetable
        step = min((number + 1) * timetable.steps_per_epoch, timetable.num_steps)
        self._loggers.log_metrics(self.epochs[number].figures(), step)

    def _tested(self, epoch: EpochSoFar) -> Epoch:
        loop, num_epochs = self.course.loop, self.course.timetable.num_epochs
        validation = loop.evaluate("validation")
        num_tested = NUM_LAST_EPOCHS if num_epochs >= NUM_LAST_EPOCHS else 1
        tests = self.course.task.is_done or len(self.epochs) >= num_epochs - num_tested
        test = loop.evaluate("test") if tests else {}
        return Epoch(
            learning_rate=epoch.learning_rate,
            train_loss=epoch.loss,
            train_accuracy=epoch.accuracy if math.isfinite(epoch.accuracy) else None,
            validation_scores=finite_scores(validation),
            test_scores=finite_scores(test),
        )

    def _summary(self) -> Outcome:
        tested = [next(iter(e.test_scores.values())) for e in self.epochs if e.test_scores]
        known = [score for score in tested if score is not None]
        enough = len(known) >= NUM_LAST_EPOCHS
        num_examples, world = len(self.course.examples), self.spec.protocol.processes
        order = torch.arange(num_examples)
        kept = sum(
            len(part)
            for rank in range(world)
            for part in own_parts(order, self.spec.batch_size, rank, world)
        )
        return Outcome(
            status="finished",
            epochs=tuple(self.epochs),
            scores=self.epochs[-1].test_scores if self.epochs else {},
            median_of_5=statistics.median(known[-NUM_LAST_EPOCHS:]) if enough else None,
            norms=self.built.norms,
            num_parameters=sum(p.numel() for p in self.course.loop.network.parameters()),
            num_steps=self.course.num_steps,
            num_dropped=num_examples - kept,
            peak_bytes=self.course.hooks.notes["peak_bytes"],
        )

    def _peak_bytes(self) -> int | None:
        """Measure a step on a copy, which the run never sees."""
        if self.spec.protocol.processes > 1:
            return None
        with seeded(self.spec.seed, self.course.loop.device):
            copied = copy.deepcopy(self.built.model)
            task = parse_task(self.spec.protocol.task)
            loop = self.course.loop_of(task.start(self.spec, self.data, copied))
            size = min(self.spec.batch_size, len(self.course.examples))
            part = self.course.examples.take(torch.arange(size)).to(loop.device)
            parts = [part] * self.spec.protocol.accumulate
            return peak_step_bytes(lambda: loop.step(parts), loop.network, loop.optimizer)

    def _save(self) -> None:
        folder, loop = self.upkeep.folder, self.course.loop
        if folder is None or not self.upkeep.save_weights:
            return
        state = loop.state()
        if not loop.fabric.is_global_zero:
            return
        path = folder / "weights" / f"{self.spec.file_name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"model": self.spec.protocol.model, "norm": self.spec.norm}
        save_weights(state, path, about | alterations_of(self.built, self.spec.protocol).metadata())


def failed(spec: TrainingSpec, message: str) -> TrainingRecord:
    """The record of a run that ended without one."""
    data = data_of(spec)
    fingerprint = None if data is None else data.fingerprint
    return TrainingRecord(
        spec=spec,
        outcome=Outcome(status="failed", message=message),
        step_time_s=None,
        duration_s=0.0,
        environment=describe_environment(parse_device(spec.protocol.device), spec.protocol.threads),
        **sources_of(spec.protocol, fingerprint).model_dump(),
    )


TRAINING = Work(run=run, failed=failed)
