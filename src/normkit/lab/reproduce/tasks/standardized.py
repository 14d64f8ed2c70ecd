"""What parts of weight standardization take out of the gradient, while a network trains."""

import numpy as np
import torch
from torch import nn

import normkit as nk
from normkit.lab.course import EpochSoFar, Hooks
from normkit.lab.data import Dataset
from normkit.lab.evaluation import ACCURACY, evaluate
from normkit.lab.frozen import Count
from normkit.lab.reproduce.tasks.networks import seeded_network
from normkit.lab.reproduce.tasks.records import Values
from normkit.lab.reproduce.tasks.settings import Place, Training
from normkit.lab.reproduce.tasks.task import PresetTask

PARTS = {"gn": (False, False), "center": (True, False), "scale": (False, True), "ws": (True, True)}


class StandardizedSettings(Training):
    """A residual network trained with group norm and parts of weight standardization.

    Args:
        model: A small residual network.
        groups: Of group norm.
        num_batches: Training batches whose gradients are looked at, each epoch.
    """

    model: str
    groups: Count
    num_batches: Count = 1


def network_of(settings: StandardizedSettings, arm: str, dataset: Dataset, seed: int) -> nn.Module:
    """The network of an arm."""
    model = seeded_network(settings.model, f"gn:{settings.groups}", dataset, seed)
    center, scale = PARTS[arm]
    if center or scale:
        nk.standardize_weights_(model, center=center, scale=scale)
    return model


def measure_standardized(
    settings: StandardizedSettings, arm: str, seed: int, place: Place
) -> Values:
    """Train, and with both parts take the shares of the gradient at each epoch's first batches.

    Args:
        settings: What is trained.
        arm: ``gn``, ``center``, ``scale`` or ``ws``.
        seed: Of weights and order.
        place: Where it is done.

    Returns:
        Training error by epoch, test accuracy, and for ``ws`` the shares by epoch.
    """
    dataset = settings.load_data()
    model = network_of(settings, arm, dataset, seed)
    index = torch.arange(min(settings.num_batches * settings.batch_size, len(dataset.train)))
    parts = [dataset.train.take(part) for part in index.split(settings.batch_size)]
    batches = [(part.inputs, part.targets) for part in parts]
    notes: Values = {"train_error": [], "mean_share": [], "weight_share": []}

    def look(epoch: int) -> None:
        if arm == "ws" and epoch < settings.recipe.length:
            layers = nk.lipschitz_terms(model, batches).layers
            notes["mean_share"].append(float(np.mean([row.mean_share for row in layers])))
            notes["weight_share"].append(float(np.mean([row.weight_share for row in layers])))

    def note_error(epoch: EpochSoFar) -> None:
        notes["train_error"].append(1 - epoch.accuracy)

    hooks = Hooks(before_epoch=look, after_epoch=note_error, notes=notes)
    settings.fit(model, dataset, seed, place, hooks)
    return notes | {"accuracy": evaluate(model, dataset.test)[ACCURACY]}


STANDARDIZED = PresetTask(
    name="standardized",
    settings=StandardizedSettings,
    network=network_of,
    measure=measure_standardized,
)
