"""A deep stack of norms trained by gradient descent on a whole training set, and followed."""

from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field
from torch import nn

import normkit as nk
from normkit.lab.course import Hooks
from normkit.lab.data import Dataset, Examples
from normkit.lab.data.dataset import stratified_order
from normkit.lab.evaluation import ACCURACY, evaluate
from normkit.lab.frozen import Count
from normkit.lab.loop import Step
from normkit.lab.recipe import Recipe
from normkit.lab.reproduce.tasks.networks import seeded_network
from normkit.lab.reproduce.tasks.records import Values
from normkit.lab.reproduce.tasks.settings import Data, Place, Plan, recipe
from normkit.lab.reproduce.tasks.task import PresetTask

BLOCKED = "gnbn"


def followed(iterations: int) -> Recipe:
    """Plain gradient descent, with a step more that tells the error after the last iteration."""
    return recipe(0.1, momentum=0.0, schedule="constant", steps=iterations + 1)


class StackSettings(Data):
    """A multilayer perceptron trained by gradient descent on a whole training set.

    Args:
        depth: Layers with a norm.
        width: Neurons of each.
        recipe: Plain gradient descent; each step sees the whole training set.
        every: Test error and shift are measured every so many iterations.
        groups: Of the group norms of GNBN.
        sizes: Examples of sampled training sets; none where it is the test set.
    """

    unused = ("num_train", "held_out")  # training sets come from the test set

    depth: Count = 20
    width: Count = 128
    recipe: Recipe = Field(default_factory=lambda: followed(80))
    every: Count = 2
    groups: Count = 4
    sizes: tuple[Count, ...] = ()

    def step_size(self, arm: str) -> int:
        """Examples of a step: the training set, which is the test set or a sample of it."""
        size = arm.partition("-")[2]
        return int(size) if size else self.sizes_of_data.test

    def facts(self) -> dict[str, object]:
        """As of the data, and how it is trained."""
        iterations = self.recipe.length - 1
        return super().facts() | {"iterations": iterations, "learning_rate": self.recipe.base_lr}


def stack_of(settings: StackSettings, arm: str, dataset: Dataset, seed: int) -> nn.Module:
    """The network of an arm."""
    norm = arm.partition("-")[0]
    model = seeded_network(
        f"mlp:depth={settings.depth}:width={settings.width}",
        "bn" if norm == BLOCKED else norm,
        dataset,
        seed,
    )
    if norm == BLOCKED:
        nk.place_gnbn_(model, f"gn:{settings.groups}")
    return model


def measure_shift(settings: StackSettings, arm: str, seed: int, place: Place) -> Values:
    """Train on the test set or a sample of it, and follow errors and shift.

    Args:
        settings: What is trained.
        arm: ``bn``, ``gnbn`` or ``none``; with ``-N`` on N examples.
        seed: Of weights and sample.
        place: Where it is done.

    Returns:
        Curves over the measured iterations; shifts are by layer.
    """
    _, _, size = arm.partition("-")
    dataset = settings.load_data()
    model = stack_of(settings, arm, dataset, seed)
    test = _flat(dataset.test)
    train = test.take(stratified_order(test.targets, seed)[: int(size)]) if size else test
    both = replace(dataset, train=train, test=test)
    found = _followed(model, both, settings, seed, place)
    return found | {"norms": _positions(model), "num_train": len(train)}


def _flat(examples: Examples) -> Examples:
    """Pictures as rows of values, so that every pixel has statistics of its own."""
    return Examples(inputs=examples.inputs.flatten(1), targets=examples.targets)


def _positions(model: nn.Module) -> list[int]:
    """Which norms of the stack, counted from 1, have running statistics."""
    norms = [m for m in model.modules() if isinstance(m, nk.BatchNorm | nk.GroupNorm)]
    return [place for place, m in enumerate(norms, start=1) if isinstance(m, nk.BatchNorm)]


def _followed(
    model: nn.Module, train: Dataset, settings: StackSettings, seed: int, place: Place
) -> Values:
    """Train on all training examples at once; errors and shift come before and from a step."""
    names = ("iterations", "train_error", "test_error", "esm_mean", "esm_std")
    notes: Values = {name: [] for name in names} | {"input_shift": 0.0}

    def is_measured(iteration: int) -> bool:
        return iteration > 0 and iteration % settings.every == 0

    def look(iteration: int, _parts: Sequence[Examples]) -> None:
        if is_measured(iteration):  # what the iterations so far have left
            rows = _shift(model, train)
            notes["iterations"].append(iteration)
            notes["test_error"].append(1 - evaluate(model, train.test)[ACCURACY])
            notes["esm_mean"].append(rows["esm_mean"])
            notes["esm_std"].append(rows["esm_std"])
            notes["input_shift"] = rows["input_shift"]

    def note_error(num_steps: int, step: Step) -> None:
        if is_measured(num_steps - 1):
            notes["train_error"].append(1 - step.num_right / step.num_examples)

    hooks = Hooks(before_step=look, after_step=note_error, notes=notes)
    place.train(model, train, Plan(settings.recipe, len(train.train), seed), hooks)
    return notes


def _shift(model: nn.Module, dataset: Dataset) -> Values:
    if not any(isinstance(m, nk.BatchNorm) for m in model.modules()):
        return {"input_shift": 0.0, "esm_mean": [], "esm_std": []}
    train, test = dataset.train.inputs, dataset.test.inputs
    found = nk.estimation_shift(model, [test], train_batches=[train]).layers
    return {
        "input_shift": found[0].esm_std,
        "esm_mean": [row.esm_mean for row in found[1:]],
        "esm_std": [row.esm_std for row in found[1:]],
    }


STACK = PresetTask(name="stack", settings=StackSettings, network=stack_of, measure=measure_shift)
