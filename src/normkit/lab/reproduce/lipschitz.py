"""Qiao et al., Fig. 4: what centring and scaling of weights take out of the gradient, and bring."""

from typing import Any

import numpy as np

from normkit.lab.figures import Curve, draw_curves
from normkit.lab.reproduce.papers import QIAO
from normkit.lab.reproduce.preset import (
    IMAGENET,
    Arms,
    Claim,
    Preset,
    Runs,
    Size,
    by_seed,
)
from normkit.lab.reproduce.tasks.settings import SMALL_RESNET, TINY_RESNET, recipe
from normkit.lab.reproduce.tasks.standardized import STANDARDIZED, StandardizedSettings
from normkit.lab.reproduce.verdict import ABOVE, Criterion

LABELS = {
    "gn": "GN",
    "center": "GN, centred weights (eq. 11)",
    "scale": "GN, scaled weights (eq. 12)",
    "ws": "GN, both (WS)",
}


def _share(arms: Arms, name: str) -> float:
    return float(np.mean(arms["ws"][name]))


def speed(arms: Arms, arm: str) -> float:
    """How much lower the training error (mean over epochs) is than with GN alone."""
    return float(np.mean(arms["gn"]["train_error"]) - np.mean(arms[arm]["train_error"]))


CLAIMS = (
    Claim(
        source="Fig. 4 right, sec. 5.2.2",
        text="The term along the weight, which scaling takes out, is small: below 0.02.",
        quantity="share of the squared gradient along the weight, mean over layers and epochs",
        criterion=Criterion(side="below", bound=0.02),
        value=lambda arms: _share(arms, "weight_share"),
    ),
    Claim(
        source="Fig. 4 right, sec. 5.2.2",
        text="The term along the constant, which centring takes out, is the larger of the two.",
        quantity="share along the constant - share along the weight, means over layers and epochs",
        criterion=ABOVE,
        value=lambda arms: _share(arms, "mean_share") - _share(arms, "weight_share"),
    ),
    Claim(
        source="Fig. 4 left, sec. 5.2.2",
        text="Centring the weights speeds training up.",
        quantity="training error (mean over epochs) of GN - of GN with centred weights",
        criterion=ABOVE,
        value=lambda arms: speed(arms, "center"),
    ),
    Claim(
        source="Fig. 4 left, sec. 5.2.2",
        text="Scaling the weights speeds training up slightly.",
        quantity="training error (mean over epochs) of GN - of GN with scaled weights",
        criterion=ABOVE,
        value=lambda arms: speed(arms, "scale"),
    ),
    Claim(
        source="Fig. 4 left, sec. 5.2.2",
        text="Most of the improvement is due to centring.",
        quantity="gain in training error by centring - by scaling",
        criterion=ABOVE,
        value=lambda arms: speed(arms, "center") - speed(arms, "scale"),
    ),
)


def draw_standardized(figure: Any, runs: Runs) -> None:
    """Training errors by epoch, and both shares on a logarithmic axis."""
    errors, shares = figure.subplots(1, 2)
    epochs = list(range(1, 1 + len(runs[min(runs)]["gn"]["train_error"])))
    lines = [
        Curve(label=label, x=epochs, values=by_seed(runs, arm, "train_error"))
        for arm, label in LABELS.items()
    ]
    draw_curves(errors, lines, {"title": "training error", "x": "epoch", "y": "share wrong"})
    names = {"mean_share": "along the constant", "weight_share": "along the weight"}
    lines = [
        Curve(label=label, x=epochs, values=by_seed(runs, "ws", name))
        for name, label in names.items()
    ]
    labels = {"title": "share of the squared gradient, WS", "x": "epoch", "y": "share"}
    draw_curves(shares, lines, labels)
    shares.set_yscale("log")


PRESETS = (
    Preset(
        name="lipschitz",
        rows=("Q-F4",),
        paper=QIAO,
        figures="Fig. 4",
        title="What centring and scaling of weights take out of the gradient, and bring",
        task=STANDARDIZED,
        arms=lambda _settings: list(LABELS),
        claims=CLAIMS,
        draw=draw_standardized,
        scales={
            "tiny": Size(
                settings=StandardizedSettings(**TINY_RESNET, recipe=recipe(0.05, epochs=2)),
                num_seeds=3,
            ),
            "small": Size(
                settings=StandardizedSettings(
                    **SMALL_RESNET, recipe=recipe(0.05, epochs=6, weight_decay=1e-4), num_batches=4
                ),
                num_seeds=5,
            ),
            "paper": Size(
                settings=StandardizedSettings(
                    data="imagenet",
                    hold_out=False,
                    model="torchvision:resnet50",
                    groups=32,
                    batch_size=256,
                    recipe=recipe(
                        0.1,
                        epochs=90,
                        schedule="step",
                        weight_decay=1e-4,
                        augment=("imagenet",),
                    ),
                ),
                num_seeds=1,
            ),
        },
        original={
            **IMAGENET,
            "model": "torchvision:resnet50",
            "epochs": "90",
            "batch_size": "256",
            "optimizer": "SGD, momentum 0.9",
            "learning_rate": "0.1",
            "rate_drop": "times 0.1 every 30 epochs",
            "weight_decay": "0.0001",
            "groups": "32",
            "num_batches": "1",
            "num_seeds": "1",
        },
    ),
)
