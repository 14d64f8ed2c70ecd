"""Data and training that presets share; the training is the engine's."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from normkit.lab.course import Course, Hooks, nothing
from normkit.lab.data import Dataset, Examples, load, open_data
from normkit.lab.data.dataset import VALIDATION_SHARE, loaded
from normkit.lab.data.sources import OF_FOLDERS
from normkit.lab.device import CPU
from normkit.lab.frozen import Count, Frozen
from normkit.lab.loop import Step
from normkit.lab.recipe import Recipe
from normkit.lab.resume import Checkpoint
from normkit.lab.spec import Protocol
from normkit.lab.tasks.classification import ClassificationRun
from normkit.lab.work import OnStep

HELD_OUT = "a tenth of the training examples"
NOTHING = "nothing"
HOW_IT_TRAINS = ("epochs", "batch_size", "optimizer", "learning_rate", "rate_drop", "weight_decay")


def recipe(rate: float, **given: Any) -> Recipe:
    """A recipe whose learning rate stays as it is for any batch size, and drops once.

    Args:
        rate: Learning rate; it is a tenth in the last quarter of the training.
        given: Other fields of the recipe.
    """
    plain: dict[str, Any] = {"lr_batch_size": None, "weight_decay": 0.0, "lr_drops": (0.75,)}
    return Recipe.checked(plain | {"base_lr": rate} | given)


class Sizes(NamedTuple):
    """Training examples with those held out, test examples, pixels of a side, colours."""

    train: int
    test: int
    side: int
    colours: str


SIZES = {
    "digits": Sizes(1438, 359, 8, "grey"),
    "fashion-mnist": Sizes(60000, 10000, 28, "grey"),
    "mnist": Sizes(60000, 10000, 28, "grey"),
    "cifar10": Sizes(50000, 10000, 32, "colour"),
    "imagenet": Sizes(1281167, 50000, 224, "colour"),
}
"""What the lab's data sets have, said without reading them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a run computes, where its state is kept meanwhile, and who is told of its steps."""

    device: torch.device = CPU
    checkpoint: Checkpoint | None = None
    on_step: OnStep = nothing

    def train(self, network: nn.Module, dataset: Dataset, plan: "Plan", hooks: Hooks) -> None:
        """Train a network in place, or go on from the run's checkpoint.

        Args:
            network: The network.
            dataset: Its training examples are taken.
            plan: How.
            hooks: What is done around the steps.
        """

        def after_step(num_steps: int, step: Step) -> None:
            hooks.after_step(num_steps, step)
            self.on_step()

        protocol = Protocol(data=dataset.name, device=str(self.device), **plan.recipe.model_dump())
        course = Course(
            task=ClassificationRun(network, protocol, dataset),
            protocol=protocol,
            batch_size=plan.batch_size,
            seed=plan.seed,
            hooks=replace(hooks, after_step=after_step),
            checkpoint=self.checkpoint,
        )
        course.resume()
        course.train()


class Plan(NamedTuple):
    """A recipe, the examples of a step, and the seed of their order."""

    recipe: Recipe
    batch_size: int
    seed: int


class Data(Frozen):
    """Which examples.

    Args:
        data: Name of a data set.
        num_train: Training examples; None for all.
        num_test: Test examples; None for all.
        shrink: Pictures are averaged over squares of so many pixels.
        hold_out: Whether a tenth of the training examples is kept from training.
    """

    unused: ClassVar[tuple[str, ...]] = ()
    """Facts that do not matter to the task."""

    data: str
    num_train: Count | None = None
    num_test: Count | None = None
    shrink: Count = 1
    hold_out: bool = True

    @property
    def num_networks(self) -> int:
        """Networks that are trained for an arm and a seed."""
        return 1

    @property
    def sizes_of_data(self) -> Sizes:
        """How many examples there are, of which size; those that are held out are left out."""
        whole = SIZES[self.data]
        kept = whole.train - (round(VALIDATION_SHARE * whole.train) if self.hold_out else 0)
        return Sizes(
            min(self.num_train or kept, kept),
            min(self.num_test or whole.test, whole.test),
            whole.side // self.shrink,
            whole.colours,
        )

    def load_data(self) -> Dataset[Any]:
        """The examples; those of a folder are read when they are taken."""
        if self.data in OF_FOLDERS:
            return open_data(self.data, self.num_train, hold_out=self.hold_out)
        whole = self._loaded()
        return Dataset(
            name=whole.name,
            num_classes=whole.num_classes,
            train=self._shrunk(whole.train),
            validation=self._shrunk(whole.validation),
            test=self._shrunk(whole.test.take(torch.arange(len(whole.test))[: self.num_test])),
        )

    def facts(self) -> dict[str, object]:
        """Everything that decides a run but the arm and the seed, by name."""
        sizes = self.sizes_of_data
        found = self.model_dump(exclude={"shrink", "recipe", "hold_out"}) | {
            "num_train": sizes.train,
            "num_test": sizes.test,
            "pictures": f"{sizes.side}x{sizes.side} {sizes.colours}",
            "held_out": HELD_OUT if self.hold_out else NOTHING,
        }
        return {name: value for name, value in found.items() if name not in self.unused}

    def fingerprint(self) -> str:
        """Twelve digits that change when the data set's files do."""
        return open_data(self.data, self.num_train).fingerprint

    def _loaded(self) -> Dataset[Examples]:
        if self.hold_out:
            return load(self.data, self.num_train)
        return loaded(open_data(self.data, self.num_train, hold_out=False))

    def _shrunk(self, examples: Examples) -> Examples:
        if self.shrink == 1:
            return examples
        return Examples(
            inputs=functional.avg_pool2d(examples.inputs, self.shrink), targets=examples.targets
        )


class Training(Data):
    """Which examples, and how a network is trained on them.

    Args:
        recipe: How.
        batch_size: Examples of a step.
    """

    recipe: Recipe
    batch_size: Count = 32

    def step_size(self, _arm: str) -> int:
        """Examples of a step."""
        return self.batch_size

    def facts(self) -> dict[str, object]:
        """As of the data, and how it is trained."""
        recipe = self.recipe
        sgd = f"SGD, momentum {recipe.momentum:g}"
        return super().facts() | {
            "epochs": recipe.epochs,
            "optimizer": sgd if recipe.optimizer == "sgd" else recipe.optimizer.capitalize(),
            "learning_rate": recipe.base_lr,
            "rate_drop": recipe.schedule_said,
            "weight_decay": recipe.weight_decay,
        }

    def fit(
        self, model: nn.Module, dataset: Dataset, seed: int, place: Place, hooks: Hooks
    ) -> None:
        """Train the model in place.

        Args:
            model: The model.
            dataset: Its training examples are taken.
            seed: Of their order.
            place: Where.
            hooks: What is done around the steps.
        """
        place.train(model, dataset, Plan(self.recipe, self.batch_size, seed), hooks)


TINY_RESNET: dict[str, Any] = {
    "data": "digits",
    "num_train": 64,
    "num_test": 50,
    "model": "small-resnet:width=4:blocks=1",
    "groups": 2,
}
SMALL_RESNET: dict[str, Any] = {
    "data": "digits",
    "model": "small-resnet:blocks=3",
    "groups": 8,
}
"""What several presets train, but for the recipe."""
