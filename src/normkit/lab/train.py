"""One run: a network trained and tested as its spec says."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from normkit import sync_update_rates
from normkit.errors import DataError, NormError
from normkit.lab.changes import BuiltModel
from normkit.lab.checkpoints import save_weights
from normkit.lab.data import Dataset, Split, open_data
from normkit.lab.data.dataset import Pictures
from normkit.lab.device import parse_device, seeded, threads_of
from normkit.lab.environment import describe_environment
from normkit.lab.launch import own_device
from normkit.lab.loading import Loading
from normkit.lab.loggers import Logger, open_loggers
from normkit.lab.loop import Loop, num_updates, own_parts
from normkit.lab.measure import peak_step_bytes
from normkit.lab.own_training import train_by
from normkit.lab.recipe import Timetable
from normkit.lab.records import Epoch, Outcome, Sources, TrainingRecord, sources_of
from normkit.lab.resume import FOLDER, SECONDS, Checkpoint
from normkit.lab.spec import TrainingSpec
from normkit.lab.start import alterations_of, built
from normkit.lab.user_code import told

NUM_LAST_EPOCHS = 5  # the median of their test accuracies is recorded

OnStep = Callable[[], object]  # called after each training step


class DivergenceError(NormError, ArithmeticError):
    """The training loss is no longer finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upkeep:
    """What is done beside a run and changes nothing of its outcome.

    Args:
        folder: Where checkpoints and weights go; None for neither.
        checkpoint_seconds: Time between two checkpoints; 0 for one after every step.
        save_weights: Whether the trained weights are written, to ``weights/``.
        data_workers: Processes that read pictures ahead.
        loggers: Names of loggers that get every epoch's figures.
    """

    folder: Path | None = None
    checkpoint_seconds: float = SECONDS
    save_weights: bool = False
    data_workers: int = 0
    loggers: tuple[str, ...] = ()


