"""How different the channels are that group and layer norm pool, while a network trains."""

from torch import nn

import normkit as nk
from normkit.lab.course import Hooks
from normkit.lab.data import Dataset
from normkit.lab.evaluation import ACCURACY, evaluate
from normkit.lab.frozen import Count
from normkit.lab.reproduce.tasks.networks import seeded_network
from normkit.lab.reproduce.tasks.records import Values
from normkit.lab.reproduce.tasks.settings import Place, Training
from normkit.lab.reproduce.tasks.task import PresetTask


class StatDiffSettings(Training):
    """A residual network trained with group or layer norm.

    Args:
        model: A small residual network.
        groups: Of group norm, as its spec says.
    """

    model: str
    groups: Count | str


def network_of(settings: StatDiffSettings, arm: str, dataset: Dataset, seed: int) -> nn.Module:
    """The network of an arm."""
    norm = arm.replace("gn", f"gn:{settings.groups}")
    return seeded_network(settings.model, norm, dataset, seed)


def measure_statdiff(settings: StatDiffSettings, arm: str, seed: int, place: Place) -> Values:
    """Train, and take StatDiff of the training examples before and after every epoch.

    Args:
        settings: What is trained.
        arm: ``gn`` or ``ln``, alone or with ``+ws``.
        seed: Of weights and order.
        place: Where it is done.

    Returns:
        Mean and spread of StatDiff over all groups by epoch, and test accuracy.
    """
    dataset = settings.load_data()
    model = network_of(settings, arm, dataset, seed)
    notes: Values = {"mean": [], "std": []}

    def observe(_epoch: int) -> None:
        parts = dataset.train.inputs.split(settings.batch_size)
        found = nk.channel_difference(model, parts)
        notes["mean"].append(found.mean)
        notes["std"].append(found.std)

    settings.fit(model, dataset, seed, place, Hooks(before_epoch=observe, notes=notes))
    return notes | {"accuracy": evaluate(model, dataset.test)[ACCURACY]}


STATDIFF = PresetTask(
    name="statdiff", settings=StatDiffSettings, network=network_of, measure=measure_statdiff
)
