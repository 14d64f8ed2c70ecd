"""A VGG-11 that is trained with noise on the output of every norm."""

from contextlib import nullcontext

from torch import nn

import normkit as nk
from normkit.lab.course import Hooks
from normkit.lab.data import Dataset
from normkit.lab.evaluation import ACCURACY, evaluate
from normkit.lab.frozen import Count
from normkit.lab.reproduce.tasks.networks import vgg11
from normkit.lab.reproduce.tasks.records import Values
from normkit.lab.reproduce.tasks.settings import Place, Training
from normkit.lab.reproduce.tasks.task import PresetTask


class NoiseSettings(Training):
    """A VGG-11 trained with noise.

    Args:
        width: Channels of the first layer; the others in proportion.
        groups: Of group norm.
        noise_mean: Of the noise.
        noise_std: Standard deviation of the noise.
    """

    width: Count
    groups: Count
    noise_mean: float = 1e-3
    noise_std: float = 1.001


def arm_of(norm: str, granularity: str = "") -> str:
    """Name of a norm with noise of a granularity, or without."""
    return f"{norm}+{granularity}" if granularity else norm


def network_of(settings: NoiseSettings, arm: str, dataset: Dataset, seed: int) -> nn.Module:
    """The network of an arm, without noise."""
    norm = arm.partition("+")[0]
    spec = norm if norm == "bn" else f"{norm}:{settings.groups}"
    return vgg11(spec, dataset, settings.width, seed)


def measure_noise(settings: NoiseSettings, arm: str, seed: int, place: Place) -> Values:
    """Train with noise, which there is none of at evaluation.

    Args:
        settings: What is trained.
        arm: A norm, alone or with ``+group`` or ``+element``.
        seed: Of weights, order and noise.
        place: Where it is done.

    Returns:
        Training error of each epoch; test accuracy before and after every epoch.
    """
    granularity = arm.partition("+")[2]
    dataset = settings.load_data()
    model = network_of(settings, arm, dataset, seed)
    notes: Values = {"train_error": [], "accuracy": []}
    noise = (
        nk.add_output_noise(
            model,
            mean=settings.noise_mean,
            std=settings.noise_std,
            granularity=granularity,  # type: ignore[arg-type]  # one of the two by the arm's name
        )
        if granularity
        else nullcontext()
    )
    hooks = Hooks(
        before_epoch=lambda _: notes["accuracy"].append(evaluate(model, dataset.test)[ACCURACY]),
        after_epoch=lambda epoch: notes["train_error"].append(1 - epoch.accuracy),
        notes=notes,
    )
    with noise:
        settings.fit(model, dataset, seed, place, hooks)
    return notes


NOISE = PresetTask(name="noise", settings=NoiseSettings, network=network_of, measure=measure_noise)
