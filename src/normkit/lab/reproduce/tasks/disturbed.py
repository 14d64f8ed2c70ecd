"""A residual network with BN or XBN that is tested with disturbed statistics."""

import numpy as np
from torch import nn

import normkit as nk
from normkit.lab.course import Hooks
from normkit.lab.evaluation import ACCURACY, evaluate
from normkit.lab.frozen import Count
from normkit.lab.models.own import ResidualBlock
from normkit.lab.reproduce.tasks.networks import seeded_network
from normkit.lab.reproduce.tasks.records import Values
from normkit.lab.reproduce.tasks.settings import Place, Training
from normkit.lab.reproduce.tasks.task import PresetTask


class DisturbedSettings(Training):
    """A residual network trained with BN or XBN and tested with disturbed statistics.

    Args:
        model: A small residual network.
        groups: Of XBN's group norm.
        deltas: Magnitudes of the disturbance.
        num_blocks: The first norm of so many blocks is disturbed, from the first block on.
        num_draws: Disturbances that accuracies are averaged over.
    """

    model: str
    groups: Count
    deltas: tuple[float, ...]
    num_blocks: Count = 6
    num_draws: Count = 5


def measure_disturbed(settings: DisturbedSettings, arm: str, seed: int, place: Place) -> Values:
    """Train a network and test it with statistics disturbed by each magnitude.

    Args:
        settings: What is trained and disturbed.
        arm: ``bn``, ``xbn-gn`` or ``xbn-in``.
        seed: Of weights and order.
        place: Where it is done.

    Returns:
        Test accuracy without disturbance, and by magnitude (a mean over draws).
    """
    dataset = settings.load_data()
    model = seeded_network(settings.model, "bn", dataset, seed)
    norm = {"xbn-gn": f"gn:{settings.groups}", "xbn-in": "in"}.get(arm)
    if norm is not None:
        nk.place_xbn_(model, position=2, norm=norm)
    settings.fit(model, dataset, seed, place, Hooks())
    chosen = first_norms(model, settings.num_blocks)
    accuracies = []
    for delta in settings.deltas:
        found = []
        for draw in range(1, settings.num_draws + 1):
            with nk.disturb_statistics(
                model, delta, seed=draw, where=lambda _layer, name: name in chosen
            ):
                found.append(evaluate(model, dataset.test)[ACCURACY])
        accuracies.append(float(np.mean(found)))
    return {
        "deltas": list(settings.deltas),
        "undisturbed": evaluate(model, dataset.test)[ACCURACY],
        "accuracy": accuracies,
        "layers": chosen,
    }


def first_norms(model: nn.Module, num_blocks: int) -> list[str]:
    """Names of the first norm of each of the first blocks."""
    blocks = [name for name, m in model.named_modules() if isinstance(m, ResidualBlock)]
    return [f"{name}.norm1" for name in blocks[:num_blocks]]


DISTURBED = PresetTask(name="disturbed", settings=DisturbedSettings, measure=measure_disturbed)
