"""Huang et al., Fig. 8: accuracy with disturbed statistics, BN against XBN."""

from typing import Any

import numpy as np

from normkit.lab.figures import Curve, draw_curves
from normkit.lab.reproduce.papers import HUANG
from normkit.lab.reproduce.preset import (
    IMAGENET,
    NOT_SAID,
    Arms,
    Claim,
    Preset,
    Runs,
    Size,
    by_seed,
)
from normkit.lab.reproduce.tasks.disturbed import DISTURBED, DisturbedSettings
from normkit.lab.reproduce.tasks.records import Values
from normkit.lab.reproduce.tasks.settings import SMALL_RESNET, TINY_RESNET, recipe
from normkit.lab.reproduce.verdict import ABOVE

LABELS = {"bn": "BN", "xbn-gn": "XBN with GN", "xbn-in": "XBN with IN"}


def drop(values: Values) -> float:
    """Accuracy that is lost, mean over the magnitudes."""
    return float(values["undisturbed"] - np.mean(values["accuracy"]))


def _difference(arms: Arms, more: str, less: str) -> float:
    return drop(arms[more]) - drop(arms[less])


CLAIMS = (
    Claim(
        source="Fig. 8, sec. 5.2.1",
        text="With BN accuracy falls markedly as the disturbance grows.",
        quantity="accuracy of BN undisturbed - at the largest disturbance",
        criterion=ABOVE,
        value=lambda arms: arms["bn"]["undisturbed"] - arms["bn"]["accuracy"][-1],
    ),
    Claim(
        source="Fig. 8, sec. 5.2.1",
        text="XBN with GN is more stable than BN.",
        quantity="loss of accuracy (mean over disturbances) of BN - of XBN with GN",
        criterion=ABOVE,
        value=lambda arms: _difference(arms, "bn", "xbn-gn"),
    ),
    Claim(
        source="Fig. 8, sec. 5.2.1",
        text="XBN with IN is more stable than BN.",
        quantity="loss of accuracy (mean over disturbances) of BN - of XBN with IN",
        criterion=ABOVE,
        value=lambda arms: _difference(arms, "bn", "xbn-in"),
    ),
    Claim(
        source="Fig. 8, sec. 5.2.1",
        text="XBN with IN is more robust than with GN.",
        quantity="loss of accuracy (mean over disturbances) of XBN with GN - with IN",
        criterion=ABOVE,
        value=lambda arms: _difference(arms, "xbn-gn", "xbn-in"),
    ),
)


def draw_disturbed(figure: Any, runs: Runs) -> None:
    """Accuracy by magnitude of the disturbance."""
    lines = [
        Curve(
            label=label,
            x=[0.0, *runs[min(runs)][arm]["deltas"]],
            values=np.column_stack(
                [by_seed(runs, arm, "undisturbed"), by_seed(runs, arm, "accuracy")]
            ),
        )
        for arm, label in LABELS.items()
    ]
    labels = {"title": "test accuracy", "x": "magnitude of the disturbance", "y": "accuracy"}
    draw_curves(figure.subplots(), lines, labels)


PRESETS = (
    Preset(
        name="disturbed-statistics",
        paper=HUANG,
        figures="Fig. 8",
        title="Accuracy with disturbed statistics in the first norm of the first six blocks",
        task=DISTURBED,
        arms=lambda _settings: list(LABELS),
        claims=CLAIMS,
        draw=draw_disturbed,
        scales={
            "tiny": Size(
                settings=DisturbedSettings(
                    **TINY_RESNET,
                    recipe=recipe(0.05, epochs=1),
                    deltas=(0.5, 1.0),
                    num_draws=2,
                ),
                num_seeds=3,
            ),
            "small": Size(
                settings=DisturbedSettings(
                    **SMALL_RESNET,
                    recipe=recipe(0.05, epochs=8, weight_decay=1e-4),
                    deltas=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
                ),
                num_seeds=5,
            ),
        },
        original={
            **IMAGENET,
            "model": "ResNet-50, bottlenecks with the second of three norms replaced",
            "epochs": "100",
            "batch_size": "256",
            "optimizer": "SGD, momentum 0.9",
            "learning_rate": "0.1",
            "rate_drop": "a tenth after 30, 60 and 90 epochs",
            "weight_decay": "0.0001",
            "deltas": NOT_SAID,
            "groups": "64",
            "num_blocks": "6",
            "num_draws": "5",
            "num_seeds": "1 network",
        },
        size=(6, 4),
    ),
)