def run(
    spec: TrainingSpec, on_step: OnStep = lambda: None, upkeep: Upkeep | None = None
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
    dataset = dataset_of(spec)
    sources = sources_of(spec.protocol, None if dataset is None else dataset.fingerprint)
    started, step_times_s = time.perf_counter(), list[float]()
    with threads_of(spec.protocol.threads), seeded(spec.seed, device):
        stopwatch = _Stopwatch(step_times_s, device, on_step)
        outcome = _outcome(spec, dataset, stopwatch, _Keeping(spec, upkeep, sources))
    return TrainingRecord(
        spec=spec,
        outcome=outcome,
        step_time_s=statistics.median(step_times_s) if step_times_s else None,
        duration_s=time.perf_counter() - started,
        environment=environment,
        **sources.model_dump(),
    )


def dataset_of(spec: TrainingSpec) -> Dataset[Split] | None:
    """The run's data set; None where a user's function trains."""
    protocol = spec.protocol
    if protocol.train is not None:
        return None
    return open_data(protocol.data, protocol.limit, protocol.image_size)


def train(spec: TrainingSpec, on_step: OnStep = lambda: None) -> nn.Module:
    """Train one network and give it, in evaluation mode, on the CPU.

    Args:
        spec: Decides the network, bit for bit on one machine.
        on_step: Called after each training step.

    Raises:
        DivergenceError: If the loss is no longer finite.
        NormError: As :func:`run`; what goes wrong is not recorded but raised.
    """
    device = parse_device(spec.protocol.device)
    dataset = open_data(spec.protocol.data, spec.protocol.limit, spec.protocol.image_size)
    with threads_of(spec.protocol.threads), seeded(spec.seed, device):
        stopwatch = _Stopwatch([], device, on_step)
        keeping = _Keeping(spec, Upkeep(), Sources(code_hash=""))
        training = _Training(spec, dataset, built(spec, dataset), stopwatch, keeping)
        outcome = training.outcome()
    if outcome.status == "diverged":
        raise DivergenceError(outcome.message)
    return training.loop.network.eval().cpu()


@dataclass(frozen=True, slots=True)
class _Stopwatch:
    """Takes the time of each training step."""

    times_s: list[float]
    device: torch.device
    on_step: OnStep

    @contextmanager
    def step(self) -> Generator[None]:
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times_s.append(time.perf_counter() - started)
        self.on_step()


@dataclass(frozen=True, slots=True)
class _Keeping:
    """Files that a run leaves or goes on from."""

    spec: TrainingSpec
    upkeep: Upkeep
    sources: Sources

    def checkpoint(self, rank: int) -> Checkpoint | None:
        folder, protocol = self.upkeep.folder, self.spec.protocol
        if folder is None or protocol.processes > 1:
            return None  # one of several processes may be killed before it has written
        name = f"{self.spec.key}-{self.sources.key}-{rank}.safetensors"
        return Checkpoint(folder / FOLDER / name, self.upkeep.checkpoint_seconds)

    def loggers(self) -> list[Logger]:
        folder = self.upkeep.folder or Path()
        return open_loggers(self.upkeep.loggers, folder, self.spec)

    def save(self, loop: Loop, built: BuiltModel) -> None:
        folder = self.upkeep.folder
        if folder is None or not self.upkeep.save_weights:
            return
        state = loop.state()
        if not loop.fabric.is_global_zero:
            return
        path = folder / "weights" / f"{self.spec.file_name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"model": self.spec.protocol.model, "norm": self.spec.norm}
        save_weights(state, path, about | alterations_of(built).metadata())


def _outcome(
    spec: TrainingSpec, dataset: Dataset[Split] | None, stopwatch: _Stopwatch, keeping: _Keeping
) -> Outcome:
    try:
        if dataset is None:
            return train_by(spec, stopwatch.on_step)
        return _Training(spec, dataset, built(spec, dataset), stopwatch, keeping).outcome()
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
    """The state of one run in flight."""

    spec: TrainingSpec
    dataset: Dataset[Split]
    built: BuiltModel
    stopwatch: _Stopwatch
    keeping: _Keeping
    loop: Loop = field(init=False)
    timetable: Timetable = field(init=False)
    train_split: Split = field(init=False)
    epochs: list[Epoch] = field(init=False, default_factory=list)
    order: torch.Generator = field(init=False)
    num_steps: int = field(init=False, default=0)
    peak_bytes: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        protocol, batch_size = self.spec.protocol, self.spec.batch_size
        updates = num_updates(len(self.dataset.train), batch_size, protocol)
        self.timetable = Timetable(protocol, updates, protocol.step_examples(batch_size))
        self.loop = self._loop(self.built.model)
        self.order = torch.Generator().manual_seed(self.spec.seed)
        self.train_split = self.dataset.train
        if isinstance(self.train_split, Pictures) and not protocol.augment:
            self.train_split = self.train_split.to(self.loop.device)

    def _loop(self, model: nn.Module) -> Loop:
        device = own_device(parse_device(self.spec.protocol.device))
        return Loop(
            model, self.spec.protocol, self.timetable.rate(0), device, self.dataset.num_classes
        )

    def outcome(self) -> Outcome:
        """Train to the end, or to the step that diverges."""
        checkpoint = self.keeping.checkpoint(self.loop.fabric.global_rank)
        progress = self._resumed(checkpoint)
        if progress is None:
            self.peak_bytes = self._peak_bytes()
            progress = _Progress()
        try:
            self._train_to_the_end(progress, checkpoint)
        except DivergenceError as error:
            end = {"status": "diverged", "message": str(error), "diverged_step": self.num_steps}
            untested = {"test_accuracy": None, "test_accuracy_median_of_5": None}
            outcome = self._summary().model_copy(update=end | untested)
        else:
            outcome = self._summary()
            self.keeping.save(self.loop, self.built)
        if checkpoint is not None:
            checkpoint.remove()
        return outcome

    def _train_to_the_end(self, progress: "_Progress", checkpoint: Checkpoint | None) -> None:
        loggers = self.keeping.loggers() if self.loop.fabric.is_global_zero else []
        try:
            while len(self.epochs) < self.timetable.num_epochs:
                self._epoch(progress, checkpoint)
                progress = _Progress()
                for logger in loggers:
                    logger.log_metrics(_figures(self.epochs[-1]), self.num_steps)
        finally:
            for logger in loggers:
                logger.end()

    def _resumed(self, checkpoint: Checkpoint | None) -> "_Progress | None":
        """Go on from where a killed run was, if it left a checkpoint."""
        if checkpoint is None:
            return None
        about = checkpoint.read(self.loop.network, self.loop.optimizer)
        if about is None:
            return None
        self.epochs = [Epoch(**epoch) for epoch in about["epochs"]]
        self.num_steps, self.peak_bytes = about["num_steps"], about["peak_bytes"]
        self.order.set_state(torch.tensor(about["order"], dtype=torch.uint8))
        self.stopwatch.times_s.extend(about["times_s"])
        return _Progress(**about["progress"])

    def _keep(self, checkpoint: Checkpoint, progress: "_Progress", order: list[int]) -> None:
        about = {
            "epochs": [epoch.model_dump() for epoch in self.epochs],
            "num_steps": self.num_steps,
            "peak_bytes": self.peak_bytes,
            "order": order,
            "times_s": self.stopwatch.times_s[-1000:],
            "progress": asdict(progress),
        }
        checkpoint.write(self.loop.network, self.loop.optimizer, about)

    def _summary(self) -> Outcome:
        tested = [e.test_accuracy for e in self.epochs if e.test_accuracy is not None]
        enough = len(tested) >= NUM_LAST_EPOCHS
        num_examples, protocol = len(self.dataset.train), self.spec.protocol
        order = torch.arange(num_examples)
        world = protocol.processes
        kept = sum(
            len(part)
            for rank in range(world)
            for part in own_parts(order, self.spec.batch_size, rank, world)
        )
        last = self.epochs[-1] if self.epochs else None
        return Outcome(
            status="finished",
            epochs=tuple(self.epochs),
            test_accuracy=tested[-1] if tested else None,
            test_accuracy_median_of_5=statistics.median(tested) if enough else None,
            test_top5_accuracy=last.test_top5_accuracy if last else None,
            norms=self.built.norms,
            num_parameters=sum(p.numel() for p in self.loop.network.parameters()),
            num_steps=self.num_steps,
            num_dropped=num_examples - kept,
            peak_bytes=self.peak_bytes,
        )

    def _peak_bytes(self) -> int | None:
        """Measure a step on a copy, which the run never sees."""
        if self.spec.protocol.processes > 1:
            return None
        with seeded(self.spec.seed, self.loop.device):
            loop = self._loop(copy.deepcopy(self.built.model))
            size = min(self.spec.batch_size, len(self.dataset.train))
            part = self.dataset.train.take(torch.arange(size)).to(loop.device)
            parts = [part] * self.spec.protocol.accumulate
            return peak_step_bytes(lambda: loop.step(parts), loop.network, loop.optimizer)

    def _epoch(self, progress: "_Progress", checkpoint: Checkpoint | None) -> None:
        """Train for one epoch, or the rest of one; each example is seen once."""
        rate = self.timetable.rate(self.num_steps - progress.num_steps)
        order_state = self.order.get_state().tolist() if checkpoint is not None else []
        order = torch.randperm(len(self.dataset.train), generator=self.order)
        loading = Loading(
            self.spec.protocol.augment,
            hash((self.spec.seed, len(self.epochs))) % 2**31,
            self.keeping.upkeep.data_workers,
        )
        self.loop.model.train()
        steps = self.loop.epoch(
            self.train_split, order, self.spec.batch_size, loading, progress.num_steps
        )
        for parts in steps:
            self._take_rate()
            with self.stopwatch.step():
                step = self.loop.step(parts)
            self.num_steps += 1
            progress.add(step.loss, step.num_right, step.num_examples)
            _check_finite(step.loss, self.num_steps)
            if checkpoint is not None and checkpoint.is_due:
                self._keep(checkpoint, progress, order_state)
            if self.num_steps == self.timetable.num_steps:
                break
        self.epochs.append(self._tested(rate, progress))

    def _take_rate(self) -> None:
        self.loop.set_rate(self.timetable.rate(self.num_steps))
        if self.spec.has_learning_rate_as_update_rate:
            sync_update_rates(self.loop.network, self.loop.optimizer)

    def _tested(self, rate: float, progress: "_Progress") -> Epoch:
        validation = self.loop.evaluate(self.dataset.validation)
        num_epochs = self.timetable.num_epochs
        num_tested = NUM_LAST_EPOCHS if num_epochs >= NUM_LAST_EPOCHS else 1
        tests = len(self.epochs) >= num_epochs - num_tested
        test = self.loop.evaluate(self.dataset.test) if tests else None
        return Epoch(
            learning_rate=rate,
            train_loss=progress.total_loss / progress.num_seen,
            train_accuracy=progress.num_right / progress.num_seen,
            validation_loss=validation.loss if math.isfinite(validation.loss) else None,
            validation_accuracy=validation.accuracy,
            test_accuracy=test.accuracy if test else None,
            test_top5_accuracy=test.top5_accuracy if test else None,
        )


@dataclass(slots=True)
class _Progress:
    """Of an epoch in flight."""

    num_steps: int = 0
    total_loss: float = 0.0
    num_right: int = 0
    num_seen: int = 0

    def add(self, loss: float, num_right: int, num_examples: int) -> None:
        self.num_steps += 1
        self.total_loss += loss * num_examples
        self.num_right += num_right
        self.num_seen += num_examples


def _figures(epoch: Epoch) -> dict[str, float]:
    return {name: value for name, value in epoch.model_dump().items() if value is not None}


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise DivergenceError(
            f"the training loss was {loss} at step {step}; lower --base-lr to train on"
        )
