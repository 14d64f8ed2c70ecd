"""A network of four layers whose norms go to drawn means and scales."""

from normkit.lab.course import Hooks
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
    mean_spread, scale_spread = map(float, arm.split(","))
    dataset = settings.load_data()
    model = four_layers(dataset, settings.width, (mean_spread, scale_spread), seed)
    settings.fit(model, dataset, seed, place, Hooks())
    return {
        "mean_spread": mean_spread,
        "scale_spread": scale_spread,
        "accuracy": evaluate(model, dataset.test)[ACCURACY],
    }


DRAWN = PresetTask(name="drawn-channels", settings=DrawnSettings, measure=measure_drawn)
