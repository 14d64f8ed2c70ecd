"""Gunawan et al., Figs. 6 to 10: loss landscape and gradient predictiveness, by both protocols."""

from typing import Any

from normkit.lab.figures import Curve, draw_curves
from normkit.lab.recipe import Recipe
from normkit.lab.reproduce.landscape_claims import FIG_6_7_9, FIG_8_10, ranges
from normkit.lab.reproduce.papers import GUNAWAN
from normkit.lab.reproduce.preset import (
    CIFAR10,
    NOT_SAID,
    Preset,
    Runs,
    Scale,
    Size,
)
from normkit.lab.reproduce.tasks.landscape import ALONG, L2, RATES, AlongSettings, LandscapeSettings
from normkit.lab.reproduce.tasks.networks import NO_NORM
from normkit.lab.reproduce.tasks.settings import recipe

LABELS = {NO_NORM: "no norm", "bn": "BN", "gn": "GN", "gnplus": "GNPlus (group first)"}


def draw_landscape(figure: Any, runs: Runs) -> None:
    """Ranges of the loss and of the gradient's change, by norm, on logarithmic axes."""
    _draw(figure, runs, LABELS)


def draw_decayed(figure: Any, runs: Runs) -> None:
    """The same with and without weight decay."""
    norms = ("bn", "gn", "gnplus")
    _draw(
        figure,
        runs,
        {n + s: LABELS[n] + s.upper().replace("+", ", ") for n in norms for s in ("", L2)},
    )


def _draw(figure: Any, runs: Runs, arms: dict[str, str]) -> None:
    kinds = {"loss": "range of the loss", "change": "range of the gradient's change"}
    for axes, (kind, title) in zip(figure.subplots(1, 2), kinds.items(), strict=True):
        steps = runs[min(runs)][next(iter(arms))]["steps"]
        width = max(1, len(steps) // 40)  # so many steps make a point
        kept = len(steps) // width * width
        lines = [
            Curve(
                label=label,
                x=[steps[i] for i in range(0, kept, width)],
                values=[
                    ranges(run[arm], kind)[:kept].reshape(-1, width).mean(1)
                    for run in runs.values()
                ],
            )
            for arm, label in arms.items()
        ]
        draw_curves(axes, lines, {"title": title, "x": "step", "y": f"largest - least {kind}"})
        axes.set_yscale("log")


def _trained(steps: int) -> Recipe:
    return recipe(3e-4, steps=steps, optimizer="adam", schedule="constant")


TINY = {
    "data": "digits",
    "num_train": 64,
    "width": 8,
    "groups": 2,
    "batch_size": 16,
    "recipe": _trained(5),
    "rates": (1e-4, 5e-4),
}
SMALL = {
    "data": "fashion-mnist",
    "num_train": 6000,
    "shrink": 2,
    "width": 16,
    "groups": 8,
    "batch_size": 32,
    "recipe": _trained(160),
}
WHOLE = {
    "data": "cifar10",
    "hold_out": False,
    "width": 64,
    "groups": 32,
    "batch_size": 128,
    "recipe": _trained(7820),
}
ORIGINAL = {
    **{name: said for name, said in CIFAR10.items() if name != "num_test"},
    "width": "64",
    "groups": "32",
    "batch_size": "128",
    "steps": "7820",
    "rates": "0.0001, 0.0002, 0.0003, 0.0004, 0.0005",
    "l2": "5e-05",
    "num_seeds": NOT_SAID,
}
RATES_SCALES: dict[Scale, Size] = {
    "tiny": Size(settings=LandscapeSettings(**TINY), num_seeds=3),
    "small": Size(settings=LandscapeSettings(**SMALL), num_seeds=3),
    "paper": Size(settings=LandscapeSettings(**WHOLE), num_seeds=3),
}
PRESETS = (
    Preset(
        name="landscape",
        rows=("G-F6", "G-F7", "G-F9"),
        paper=GUNAWAN,
        figures="Figs. 6, 7 and 9 (several learning rates, appendix B.2)",
        title="Loss landscape and gradient predictiveness of VGG-11 over five learning rates",
        task=RATES,
        arms=lambda _settings: list(LABELS),
        claims=FIG_6_7_9,
        draw=draw_landscape,
        scales=RATES_SCALES,
        original=ORIGINAL,
    ),
    Preset(
        name="landscape-along-gradient",
        paper=GUNAWAN,
        figures="Figs. 6, 7 and 9 (along the gradient, section 3.1)",
        title="Loss landscape and gradient predictiveness of VGG-11 along the gradient",
        task=ALONG,
        arms=lambda _settings: list(LABELS),
        claims=FIG_6_7_9,
        draw=draw_landscape,
        scales={
            "tiny": Size(settings=AlongSettings(**TINY, every=2), num_seeds=3),
            "small": Size(settings=AlongSettings(**SMALL, every=5), num_seeds=3),
            "paper": Size(settings=AlongSettings(**WHOLE), num_seeds=3),
        },
        original=ORIGINAL | dict.fromkeys(("learning_rate", "etas", "every"), NOT_SAID),
    ),
    Preset(
        name="landscape-l2",
        rows=("G-F8", "G-F10"),
        paper=GUNAWAN,
        figures="Figs. 8 and 10",
        title="The landscape of VGG-11 with and without weight decay",
        task=RATES,
        arms=lambda _settings: [n + s for n in ("bn", "gn", "gnplus") for s in ("", L2)],
        claims=FIG_8_10,
        draw=draw_decayed,
        scales=RATES_SCALES,
        original=ORIGINAL,
    ),
)
