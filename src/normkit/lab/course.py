"""A training from its first step, or from its checkpoint, to its last one."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from normkit.errors import NormError
from normkit.lab.data import Examples
from normkit.lab.data.dataset import Pictures
from normkit.lab.device import parse_device
from normkit.lab.launch import own_device
from normkit.lab.loading import Loading
from normkit.lab.loop import Loop, Step, num_updates, own_parts
from normkit.lab.recipe import Timetable
from normkit.lab.resume import Checkpoint, SharedCheckpoint
from normkit.lab.spec import Protocol
from normkit.lab.task import TaskRun


@dataclass(slots=True)
class EpochSoFar:
    """What the steps of an epoch have found so far, from the weights of each step."""

    learning_rate: float = 0.0  # of its first step
    num_steps: int = 0
    total_loss: float = 0.0
    num_right: float = 0  # NaN where the task does not count them
    num_seen: int = 0

    def add(self, step: Step) -> None:
        """Count a step."""
        self.num_steps += 1
        self.total_loss += step.loss * step.num_examples
        self.num_right += step.num_right
        self.num_seen += step.num_examples

    @property
    def loss(self) -> float:
        """Mean loss of the examples."""
        return self.total_loss / self.num_seen

    @property
    def accuracy(self) -> float:
        """Share of the examples that were right; NaN where the task does not count them."""
        return self.num_right / self.num_seen


class DivergenceError(NormError, ArithmeticError):
    """The training loss is no longer finite."""


def check_finite(loss: float, step: int) -> None:
    """Refuse a loss that is not finite.

    Raises:
        DivergenceError: With the step, counted from 1.
    """
    if not math.isfinite(loss):
        raise DivergenceError(
            f"the training loss was {loss} at step {step}; lower --base-lr to train on"
        )


def nothing(*_: object) -> None:
    """Do nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What is done around the steps of a training.

    Args:
        before_epoch: Called with the number of finished epochs, also after the last one.
        before_step: Called with the number of finished steps, and the batches of the next one, on
            the device.
        after_step: Called with the number of finished steps, and what the last one found before it
            changed the weights.
        after_epoch: Called with what the epoch found.
        notes: What these write down, as JSON can hold it; a checkpoint keeps it, and it is filled
            in place when a killed training goes on.
    """

    before_epoch: Callable[[int], object] = nothing
    before_step: Callable[[int, Sequence[Any]], object] = nothing
    after_step: Callable[[int, Step], object] = nothing
    after_epoch: Callable[[EpochSoFar], object] = nothing
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Course:
    """A training: its steps in order, at the recipe's learning rates, with what is done around.

    Args:
        task: The network, trained in place where the protocol says, its examples and its loss.
        protocol: The recipe, and where it computes.
        batch_size: Examples that a norm sees at a time.
        seed: Of the order of the examples, and of their changes.
        hooks: What is done around the steps.
        checkpoint: Where its state is kept meanwhile, if anywhere.
        data_workers: Processes that read pictures ahead.
    """

    task: TaskRun
    protocol: Protocol
    batch_size: int
    seed: int
    hooks: Hooks = field(default_factory=Hooks)
    checkpoint: Checkpoint | SharedCheckpoint | None = None
    data_workers: int = 0
    loop: Loop = field(init=False)
    timetable: Timetable = field(init=False)
    num_epochs: int = field(init=False, default=0)  # those that are finished
    num_steps: int = field(init=False, default=0)
    epoch: EpochSoFar = field(init=False, default_factory=EpochSoFar)
    examples: Any = field(init=False)
    _orders: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        protocol, self.examples = self.protocol, self.task.examples
        updates = num_updates(len(self.examples), self.batch_size, protocol)
        self.timetable = Timetable(protocol, updates, protocol.step_examples(self.batch_size))
        self.loop = self.loop_of(self.task)
        self._orders = torch.Generator().manual_seed(self.seed)
        if isinstance(self.examples, Pictures | Examples) and not protocol.augment:
            self.examples = self.examples.to(self.loop.device)

    def loop_of(self, task: TaskRun) -> Loop:
        """The steps of a network: of this one, or of a copy to measure with."""
        device = own_device(parse_device(self.protocol.device))
        return Loop(task.network, self.protocol, self.timetable.rate(0), device, task)

    def resume(self) -> bool:
        """Go on from where a killed training was, if it left a checkpoint; says whether it did."""
        if self.checkpoint is None:
            return False
        saved = self.checkpoint.read(self.loop.network, self.loop.optimizer)
        if saved is None:
            return False
        about = saved.about
        self.num_epochs, self.num_steps = about["num_epochs"], about["num_steps"]
        self._orders.set_state(torch.tensor(about["orders"], dtype=torch.uint8))
        self.epoch = EpochSoFar(**about["epoch"])
        self.loop.load_scaler_state(about["scaler"])
        self.hooks.notes.update(about["notes"])
        self.task.load_state(saved.extra)
        return True

    def train(self) -> None:
        """Do all steps that are left."""
        while self.num_epochs < self.timetable.num_epochs and not self.task.is_done:
            if not self.epoch.num_steps:
                self.epoch.learning_rate = self.timetable.rate(self.num_steps)
                self.hooks.before_epoch(self.num_epochs)
                self.task.begin_epoch(self.loop, self.num_epochs)
            self._train_epoch()
            self.hooks.after_epoch(self.epoch)
            self.num_epochs, self.epoch = self.num_epochs + 1, EpochSoFar()
        self.hooks.before_epoch(self.num_epochs)

    def _train_epoch(self) -> None:
        """Train for one epoch, or the rest of one; each example is seen once."""
        keeps = self.checkpoint is not None
        orders_before = self._orders.get_state().tolist() if keeps else []
        order = self.task.order(self._orders)
        self.loop.model.train()
        for parts in islice(self._steps(order), self.timetable.num_steps - self.num_steps):
            self.loop.set_rate(self.timetable.rate(self.num_steps))
            self.hooks.before_step(self.num_steps, parts)
            self.task.begin_step(self.loop, self.num_steps, parts)
            is_due = self.checkpoint is not None and self.checkpoint.is_due
            step = self.loop.step(parts, is_due=is_due)
            self.num_steps += 1
            self.epoch.add(step)
            self.hooks.after_step(self.num_steps, step)
            if self.checkpoint is not None and step.is_due:
                self._keep(self.checkpoint, orders_before)

    def _steps(self, order: Int[Tensor, " n"]) -> Iterator[list[Any]]:
        seed = hash((self.seed, self.num_epochs)) % 2**31
        loading = Loading(self.protocol.augment, seed, self.data_workers)
        done = self.epoch.num_steps
        return self.loop.epoch(self.examples, order, self.batch_size, loading, done)

    def _keep(self, checkpoint: Checkpoint | SharedCheckpoint, orders_before: list[int]) -> None:
        about = {
            "num_epochs": self.num_epochs,
            "num_steps": self.num_steps,
            "orders": orders_before,
            "epoch": asdict(self.epoch),
            "scaler": self.loop.scaler_state(),
            "notes": self.hooks.notes,
        }
        checkpoint.write(self.loop.network, self.loop.optimizer, about, self.task.state())


def first_batches(examples: Examples, batch_size: int, seed: int, num_steps: int) -> list[Examples]:
    """The batches of the first steps that a course with this seed takes."""
    orders = torch.Generator().manual_seed(seed)
    epochs = (torch.randperm(len(examples), generator=orders) for _ in count())
    parts = (part for order in epochs for part in own_parts(order, batch_size, 0, 1))
    return [examples.take(part) for part in islice(parts, num_steps)]
