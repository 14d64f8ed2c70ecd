"""The landscape of a VGG-11's loss while it trains, by both protocols."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

import normkit as nk
from normkit.lab.course import Hooks, first_batches
from normkit.lab.data import Dataset, Examples
from normkit.lab.frozen import Count
from normkit.lab.loop import make_optimizer
from normkit.lab.recipe import Recipe
from normkit.lab.reproduce.tasks.networks import vgg11
from normkit.lab.reproduce.tasks.records import Values
from normkit.lab.reproduce.tasks.settings import Data, Place, Plan
from normkit.lab.reproduce.tasks.task import PresetTask

L2 = "+l2"
CURVES = {
    "min_loss": "min_loss",
    "max_loss": "max_loss",
    "min_change": "min_gradient_change",
    "max_change": "max_gradient_change",
}


class LandscapeSettings(Data):
    """A VGG-11 trained with several learning rates from one start.

    Args:
        width: Channels of the first layer; the others in proportion.
        groups: Of group norm.
        batch_size: Examples of a step.
        recipe: How it is trained, but for the learning rate.
        rates: Learning rates.
        l2: Weight decay of the arms with ``+l2``, as Adam adds it to the gradient.
    """

    unused = ("num_test",)

    width: Count
    groups: Count
    batch_size: Count
    recipe: Recipe
    rates: tuple[float, ...] = (1e-4, 2e-4, 3e-4, 4e-4, 5e-4)
    l2: float = Field(default=5e-5, ge=0)

    def facts(self) -> dict[str, object]:
        """As of the data, and the number of steps."""
        return super().facts() | {"steps": self.recipe.steps}

    @property
    def num_networks(self) -> int:
        """Networks that are trained for an arm and a seed: one for each rate."""
        return len(self.rates)

    def step_size(self, _arm: str) -> int:
        """Examples of a step."""
        return self.batch_size

    def network(self, arm: str, dataset: Dataset, seed: int) -> nn.Module:
        """The network of an arm."""
        norm = arm.removesuffix(L2)
        spec = f"{norm}:{self.groups}" if norm in ("gn", "gnplus") else norm
        return vgg11(spec, dataset, self.width, seed)


class AlongSettings(LandscapeSettings):
    """A VGG-11 trained with one learning rate and looked at along its gradients.

    Args:
        etas: Steps along the gradient.
        every: Steps between two looks.
    """

    etas: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    every: Count = 10

    @property
    def num_networks(self) -> int:
        """Networks that are trained for an arm and a seed."""
        return 1

    def facts(self) -> dict[str, object]:
        """As of the landscape, and the learning rate."""
        return super().facts() | {"learning_rate": self.recipe.base_lr}


def _pair(part: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    return part.inputs, part.targets


def measure_rates(settings: LandscapeSettings, arm: str, seed: int, place: Place) -> Values:
    """Train copies with all learning rates, protocol ``multi_lr``.

    Args:
        settings: What is trained.
        arm: A norm, alone or with ``+l2``.
        seed: Of weights and order.
        place: Where it is done.

    Returns:
        By step, the least and the largest loss and change of the gradient.
    """
    dataset = settings.load_data()
    model = settings.network(arm, dataset, seed).to(place.device)
    decay = settings.l2 if arm.endswith(L2) else 0.0
    recipe = settings.recipe.model_copy(update={"weight_decay": decay})
    parts = first_batches(dataset.train, settings.batch_size, seed, recipe.length)
    found = nk.gradient_landscape(
        model,
        [_pair(part) for part in parts],
        protocol="multi_lr",
        rates=settings.rates,
        optimizer=lambda params, rate: make_optimizer(params, recipe, rate),
    )
    steps = found.steps[1:]  # the first step has no gradient before it
    return {"steps": [step.name for step in steps]} | _curves(steps)


def measure_along(settings: AlongSettings, arm: str, seed: int, place: Place) -> Values:
    """Train, and look along the gradient every few steps, protocol ``along_gradient``.

    Args:
        settings: What is trained.
        arm: A norm.
        seed: Of weights and order.
        place: Where it is done.

    Returns:
        As :func:`measure_rates`, and the effective smoothness, at the steps that were looked at.
    """
    dataset = settings.load_data()
    model = settings.network(arm, dataset, seed)
    notes: Values = {"steps": [], **{name: [] for name in CURVES}, "effective_smoothness": []}

    def look(num_steps: int, parts: Sequence[Examples]) -> None:
        if num_steps % settings.every == 0:
            found = nk.gradient_landscape(
                model, [_pair(parts[0])], protocol="along_gradient", rates=settings.etas
            )
            smoothness = [step.effective_smoothness for step in found.steps]
            rows = {"steps": [num_steps], "effective_smoothness": smoothness}
            for name, values in (rows | _curves(found.steps)).items():
                notes[name] += values

    plan = Plan(settings.recipe, settings.batch_size, seed)
    place.train(model, dataset, plan, Hooks(before_step=look, notes=notes))
    return notes


def _curves(steps: Any) -> Values:
    return {name: [getattr(step, of) for step in steps] for name, of in CURVES.items()}


RATES = PresetTask(
    name="landscape-rates",
    settings=LandscapeSettings,
    network=LandscapeSettings.network,
    measure=measure_rates,
)
ALONG = PresetTask(
    name="landscape-along",
    settings=AlongSettings,
    network=AlongSettings.network,
    measure=measure_along,
)
