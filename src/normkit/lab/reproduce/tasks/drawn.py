"""A network of four layers whose norms go to drawn means and scales."""

from torch import nn

from normkit.lab.course import Hooks
from normkit.lab.data import Dataset
from normkit.lab.evaluation import ACCURACY, evaluate
from normkit.lab.frozen import Count
from normkit.lab.reproduce.tasks.networks import four_layers
from normkit.lab.reproduce.tasks.records import Values
from normkit.lab.reproduce.tasks.settings import Place, Training
from normkit.lab.reproduce.tasks.task import PresetTask


class DrawnSettings(Training):
    """A network of four layers whose norms go to drawn means and scales.

    Args:
        width: Channels of each layer.
        mean_spreads: Standard deviations of the means.
        scale_spreads: Standard deviations of the logarithms of the scales.
    """

    width: Count = 32
    mean_spreads: tuple[float, ...]
    scale_spreads: tuple[float, ...]

    @property
    def arms(self) -> list[str]:
        """Every pair of spreads."""
        return [arm_of(m, s) for m in self.mean_spreads for s in self.scale_spreads]


def arm_of(mean_spread: float, scale_spread: float) -> str:
    """Name of a pair of spreads."""
    return f"{mean_spread:g},{scale_spread:g}"


def spreads_of(arm: str) -> tuple[float, float]:
    """The pair of spreads of a name."""
    mean_spread, scale_spread = map(float, arm.split(","))
    return mean_spread, scale_spread


def network_of(settings: DrawnSettings, arm: str, dataset: Dataset, seed: int) -> nn.Module:
    """The network of an arm."""
    return four_layers(dataset, settings.width, spreads_of(arm), seed)


def measure_drawn(settings: DrawnSettings, arm: str, seed: int, place: Place) -> Values:
    """Train and test one network.

    Args:
        settings: What is trained.
        arm: The spreads of means and scales, with a comma between.
        seed: Of weights, order and draws; the draws of all arms are equal but for their spread.
        place: Where it is done.

    Returns:
        Test accuracy.
    """
    mean_spread, scale_spread = spreads_of(arm)
    dataset = settings.load_data()
    model = network_of(settings, arm, dataset, seed)
    settings.fit(model, dataset, seed, place, Hooks())
    return {
        "mean_spread": mean_spread,
        "scale_spread": scale_spread,
        "accuracy": evaluate(model, dataset.test)[ACCURACY],
    }


DRAWN = PresetTask(
    name="drawn-channels", settings=DrawnSettings, network=network_of, measure=measure_drawn
)
