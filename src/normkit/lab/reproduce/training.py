"""Data and training that presets share."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from normkit.lab.data import Dataset, Examples, load
from normkit.lab.spec import Count, Frozen
from normkit.lab.steps import batches, train_step

OptimizerName = Literal["sgd", "adam"]


class Data(Frozen):
    """Which examples.

    Args:
        data: Name of a data set.
        num_train: Training examples; None for all.
        num_test: Test examples; None for all.
        shrink: Pictures are averaged over squares of so many pixels.
    """

    data: str
    num_train: Count | None = None
    num_test: Count | None = None
    shrink: Count = 1

    def load_data(self) -> Dataset:
        """The examples."""
        whole = load(self.data, self.num_train)
        return Dataset(
            name=whole.name,
            num_classes=whole.num_classes,
            train=self._shrunk(whole.train),
            validation=self._shrunk(whole.validation),
            test=self._shrunk(whole.test.take(torch.arange(len(whole.test))[: self.num_test])),
        )

    def fingerprint(self) -> str:
        """Twelve digits that change when the data set's files do."""
        return load(self.data, self.num_train).fingerprint

    def _shrunk(self, examples: Examples) -> Examples:
        if self.shrink == 1:
            return examples
        return Examples(
            inputs=functional.avg_pool2d(examples.inputs, self.shrink), targets=examples.targets
        )


class Training(Data):
    """How a network is trained: the learning rate is a tenth in the last quarter of the epochs."""

    epochs: Count
    batch_size: Count = 32
    optimizer: OptimizerName = "sgd"
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(default=0.0, ge=0)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """SGD with momentum 0.9, or Adam."""
        rate, decay = self.learning_rate, self.weight_decay
        if self.optimizer == "adam":
            return torch.optim.Adam(model.parameters(), lr=rate, weight_decay=decay)
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=decay)

    def fit(
        self,
        model: nn.Module,
        train: Examples,
        seed: int,
        before_epoch: Callable[[int], object] = lambda epoch: None,
    ) -> list[float]:
        """Train the model.

        Args:
            model: Trained in place.
            train: Training examples.
            seed: Of their order.
            before_epoch: Called with the number of finished epochs, also after the last one.

        Returns:
            Training error of each epoch, a share.
        """
        optimizer, errors = self.make_optimizer(model), []
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(self.epochs):
            before_epoch(epoch)
            late = epoch >= 0.75 * self.epochs
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * (0.1 if late else 1)
            errors.append(_epoch(model, optimizer, shuffled(train, self.batch_size, generator)))
        before_epoch(self.epochs)
        return errors


def _epoch(model: nn.Module, optimizer: torch.optim.Optimizer, parts: Iterator[Examples]) -> float:
    model.train()
    num_right = num_seen = 0
    for part in parts:
        num_right += train_step(model, optimizer, part)[1]
        num_seen += len(part)
    return 1 - num_right / num_seen


def shuffled(examples: Examples, batch_size: int, generator: torch.Generator) -> Iterator[Examples]:
    """Batches of one epoch in random order."""
    order = torch.randperm(len(examples), generator=generator)
    return (examples.take(index) for index in batches(order, batch_size))


def endless(examples: Examples, batch_size: int, seed: int) -> Iterator[Examples]:
    """Batches of epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from shuffled(examples, batch_size, generator)
