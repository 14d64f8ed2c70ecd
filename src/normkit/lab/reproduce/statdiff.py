"""Qiao et al., Fig. 6: how different the channels are that group and layer norm pool."""

from typing import Any

import numpy as np

from normkit.lab.figures import Curve, draw_curves
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
from normkit.lab.reproduce.tasks.records import Values
from normkit.lab.reproduce.tasks.settings import HOW_IT_TRAINS, SMALL_RESNET, TINY_RESNET, recipe
from normkit.lab.reproduce.tasks.statdiff import STATDIFF, StatDiffSettings
from normkit.lab.reproduce.verdict import ABOVE, BELOW

NORMS = ("gn", "gn+ws", "ln", "ln+ws")


def trained(values: Values) -> float:
    """StatDiff, mean over the epochs of training."""
    return float(np.mean(values["mean"][1:]))


def _lower(arms: Arms, norm: str) -> float:
    return trained(arms[f"{norm}+ws"]) / trained(arms[norm]) - 1


def _gain(arms: Arms, better: str, worse: str) -> float:
    return arms[better]["accuracy"] - arms[worse]["accuracy"]


CLAIMS = (
    Claim(
        source="Fig. 6, sec. 6.1.4",
        text="WS brings StatDiff of GN much closer to zero.",
        quantity="StatDiff (mean over groups and epochs) of GN+WS / of GN - 1",
        criterion=BELOW,
        value=lambda arms: _lower(arms, "gn"),
    ),
    Claim(
        source="Fig. 6, sec. 6.1.4",
        text="WS brings StatDiff of LN much closer to zero.",
        quantity="StatDiff (mean over groups and epochs) of LN+WS / of LN - 1",
        criterion=BELOW,
        value=lambda arms: _lower(arms, "ln"),
    ),
    Claim(
        source="sec. 6.1.4",
        text="WS makes the results of GN better.",
        quantity="test accuracy of GN+WS - of GN",
        criterion=ABOVE,
        value=lambda arms: _gain(arms, "gn+ws", "gn"),
    ),
    Claim(
        source="sec. 6.1.4",
        text="WS makes the results of LN better.",
        quantity="test accuracy of LN+WS - of LN",
        criterion=ABOVE,
        value=lambda arms: _gain(arms, "ln+ws", "ln"),
    ),
    Claim(
        source="sec. 6.1.4",
        text="GN performs better than LN.",
        quantity="test accuracy of GN - of LN",
        criterion=ABOVE,
        value=lambda arms: _gain(arms, "gn", "ln"),
    ),
)


def draw_statdiff(figure: Any, runs: Runs) -> None:
    """Mean and spread of StatDiff by epoch."""
    names = {"mean": "StatDiff, mean over groups", "std": "StatDiff, deviation over groups"}
    for axes, (name, title) in zip(figure.subplots(1, 2), names.items(), strict=True):
        epochs = range(len(runs[min(runs)]["gn"]["mean"]))
        lines = [
            Curve(label=norm.upper(), x=list(epochs), values=by_seed(runs, norm, name))
            for norm in NORMS
        ]
        draw_curves(axes, lines, {"title": title, "x": "epoch", "y": "StatDiff"})
        axes.set_ylim(bottom=0)


PRESETS = (
    Preset(
        name="statdiff",
        rows=("Q-F6",),
        paper=QIAO,
        figures="Fig. 6",
        title="StatDiff of GN and LN, with and without weight standardization",
        task=STATDIFF,
        arms=lambda _settings: list(NORMS),
        claims=CLAIMS,
        draw=draw_statdiff,
        scales={
            "tiny": Size(
                settings=StatDiffSettings(**TINY_RESNET, recipe=recipe(0.05, epochs=1)),
                num_seeds=3,
            ),
            "small": Size(
                settings=StatDiffSettings(
                    **SMALL_RESNET, recipe=recipe(0.05, epochs=6, weight_decay=1e-4)
                ),
                num_seeds=5,
            ),
            "paper": Size(
                settings=StatDiffSettings(
                    data="cifar10",
                    hold_out=False,
                    model="thin-resnet:depth=110",
                    groups="max=32:channels=4",
                    batch_size=128,
                    recipe=recipe(
                        0.1,
                        epochs=300,
                        lr_drops=(0.5, 0.75),
                        weight_decay=1e-4,
                        augment=("crop", "flip"),
                    ),
                ),
                num_seeds=3,
            ),
        },
        original=CIFAR10
        | {"model": "thin-resnet:depth=110"}
        | dict.fromkeys(("groups", "num_seeds", *HOW_IT_TRAINS), NOT_SAID),
    ),
)
