"""How different the channels are that group and layer norm pool, while a network trains."""

import normkit as nk
from normkit.lab.course import Hooks
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
        groups: Of group norm.
    """

    model: str
    groups: Count


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
    norm = arm.replace("gn", f"gn:{settings.groups}")
    model = seeded_network(settings.model, norm, dataset, seed)
    notes: Values = {"mean": [], "std": []}

    def observe(_epoch: int) -> None:
        parts = dataset.train.inputs.split(settings.batch_size)
        found = nk.channel_difference(model, parts)
        notes["mean"].append(found.mean)
        notes["std"].append(found.std)

    settings.fit(model, dataset, seed, place, Hooks(before_epoch=observe, notes=notes))
    return notes | {"accuracy": evaluate(model, dataset.test)[ACCURACY]}


STATDIFF = PresetTask(name="statdiff", settings=StatDiffSettings, measure=measure_statdiff)
