"""Qiao et al., Fig. 5: accuracy when channels are normalised to drawn means and scales."""

from typing import Any

import numpy as np

from normkit.lab.figures import STYLES, label_axes
from normkit.lab.reproduce.papers import QIAO
from normkit.lab.reproduce.preset import (
    CIFAR10,
    NOT_SAID,
    Arms,
    Claim,
    Preset,
    Runs,
    Size,
    by_seed,
)
from normkit.lab.reproduce.tasks.drawn import DRAWN, DrawnSettings
from normkit.lab.reproduce.tasks.records import Values
from normkit.lab.reproduce.tasks.settings import HOW_IT_TRAINS, recipe
from normkit.lab.reproduce.verdict import BELOW, Criterion

FAILURE = 0.7  # accuracies below it are the paper's failures


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


def draw_accuracies(figure: Any, runs: Runs) -> None:
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
        rows=("Q-F5",),
        paper=QIAO,
        figures="Fig. 5",
        title="Channels normalised to drawn means and scales instead of 0 and 1",
        task=DRAWN,
        arms=lambda settings: settings.arms,
        claims=CLAIMS,
        draw=draw_accuracies,
        scales={
            "tiny": Size(
                settings=DrawnSettings(
                    data="digits",
                    num_train=64,
                    num_test=50,
                    recipe=recipe(0.05, epochs=1),
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
                    recipe=recipe(0.05, epochs=3),
                    batch_size=64,
                    mean_spreads=(0, 1, 2, 4),
                    scale_spreads=(0, 1, 2, 4),
                ),
                num_seeds=3,
            ),
            "paper": Size(
                settings=DrawnSettings(
                    data="cifar10",
                    hold_out=False,
                    recipe=recipe(0.05, epochs=20),
                    batch_size=128,
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
