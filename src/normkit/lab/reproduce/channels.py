"""Qiao et al., Fig. 5: accuracy when channels are normalised to drawn means and scales."""

from typing import Any

import numpy as np

from normkit.lab.figures import STYLES, label_axes
from normkit.lab.reproduce.networks import four_layers
from normkit.lab.reproduce.preset import (
    CIFAR10,
    NOT_SAID,
    QIAO,
    Arms,
    Claim,
    Preset,
    PresetTask,
    Runs,
    Size,
    by_seed,
)
from normkit.lab.reproduce.records import Values
from normkit.lab.reproduce.training import HOW_IT_TRAINS, Training
from normkit.lab.reproduce.verdict import BELOW, Criterion
from normkit.lab.spec import Count
from normkit.lab.steps import evaluate

FAILURE = 0.7  # accuracies below it are the paper's failures


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


def measure_drawn(settings: DrawnSettings, arm: str, seed: int) -> Values:
    """Train and test one network.

    Args:
        settings: What is trained.
        arm: The spreads of means and scales, with a comma between.
        seed: Of weights, order and draws; the draws of all arms are equal but for their spread.

    Returns:
        Test accuracy.
    """
    mean_spread, scale_spread = map(float, arm.split(","))
    dataset = settings.load_data()
    model = four_layers(dataset, settings.width, (mean_spread, scale_spread), seed)
    settings.fit(model, dataset.train, seed)
    return {
        "mean_spread": mean_spread,
        "scale_spread": scale_spread,
        "accuracy": evaluate(model, dataset.test)[1],
    }


def slope(arms: Arms, along: str, other: str) -> float:
    """Slope of accuracy over one spread where the other is 0."""
    kept = [values for values in arms.values() if values[other] == 0]
    return float(np.polyfit([v[along] for v in kept], [v["accuracy"] for v in kept], 1)[0])


def farthest(arms: Arms) -> Values:
    """The run with the largest spreads."""
    return max(arms.values(), key=lambda v: (v["mean_spread"], v["scale_spread"]))


CLAIMS = (
    Claim(
        source="Fig. 5, sec. 6.1.3",
        text="Accuracy falls as the channels' means differ more.",
        quantity="slope of test accuracy over the spread of the means, scales equal",
        criterion=BELOW,
        value=lambda arms: slope(arms, "mean_spread", "scale_spread"),
    ),
    Claim(
        source="Fig. 5, sec. 6.1.3",
        text="Accuracy falls as the channels' scales differ more.",
        quantity="slope of test accuracy over the spread of the logarithms of the scales, means "
        "equal",
        criterion=BELOW,
        value=lambda arms: slope(arms, "scale_spread", "mean_spread"),
    ),
    Claim(
        source="Fig. 5, sec. 6.1.3",
        text="Far from BN training is worse than with BN, though the affine parameters could undo "
        "the difference.",
        quantity="accuracy at the largest spreads - of BN",
        criterion=BELOW,
        value=lambda arms: farthest(arms)["accuracy"] - arms["0,0"]["accuracy"],
    ),
    Claim(
        source="Fig. 5, sec. 6.1.3",
        text="In extreme cases training fails (accuracy below 70 %).",
        quantity="accuracy at the largest spreads",
        criterion=Criterion(side="below", bound=FAILURE),
        value=lambda arms: farthest(arms)["accuracy"],
    ),
)


def draw_accuracies(figure: Any, runs: Runs) -> None:  # noqa: ANN401 - of matplotlib
    """Circles that grow with accuracy over both spreads, each with its number; crosses fail."""
    axes = figure.subplots()
    arms = runs[min(runs)]
    means = {arm: by_seed(runs, arm, "accuracy").mean() for arm in arms}
    columns, rows = (
        sorted({values[name] for values in arms.values()})
        for name in ("mean_spread", "scale_spread")
    )
    least, most = min(means.values()), max(means.values())
    for arm, values in arms.items():
        # places, not values: the steps between spreads are uneven
        x, y = columns.index(values["mean_spread"]), rows.index(values["scale_spread"])
        share = (means[arm] - least) / max(most - least, 1e-9)
        failed = bool(means[arm] < FAILURE)
        axes.scatter(
            x,
            y,
            s=40 + 500 * share,
            color=STYLES[failed][0],
            marker="x" if failed else "o",
            linewidths=2 if failed else 0,
        )
        axes.annotate(
            f"{100 * means[arm]:.1f}", (x, y), (0, -20), textcoords="offset points", ha="center"
        )
    axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
    axes.margins(0.2)
    title = f"test accuracy, %: circles, and crosses below {100 * FAILURE:g} %"
    names = {"x": "spread of the means", "y": "spread of the logarithms of the scales"}
    label_axes(axes, {"title": title, **names})


PRESETS = (
    Preset(
        name="channel-statistics",
        paper=QIAO,
        figures="Fig. 5",
        title="Channels normalised to drawn means and scales instead of 0 and 1",
        task=PresetTask(name="drawn-channels", measure=measure_drawn),
        arms=lambda settings: settings.arms,
        claims=CLAIMS,
        draw=draw_accuracies,
        scales={
            "tiny": Size(
                settings=DrawnSettings(
                    data="digits",
                    num_train=64,
                    num_test=50,
                    epochs=1,
                    learning_rate=0.05,
                    width=4,
                    mean_spreads=(0, 2),
                    scale_spreads=(0, 2),
                ),
                num_seeds=3,
            ),
            "small": Size(
                settings=DrawnSettings(
                    data="fashion-mnist",
                    num_train=4000,
                    num_test=2000,
                    shrink=2,
                    epochs=3,
                    batch_size=64,
                    learning_rate=0.05,
                    mean_spreads=(0, 1, 2, 4),
                    scale_spreads=(0, 1, 2, 4),
                ),
                num_seeds=3,
            ),
            "paper": Size(
                settings=DrawnSettings(
                    data="cifar10",
                    epochs=20,
                    batch_size=128,
                    learning_rate=0.05,
                    mean_spreads=(0, 0.5, 1, 2, 4),
                    scale_spreads=(0, 0.5, 1, 2, 4),
                ),
                num_seeds=3,
            ),
        },
        original=CIFAR10
        | {"width": "32"}
        | dict.fromkeys(("mean_spreads", "scale_spreads", "num_seeds", *HOW_IT_TRAINS), NOT_SAID),
        size=(6, 5),
    ),
)
