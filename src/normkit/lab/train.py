"""One run: a network trained and tested as its spec says."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from normkit import sync_update_rates
from normkit.errors import NormError
from normkit.lab.data import Dataset, load
from normkit.lab.device import parse_device, seeded, threads_of
from normkit.lab.environment import code_hash, describe_environment
from normkit.lab.measure import peak_step_bytes
from normkit.lab.models import BuiltModel, build_model
from normkit.lab.records import Epoch, Outcome, TrainingRecord
from normkit.lab.spec import TrainingSpec
from normkit.lab.steps import batches, evaluate, train_step

NUM_LAST_EPOCHS = 5  # the median of their test accuracies is recorded

OnStep = Callable[[], object]  # called after each training step


class DivergenceError(NormError, ArithmeticError):
    """The training loss is no longer finite."""


def run(spec: TrainingSpec, on_step: OnStep = lambda: None) -> TrainingRecord:
    """Train and test one network; what goes wrong with it is part of the record.

    Args:
        spec: Decides everything but the times.
        on_step: Called after each training step.

    Raises:
        DataError: If the data set's files are missing.
        SpecError: If the data set, the model or the device is unknown.
    """
    device = parse_device(spec.protocol.device)
    environment = describe_environment(device, spec.protocol.threads)
    dataset = load(spec.protocol.data, spec.protocol.limit).to(device)
    started, step_times_s = time.perf_counter(), list[float]()
    with threads_of(spec.protocol.threads), seeded(spec.seed, device):
        outcome = _outcome(spec, dataset, _Stopwatch(step_times_s, device, on_step))
    return TrainingRecord(
        spec=spec,
        outcome=outcome,
        step_time_s=statistics.median(step_times_s) if step_times_s else None,
        duration_s=time.perf_counter() - started,
        environment=environment,
        code_hash=code_hash(),
        data_hash=dataset.fingerprint,
    )


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
    dataset = load(spec.protocol.data, spec.protocol.limit).to(device)
    with threads_of(spec.protocol.threads), seeded(spec.seed, device):
        training = _Training(spec, dataset, _built(spec, dataset), _Stopwatch([], device, on_step))
        outcome = training.outcome()
    if outcome.status == "diverged":
        raise DivergenceError(outcome.message)
    return training.model.eval().cpu()


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


def _outcome(spec: TrainingSpec, dataset: Dataset, stopwatch: _Stopwatch) -> Outcome:
    try:
        return _Training(spec, dataset, _built(spec, dataset), stopwatch).outcome()
    except NormError as error:
        return Outcome(status="failed", message=str(error))
    except Exception as error:  # noqa: BLE001 -- one run must not end the sweep; it is recorded
        return Outcome(status="failed", message=f"{type(error).__name__}: {error}")


def _built(spec: TrainingSpec, dataset: Dataset) -> BuiltModel:
    return build_model(
        spec.protocol.model,
        num_classes=dataset.num_classes,
        input_shape=dataset.input_shape,
        norm=spec.norm,
        batch_size=spec.batch_size,
        seed=spec.seed,
    )


@dataclass(slots=True)
class _Training:
    """The state of one run in flight."""

    spec: TrainingSpec
    dataset: Dataset
    built: BuiltModel
    stopwatch: _Stopwatch
    model: nn.Module = field(init=False)
    optimizer: torch.optim.SGD = field(init=False)
    epochs: list[Epoch] = field(init=False, default_factory=list)
    order: torch.Generator = field(init=False)
    num_steps: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.model = self.built.model.to(self.dataset.train.targets.device)
        self.optimizer = _optimizer(self.model, self.spec)
        self.order = torch.Generator().manual_seed(self.spec.seed)

    def outcome(self) -> Outcome:
        """Train to the end, or to the step that diverges."""
        peak_bytes = self._peak_bytes()
        try:
            for _ in range(self.spec.protocol.epochs):
                self.epochs.append(self._epoch())
        except DivergenceError as error:
            end = {"status": "diverged", "message": str(error), "diverged_step": self.num_steps}
            untested = {"test_accuracy": None, "test_accuracy_median_of_5": None}
            return self._summary(peak_bytes).model_copy(update=end | untested)
        return self._summary(peak_bytes)

    def _summary(self, peak_bytes: int) -> Outcome:
        tested = [e.test_accuracy for e in self.epochs if e.test_accuracy is not None]
        enough = len(tested) >= NUM_LAST_EPOCHS
        num_examples = len(self.dataset.train)
        kept = sum(
            len(batch) for batch in batches(torch.arange(num_examples), self.spec.batch_size)
        )
        return Outcome(
            status="finished",
            epochs=tuple(self.epochs),
            test_accuracy=tested[-1] if tested else None,
            test_accuracy_median_of_5=statistics.median(tested) if enough else None,
            norms=self.built.norms,
            num_parameters=sum(p.numel() for p in self.model.parameters()),
            num_steps=self.num_steps,
            num_dropped=num_examples - kept,
            peak_bytes=peak_bytes,
        )

    def _peak_bytes(self) -> int:
        """Measure a step on a copy, which the run never sees."""
        model = copy.deepcopy(self.model)
        optimizer = _optimizer(model, self.spec)
        batch = self.dataset.train.take(
            torch.arange(min(self.spec.batch_size, len(self.dataset.train)))
        )
        with seeded(self.spec.seed, batch.targets.device):
            return peak_step_bytes(lambda: train_step(model, optimizer, batch), model, optimizer)

    def _epoch(self) -> Epoch:
        rate = self.spec.learning_rate(len(self.epochs))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.spec.has_learning_rate_as_update_rate:
            sync_update_rates(self.model, self.optimizer)
        loss, accuracy = self._train()
        validation_loss, validation_accuracy = evaluate(self.model, self.dataset.validation)
        tests = len(self.epochs) in self._tested_epochs()
        return Epoch(
            learning_rate=rate,
            train_loss=loss,
            train_accuracy=accuracy,
            validation_loss=validation_loss if math.isfinite(validation_loss) else None,
            validation_accuracy=validation_accuracy,
            test_accuracy=evaluate(self.model, self.dataset.test)[1] if tests else None,
        )

    def _tested_epochs(self) -> range:
        num_epochs = self.spec.protocol.epochs
        num_tested = NUM_LAST_EPOCHS if num_epochs >= NUM_LAST_EPOCHS else 1
        return range(num_epochs - num_tested, num_epochs)

    def _train(self) -> tuple[float, float]:
        """Train for one epoch; mean loss and accuracy over its examples, each seen once."""
        self.model.train()
        total_loss = num_right = num_seen = 0.0
        order = torch.randperm(len(self.dataset.train), generator=self.order)
        for index in batches(order, self.spec.batch_size):
            batch = self.dataset.train.take(index.to(self.dataset.train.targets.device))
            with self.stopwatch.step():
                loss, right = train_step(self.model, self.optimizer, batch)
            self.num_steps += 1
            _check_finite(loss, self.num_steps)
            total_loss += loss * len(batch)
            num_right += right
            num_seen += len(batch)
        return total_loss / num_seen, num_right / num_seen


def _optimizer(model: nn.Module, spec: TrainingSpec) -> torch.optim.SGD:
    return torch.optim.SGD(
        model.parameters(),
        lr=spec.learning_rate(0),
        momentum=spec.protocol.momentum,
        weight_decay=spec.protocol.weight_decay,
        fused=True,
    )


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise DivergenceError(
            f"the training loss was {loss} at step {step}; lower --base-lr to train on"
        )
