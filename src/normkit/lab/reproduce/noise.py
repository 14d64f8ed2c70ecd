"""Gunawan et al., Figs. 5 and 11: training with noise on the output of every norm."""

from typing import Any

from normkit.lab.figures import Curve, draw_curves
from normkit.lab.reproduce.papers import GUNAWAN
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
from normkit.lab.reproduce.tasks.noise import NOISE, NoiseSettings, arm_of
from normkit.lab.reproduce.tasks.settings import recipe
from normkit.lab.reproduce.verdict import ABOVE, BELOW, Criterion

NORMS = {"bn": "BN", "gn": "GN", "gnplus": "GNPlus"}
GRANULARITIES = {
    "group": "a draw for each example and group, as in the authors' code",
    "element": "a draw for each value",
}
DRAWS = {"group": "group", "element": "value"}
CHANCE = 0.1  # of ten classes


def final(arms: Arms, arm: str) -> float:
    """Test accuracy at the end."""
    return arms[arm]["accuracy"][-1]


def lost(arms: Arms, norm: str, granularity: str) -> float:
    """Test accuracy that noise costs."""
    return final(arms, norm) - final(arms, arm_of(norm, granularity))


ARMS = [arm_of(norm, granularity) for granularity in ("", *GRANULARITIES) for norm in NORMS]


def _claims(granularity: str) -> tuple[Claim, ...]:
    gn, bn, plus = (arm_of(norm, granularity) for norm in ("gn", "bn", "gnplus"))
    how = f"noise: {GRANULARITIES[granularity]}"
    untrained = Criterion(side="below", bound=2 * CHANCE)
    return (
        Claim(
            source="Fig. 5, sec. 3.2.1",
            text="With noise on its output the network with GN does not train.",
            quantity=f"test accuracy of GN with noise; untrained is below twice chance ({how})",
            criterion=untrained,
            value=lambda arms: final(arms, gn),
        ),
        Claim(
            source="Fig. 5, sec. 3.2.1",
            text="With noise the network with BN trains.",
            quantity=f"test accuracy of BN with noise; trained is above twice chance ({how})",
            criterion=Criterion(side="above", bound=2 * CHANCE),
            value=lambda arms: final(arms, bn),
        ),
        Claim(
            source="Fig. 5, appendix A.2",
            text="GN is more sensitive to the noise than BN.",
            quantity=f"loss of test accuracy by noise of GN - of BN ({how})",
            criterion=ABOVE,
            value=lambda arms: lost(arms, "gn", granularity) - lost(arms, "bn", granularity),
        ),
        Claim(
            source="Fig. 11, sec. 5.3",
            text="With noise GNPlus is better than GN.",
            quantity=f"test accuracy with noise of GN - of GNPlus ({how})",
            criterion=BELOW,
            value=lambda arms: final(arms, gn) - final(arms, plus),
        ),
        Claim(
            source="Fig. 11, sec. 5.3",
            text="With noise GNPlus is better than BN.",
            quantity=f"test accuracy with noise of BN - of GNPlus ({how})",
            criterion=BELOW,
            value=lambda arms: final(arms, bn) - final(arms, plus),
        ),
    )


def draw_noise(figure: Any, runs: Runs) -> None:
    """Test accuracy by epoch, without noise and with both kinds."""
    titles = {"": "no noise"} | {g: f"noise, a draw for each {of}" for g, of in DRAWS.items()}
    for axes, (granularity, title) in zip(
        figure.subplots(1, 3, sharey=True), titles.items(), strict=True
    ):
        lines = []
        for norm, label in NORMS.items():
            values = by_seed(runs, arm_of(norm, granularity), "accuracy")
            lines.append(Curve(label=label, x=list(range(values.shape[1])), values=values))
        draw_curves(axes, lines, {"title": title, "x": "epoch", "y": "test accuracy"})
        axes.set_ylim(0, 1)


PRESETS = (
    Preset(
        name="output-noise",
        rows=("G-F5", "G-F11"),
        paper=GUNAWAN,
        figures="Figs. 5 and 11",
        title="Training VGG-11 with noise on the output of every norm",
        task=NOISE,
        arms=lambda _settings: ARMS,
        claims=tuple(claim for granularity in GRANULARITIES for claim in _claims(granularity)),
        draw=draw_noise,
        scales={
            "tiny": Size(
                settings=NoiseSettings(
                    data="digits",
                    num_train=64,
                    num_test=50,
                    recipe=recipe(1e-3, epochs=1, optimizer="adam"),
                    width=8,
                    groups=2,
                ),
                num_seeds=3,
            ),
            "small": Size(
                settings=NoiseSettings(
                    data="fashion-mnist",
                    num_train=3000,
                    num_test=2000,
                    shrink=2,
                    recipe=recipe(1e-3, epochs=5, optimizer="adam"),
                    batch_size=64,
                    width=16,
                    groups=8,
                ),
                num_seeds=3,
            ),
            "paper": Size(
                settings=NoiseSettings(
                    data="cifar10",
                    hold_out=False,
                    recipe=recipe(1e-3, epochs=50, optimizer="adam"),
                    batch_size=128,
                    width=64,
                    groups=32,
                ),
                num_seeds=3,
            ),
        },
        original={
            **CIFAR10,
            "epochs": "50",
            "batch_size": "128",
            "optimizer": "Adam",
            "learning_rate": "0.001",
            "rate_drop": NOT_SAID,
            "weight_decay": NOT_SAID,
            "width": "64",
            "groups": "32",
            "noise_mean": "0.001",
            "noise_std": "1.001",
            "num_seeds": NOT_SAID,
        },
        size=(12, 3.8),
    ),
)
