"""Data and training that presets share."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from normkit.lab.data import Dataset, Examples, load
from normkit.lab.spec import Count, Frozen
from normkit.lab.steps import batches, train_step

OptimizerName = Literal["sgd", "adam"]
OPTIMIZERS = {"sgd": "SGD, momentum 0.9", "adam": "Adam"}
HELD_OUT = "a tenth of the training examples"
RATE_DROP = "a tenth in the last quarter of the epochs"
HOW_IT_TRAINS = ("epochs", "batch_size", "optimizer", "learning_rate", "rate_drop", "weight_decay")


class Sizes(NamedTuple):
    """Training examples without those held out, test examples, pixels of a side, colours."""

    train: int
    test: int
    side: int
    colours: str


TINY_RESNET: dict[str, Any] = {
    "data": "digits",
    "num_train": 64,
    "num_test": 50,
    "learning_rate": 0.05,
    "model": "small-resnet:width=4:blocks=1",
    "groups": 2,
}
SMALL_RESNET: dict[str, Any] = {
    "data": "digits",
    "learning_rate": 0.05,
    "weight_decay": 1e-4,
    "model": "small-resnet:blocks=3",
    "groups": 8,
}
"""What several presets train, but for the number of epochs."""


SIZES = {
    "digits": Sizes(1294, 359, 8, "grey"),
    "fashion-mnist": Sizes(54000, 10000, 28, "grey"),
    "cifar10": Sizes(45000, 10000, 32, "colour"),
}
"""What the lab's data sets have, said without reading them."""


class Data(Frozen):
    """Which examples.

    Args:
        data: Name of a data set.
        num_train: Training examples; None for all.
        num_test: Test examples; None for all.
        shrink: Pictures are averaged over squares of so many pixels.
    """

    unused: ClassVar[tuple[str, ...]] = ()
    """Facts that do not matter to the task."""

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

    def facts(self) -> dict[str, object]:
        """Everything that decides a run but the arm and the seed, by name."""
        whole = SIZES[self.data]
        side = whole.side // self.shrink
        found = self.model_dump(exclude={"shrink"}) | {
            "num_train": min(self.num_train or whole.train, whole.train),
            "num_test": min(self.num_test or whole.test, whole.test),
            "pictures": f"{side}x{side} {whole.colours}",
            "held_out": HELD_OUT,
        }
        return {name: value for name, value in found.items() if name not in self.unused}

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

    def facts(self) -> dict[str, object]:
        """As of the data, and how it is trained."""
        chosen = {"optimizer": OPTIMIZERS[self.optimizer], "rate_drop": RATE_DROP}
        return super().facts() | chosen

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
