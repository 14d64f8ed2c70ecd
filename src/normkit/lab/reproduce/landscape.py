"""Gunawan et al., Figs. 6 to 10: loss landscape and gradient predictiveness, by both protocols."""

from itertools import islice
from typing import Any

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

import normkit as nk
from normkit.lab.data import Examples
from normkit.lab.figures import Curve, draw_curves
from normkit.lab.reproduce.landscape_claims import FIG_6_7_9, FIG_8_10, ranges
from normkit.lab.reproduce.networks import NO_NORM, vgg11
from normkit.lab.reproduce.preset import (
    CIFAR10,
    GUNAWAN,
    NOT_SAID,
    Preset,
    PresetTask,
    Runs,
    Scale,
    Size,
)
from normkit.lab.reproduce.records import Values
from normkit.lab.reproduce.training import Data, endless
from normkit.lab.spec import Count

L2 = "+l2"
LABELS = {NO_NORM: "no norm", "bn": "BN", "gn": "GN", "gnplus": "GNPlus (group first)"}


class LandscapeSettings(Data):
    """A VGG-11 trained by Adam with several learning rates from one start.

    Args:
        width: Channels of the first layer; the others in proportion.
        groups: Of group norm.
        batch_size: Examples of a step.
        steps: Of training.
        rates: Learning rates.
        l2: Weight decay of the arms with ``+l2``, as Adam adds it to the gradient.
    """

    unused = ("num_test",)

    width: Count
    groups: Count
    batch_size: Count
    steps: Count
    rates: tuple[float, ...] = (1e-4, 2e-4, 3e-4, 4e-4, 5e-4)
    l2: float = Field(default=5e-5, ge=0)

    def network(self, arm: str, seed: int) -> tuple[nn.Module, list[Any]]:
        """The network of an arm, and the batches of all its steps."""
        dataset = self.load_data()
        norm = arm.removesuffix(L2)
        spec = f"{norm}:{self.groups}" if norm in ("gn", "gnplus") else norm
        parts = islice(endless(dataset.train, self.batch_size, seed), self.steps)
        return vgg11(spec, dataset, self.width, seed), [_pair(part) for part in parts]


class AlongSettings(LandscapeSettings):
    """A VGG-11 trained with one learning rate and looked at along its gradients.

    Args:
        learning_rate: Of Adam.
        etas: Steps along the gradient.
        every: Steps between two looks.
    """

    learning_rate: float = Field(default=3e-4, gt=0)
    etas: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    every: Count = 10


def _pair(part: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    return part.inputs, part.targets


def measure_rates(settings: LandscapeSettings, arm: str, seed: int) -> Values:
    """Train copies with all learning rates, protocol ``multi_lr``.

    Args:
        settings: What is trained.
        arm: A norm, alone or with ``+l2``.
        seed: Of weights and order.

    Returns:
        By step, the least and the largest loss and change of the gradient.
    """
    model, batches = settings.network(arm, seed)
    decay = settings.l2 if arm.endswith(L2) else 0.0
    found = nk.gradient_landscape(
        model,
        batches,
        protocol="multi_lr",
        rates=settings.rates,
        optimizer=lambda params, rate: torch.optim.Adam(params, lr=rate, weight_decay=decay),
    )
    steps = found.steps[1:]  # the first step has no gradient before it
    return _curves(steps, [step.name for step in steps])


def measure_along(settings: AlongSettings, arm: str, seed: int) -> Values:
    """Train, and look along the gradient every few steps, protocol ``along_gradient``.

    Args:
        settings: What is trained.
        arm: A norm.
        seed: Of weights and order.

    Returns:
        As :func:`measure_rates`, and the effective smoothness, at the steps that were looked at.
    """
    model, batches = settings.network(arm, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    looks, numbers = [], []
    for number, batch in enumerate(batches):
        if number % settings.every == 0:
            found = nk.gradient_landscape(
                model, [batch], protocol="along_gradient", rates=settings.etas
            )
            looks += found.steps
            numbers.append(number)
        optimizer.zero_grad()
        functional.cross_entropy(model.train()(batch[0]), batch[1]).backward()
        optimizer.step()
    smoothness = [look.effective_smoothness for look in looks]
    return _curves(looks, numbers) | {"effective_smoothness": smoothness}


def _curves(steps: Any, numbers: list[int]) -> Values:  # noqa: ANN401 - rows of a landscape
    names = {
        "min_loss": "min_loss",
        "max_loss": "max_loss",
        "min_change": "min_gradient_change",
        "max_change": "max_gradient_change",
    }
    curves = {name: [getattr(step, of) for step in steps] for name, of in names.items()}
    return {"steps": numbers, **curves}


def draw_landscape(figure: Any, runs: Runs) -> None:  # noqa: ANN401 - of matplotlib
    """Ranges of the loss and of the gradient's change, by norm, on logarithmic axes."""
    _draw(figure, runs, LABELS)


def draw_decayed(figure: Any, runs: Runs) -> None:  # noqa: ANN401 - of matplotlib
    """The same with and without weight decay."""
    norms = ("bn", "gn", "gnplus")
    _draw(
        figure,
        runs,
        {n + s: LABELS[n] + s.upper().replace("+", ", ") for n in norms for s in ("", L2)},
    )


def _draw(figure: Any, runs: Runs, arms: dict[str, str]) -> None:  # noqa: ANN401
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


TINY = {
    "data": "digits",
    "num_train": 64,
    "width": 8,
    "groups": 2,
    "batch_size": 16,
    "steps": 5,
    "rates": (1e-4, 5e-4),
}
SMALL = {
    "data": "fashion-mnist",
    "num_train": 6000,
    "shrink": 2,
    "width": 16,
    "groups": 8,
    "batch_size": 32,
    "steps": 160,
}
WHOLE = {"data": "cifar10", "width": 64, "groups": 32, "batch_size": 128, "steps": 7820}
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
RATES = PresetTask(name="landscape-rates", measure=measure_rates)
RATES_SCALES: dict[Scale, Size] = {
    "tiny": Size(settings=LandscapeSettings(**TINY), num_seeds=3),
    "small": Size(settings=LandscapeSettings(**SMALL), num_seeds=3),
    "paper": Size(settings=LandscapeSettings(**WHOLE), num_seeds=3),
}
PRESETS = (
    Preset(
        name="landscape",
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
        task=PresetTask(name="landscape-along", measure=measure_along),
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
